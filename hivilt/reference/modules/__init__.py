"""Plain torch.nn modules, usable without any kernel. Classes of the same names in hivilt.nn subclass them: same
constructor, same parameters, faster inside."""

from .bank_retrieval import FeatureBank, keep_banks_local
from .cached_cross_attention import CachedCrossAttention
from .cross_modal_fusion import (
    CheckpointedFusionModule,
    FusionModule,
    GlobalFusionModule,
    LocalFusionModule,
    SparseLocalFusion,
)
from .progressive_fusion import CrossModalStage, ProgressiveFusion
from .scale_fusion import AdaptiveFusion, CrossScaleFusion, HierarchicalPatchEmbedding
from .sequence_packing import pack_sequences, unpack_sequences
from .token_pool import AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention

__all__ = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "CachedCrossAttention",
    "CheckpointedFusionModule",
    "CrossModalStage",
    "CrossScaleFusion",
    "FeatureBank",
    "FusionModule",
    "GlobalFusionModule",
    "HierarchicalPatchEmbedding",
    "LocalFusionModule",
    "MultiheadAttention",
    "ProgressiveFusion",
    "SparseLocalFusion",
    "keep_banks_local",
    "pack_sequences",
    "unpack_sequences",
]
