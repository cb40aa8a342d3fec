"""Modules that take the place of torch's, of hivilt.reference.modules' and of Hugging Face's: same constructor, same
parameters, same state_dict, faster inside."""

from ..reference.modules import SimpleProjection, keep_banks_local, pack_sequences, unpack_sequences
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
from .gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from .multi_scale_attention import (
    CrossScaleAttention,
    EfficientScaleProcessor,
    FlashMultiScaleAttention,
    MultiScaleAttention,
    ScaleExtraction,
)
from .perceiver import PerceiverAttention, PerceiverResampler
from .progressive_fusion import ProgressiveFusion
from .qformer import QFormerLayer, QFormerMultiHeadAttention
from .scale_fusion import AdaptiveFusion, CrossScaleFusion, HierarchicalPatchEmbedding
from .segformer import SegformerFusionHead, replace_segformer_heads
from .token_pool import AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention
from .vision_block import SelfAttention, VisionBlock
from .vqa_fusion import MaskedMeanPool, MultimodalFusion
from .window_attention import SwinBlock, WindowAttention

__all__ = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "BankFileError",
    "CachedCrossAttention",
    "CheckpointedFusionModule",
    "CrossScaleAttention",
    "CrossScaleFusion",
    "EfficientScaleProcessor",
    "FeatureBank",
    "FlashMultiScaleAttention",
    "FusionModule",
    "GatedCrossAttentionBlock",
    "GlobalFusionModule",
    "HierarchicalPatchEmbedding",
    "LocalFusionModule",
    "MaskedCrossAttention",
    "MaskedMeanPool",
    "MultiScaleAttention",
    "MultiheadAttention",
    "MultimodalFusion",
    "PerceiverAttention",
    "PerceiverResampler",
    "ProgressiveFusion",
    "QFormerLayer",
    "QFormerMultiHeadAttention",
    "ScaleExtraction",
    "SegformerFusionHead",
    "SelfAttention",
    "SimpleProjection",
    "SparseLocalFusion",
    "SwinBlock",
    "VisionBlock",
    "WindowAttention",
    "keep_banks_local",
    "pack_sequences",
    "replace_segformer_heads",
    "unpack_sequences",
]
