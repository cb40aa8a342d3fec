"""Plain torch.nn modules, usable without any kernel. Classes of the same names in hivilt.nn subclass them: same
constructor, same parameters, faster inside."""

from .bank_retrieval import FeatureBank, keep_banks_local
from .progressive_fusion import CrossModalStage, ProgressiveFusion
from .scale_fusion import AdaptiveFusion, CrossScaleFusion, HierarchicalPatchEmbedding
from .token_pool import AdaptiveGlobalPooling

__all__ = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "CrossModalStage",
    "CrossScaleFusion",
    "FeatureBank",
    "HierarchicalPatchEmbedding",
    "ProgressiveFusion",
    "keep_banks_local",
]
