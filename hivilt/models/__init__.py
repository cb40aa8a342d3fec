"""Models on the modules of hivilt.nn. Each is the class of the same name in hivilt.reference.models, accelerated: same
constructor, same parameters, same state_dict."""

from .deit import DeiT
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
    "VQAFusionModel",
    "hivit_base",
    "hivit_large",
    "hivit_small",
    "hivit_tiny",
]
