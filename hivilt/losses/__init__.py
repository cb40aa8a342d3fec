"""Losses of vision-language training: contrastive without the matrix of all pairs, matching, distillation."""

from .contrastive_loss import contrastive_loss, itc_loss
from .distillation import distillation_loss
from .matching import itm_loss
from .multi_task import MultiTaskLoss

__all__ = ["MultiTaskLoss", "contrastive_loss", "distillation_loss", "itc_loss", "itm_loss"]
