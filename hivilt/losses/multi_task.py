"""Classification, contrast and matching in one loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import Said, check_number, check_tensor, refuse
from .contrastive_loss import contrastive_loss
from .matching import at_least_single, check_classes, itm_loss

MOST = math.log(100.0)  # as in CLIP (arXiv 2103.00020)


class MultiTaskLoss(nn.Module):
    """lambda_cls cls + lambda_contrast contrast + lambda_aux aux of the outputs of HierarchicalViLTransformer.

    cls: cross entropy of ``output`` with the labels.  contrast: symmetric InfoNCE of ``vision_embed`` and
    ``text_embed``, embeddings of unit length from before fusion; fused ones have seen their own text, and their
    similarity to another would mean nothing.  aux: matching, from ``itm_logits``; 0 without ``itm_labels``.

    The parameter ``logit_scale`` is a logarithm, ln(1 / 0.07) at first; training keeps it at most ln 100.

    Args:
        lambda_cls, lambda_contrast, lambda_aux: weights, at least 0.
        group: a process group over whose batches the contrast runs, see ``contrastive_loss``.
    """

    def __init__(self, lambda_cls: float = 1.0, lambda_contrast: float = 1.0, lambda_aux: float = 1.0, *,
                 group: Any = None):  # fmt: skip
        super().__init__()
        weights = {"lambda_cls": lambda_cls, "lambda_contrast": lambda_contrast, "lambda_aux": lambda_aux}
        for name, weight in weights.items():
            setattr(self, name, check_number("MultiTaskLoss", name, weight, 0.0))
        self.group = group
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def extra_repr(self) -> str:
        return f"lambda_cls={self.lambda_cls}, lambda_contrast={self.lambda_contrast}, lambda_aux={self.lambda_aux}"

    def forward(
        self, outputs: Mapping[str, Tensor], labels: Tensor, itm_labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses.

        Args:
            outputs: ``output`` [B, K], ``vision_embed`` and ``text_embed`` [B, C], with itm_labels also ``itm_logits``
                [N, 2] or [N, R, 2].
            labels: int64 or int32 [B], classes.
            itm_labels: int64 or int32 [N], 0 or 1, or None.

        Returns:
            ``loss``, and unweighted ``cls``, ``contrast`` and ``aux``.

        Raises:
            ValueError, TypeError: a malformed argument.
        """
        op = "MultiTaskLoss"
        if not isinstance(outputs, Mapping):
            refuse(TypeError, op, "outputs", "a dict of tensors", outputs)
        wanted = ["output", "vision_embed", "text_embed"] + (["itm_logits"] if itm_labels is not None else [])
        missing = [name for name in wanted if outputs.get(name) is None]
        if missing:
            refuse(ValueError, op, "outputs", f"the keys {', '.join(wanted)}", Said(f"none for {', '.join(missing)}"))
        check_tensor(op, "outputs['output']", outputs["output"], 2, "(B, K)")
        check_classes(op, "labels", labels, outputs["output"].shape[0], outputs["output"], outputs["output"].shape[1])
        if self.training:
            # In place, as CLIP does after a step: a clamp in the graph would stop every gradient above the bound.
            with torch.no_grad():
                self.logit_scale.clamp_(max=MOST)
        scale = self.logit_scale.clamp(max=MOST).exp()
        cls = F.cross_entropy(at_least_single(outputs["output"]), labels.long())
        contrast = contrastive_loss(outputs["vision_embed"], outputs["text_embed"], scale, group=self.group)
        aux = cls.new_zeros(()) if itm_labels is None else itm_loss(outputs["itm_logits"], itm_labels)
        loss = self.lambda_cls * cls + self.lambda_contrast * contrast + self.lambda_aux * aux
        return {"loss": loss, "cls": cls, "contrast": contrast, "aux": aux}
