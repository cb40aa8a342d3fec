"""Plain torch.nn modules, usable without any kernel. Classes of the same names in hivilt.nn subclass them: same
constructor, same parameters, faster inside."""

from .bank_retrieval import FeatureBank, keep_banks_local
from .progressive_fusion import CrossModalStage, ProgressiveFusion
from .scale_fusion import AdaptiveFusion, CrossScaleFusion, HierarchicalPatchEmbedding
from .token_pool import AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention

__all__ = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "CrossModalStage",
    "CrossScaleFusion",
    "FeatureBank",
    "HierarchicalPatchEmbedding",
    "MultiheadAttention",
    "ProgressiveFusion",
    "keep_banks_local",
]
