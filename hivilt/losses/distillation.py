"""Distillation through a token of its own, as in DeiT (arXiv 2012.12877)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ops._checks import check_number, check_tensor, refuse
from .matching import at_least_single, check_classes

MODES = ("hard", "soft")


def distillation_loss(
    cls_logits: Tensor,
    distillation_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mode: str = "hard",
    alpha: float = 0.5,
    tau: float = 1.0,
) -> Tensor:
    """(1 - alpha) CE(cls_logits, labels) + alpha D, where D is of the distillation head.

    "hard": D = CE(distillation_logits, argmax teacher_logits).  "soft" (arXiv 1503.02531): D = tau^2 times the mean
    over samples of KL(softmax(teacher / tau) || softmax(distillation / tau)).

    Args:
        cls_logits, distillation_logits, teacher_logits: [B, K]; the teacher gets no gradient.
        labels: int64 or int32 [B].
        alpha: from 0 to 1; tau: above 0, used by "soft" only.

    Returns:
        A number in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    op = "distillation_loss"
    check_tensor(op, "cls_logits", cls_logits, 2, "(B, K)")
    if not cls_logits.numel():
        refuse(ValueError, op, "cls_logits", "at least one sample and one class", cls_logits)
    for name, x in (("distillation_logits", distillation_logits), ("teacher_logits", teacher_logits)):
        check_tensor(op, name, x, 2, "(B, K)")
        if x.shape != cls_logits.shape or x.device != cls_logits.device:
            refuse(ValueError, op, name, f"shape {tuple(cls_logits.shape)} on {cls_logits.device}", x)
    check_classes(op, "labels", labels, cls_logits.shape[0], cls_logits, cls_logits.shape[1])
    if not isinstance(mode, str) or mode not in MODES:
        refuse(ValueError if isinstance(mode, str) else TypeError, op, "mode", " or ".join(map(repr, MODES)), mode)
    alpha, tau = check_number(op, "alpha", alpha, 0.0, 1.0), check_number(op, "tau", tau)
    if tau <= 0.0:
        refuse(ValueError, op, "tau", "a number above 0", tau)
    classes = F.cross_entropy(at_least_single(cls_logits), labels.long())
    student, teacher = at_least_single(distillation_logits), at_least_single(teacher_logits.detach())
    if mode == "hard":
        return (1.0 - alpha) * classes + alpha * F.cross_entropy(student, teacher.argmax(1))
    student, teacher = (x.div(tau).log_softmax(1) for x in (student, teacher.to(student.dtype)))
    distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1.0 - alpha) * classes + alpha * tau**2 * distance
