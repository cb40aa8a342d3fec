"""Plain models, built from hivilt.reference.modules and torch.nn. Classes of the same names in hivilt.models are these,
accelerated."""

from .deit import DeiT
from .hivit import HiViT, ProgressiveHiViT, hivit_base, hivit_large, hivit_small, hivit_tiny
from .qformer import QFormer
from .swin import SwinTransformer
from .vqa import VQAFusionModel

__all__ = [
    "DeiT",
    "HiViT",
    "ProgressiveHiViT",
    "QFormer",
    "SwinTransformer",
    "VQAFusionModel",
    "hivit_base",
    "hivit_large",
    "hivit_small",
    "hivit_tiny",
]
