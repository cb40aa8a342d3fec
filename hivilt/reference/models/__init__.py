"""Plain models, built from hivilt.reference.modules and torch.nn. Classes of the same names in hivilt.models are these,
accelerated."""

from .deit import DeiT
from .encoders import TextEncoder, VisionEncoder
from .hivilt import HierarchicalViLTransformer
from .hivit import HiViT, ProgressiveHiViT, hivit_base, hivit_large, hivit_small, hivit_tiny
from .qformer import QFormer
from .swin import SwinTransformer
from .vqa import VQAFusionModel

__all__ = [
    "DeiT",
    "HiViT",
    "HierarchicalViLTransformer",
    "ProgressiveHiViT",
    "QFormer",
    "SwinTransformer",
    "TextEncoder",
    "VQAFusionModel",
    "VisionEncoder",
    "hivit_base",
    "hivit_large",
    "hivit_small",
    "hivit_tiny",
]
