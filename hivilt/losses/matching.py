"""Image-text matching: does this text belong to this image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._checks import Said, check_tensor, refuse
from ..ops._running import eager


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of match and no match.

    Args:
        logits: [N, 2], or [N, R, 2] of R queries, whose mean counts (as in BLIP-2); class 1 is a match.
        labels: int64 or int32 [N], 0 or 1.

    Returns:
        The mean over pairs, in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    op = "itm_loss"
    many = isinstance(logits, Tensor) and logits.dim() == 3
    check_tensor(op, "logits", logits, 3 if many else 2, "(N, 2) or (N, R, 2)")
    if logits.shape[-1] != 2 or not logits.numel():
        refuse(ValueError, op, "logits", "shape (N, 2) or (N, R, 2), N and R at least 1", logits)
    check_classes(op, "labels", labels, logits.shape[0], logits, 2)
    logits = at_least_single(logits)
    return F.cross_entropy(logits.mean(1) if many else logits, labels.long())


def check_classes(op: str, name: str, x: Tensor, count: int, like: Tensor, classes: int) -> None:
    """int64 or int32 [count] on the device of ``like``, from 0 to classes - 1; where asking would wait for a GPU, that
    is left to torch."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
        refuse(TypeError, op, name, f"an int64 or int32 tensor ({count},)", x)
    if tuple(x.shape) != (count,):
        refuse(ValueError, op, name, f"shape ({count},)", x)
    if x.device != like.device:
        refuse(ValueError, op, name, f"the logits' device {like.device}", x)
    if x.is_cpu and eager(x) and not bool(((x >= 0) & (x < classes)).all()):
        refuse(ValueError, op, name, f"values from 0 to {classes - 1}", Said("one outside"))


def at_least_single(x: Tensor) -> Tensor:
    """Half types as float32: a softmax of halves keeps three digits."""
    return x if x.dtype == torch.float64 else x.float()
