"""Modules that take the place of torch's, of hivilt.reference.modules' and of Hugging Face's: same constructor, same
parameters, same state_dict, faster inside."""

from .progressive_fusion import ProgressiveFusion
from .scale_fusion import AdaptiveFusion, CrossScaleFusion, HierarchicalPatchEmbedding
from .segformer import SegformerFusionHead, replace_segformer_heads
from .token_pool import AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention

__all__ = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "CrossScaleFusion",
    "HierarchicalPatchEmbedding",
    "MultiheadAttention",
    "ProgressiveFusion",
    "SegformerFusionHead",
    "replace_segformer_heads",
]
