"""Modules that take the place of torch's, of hivilt.reference.modules' and of Hugging Face's: same constructor, same
parameters, same state_dict, faster inside."""

from ..reference.modules import keep_banks_local, pack_sequences, unpack_sequences
from ._bank_file import BankFileError
from .bank_retrieval import FeatureBank
from .cached_cross_attention import CachedCrossAttention
from .cross_modal_fusion import (
    CheckpointedFusionModule,
    FusionModule,
    GlobalFusionModule,
    LocalFusionModule,
    SparseLocalFusion,
)
from .progressive_fusion import ProgressiveFusion
from .scale_fusion import AdaptiveFusion, CrossScaleFusion, HierarchicalPatchEmbedding
from .segformer import SegformerFusionHead, replace_segformer_heads
from .token_pool import AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention

__all__ = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "BankFileError",
    "CachedCrossAttention",
    "CheckpointedFusionModule",
    "CrossScaleFusion",
    "FeatureBank",
    "FusionModule",
    "GlobalFusionModule",
    "HierarchicalPatchEmbedding",
    "LocalFusionModule",
    "MultiheadAttention",
    "ProgressiveFusion",
    "SegformerFusionHead",
    "SparseLocalFusion",
    "keep_banks_local",
    "pack_sequences",
    "replace_segformer_heads",
    "unpack_sequences",
]
