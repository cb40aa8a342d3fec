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
from .gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from .multi_scale_attention import (
    CrossScaleAttention,
    EfficientScaleProcessor,
    FlashMultiScaleAttention,
    MultiScaleAttention,
    ScaleExtraction,
)
from .perceiver import PerceiverAttention, PerceiverResampler
from .progressive_fusion import CrossModalStage, ProgressiveFusion
from .qformer import QFormerLayer, QFormerMultiHeadAttention
from .scale_fusion import AdaptiveFusion, CrossScaleFusion, HierarchicalPatchEmbedding
from .sequence_packing import pack_sequences, unpack_sequences
from .simple_projection import SimpleProjection
from .token_pool import AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention
from .vision_block import SelfAttention, VisionBlock
from .vqa_fusion import MaskedMeanPool, MultimodalFusion
from .window_attention import SwinBlock, WindowAttention

__all__ = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "CachedCrossAttention",
    "CheckpointedFusionModule",
    "CrossModalStage",
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
    "SelfAttention",
    "SimpleProjection",
    "SparseLocalFusion",
    "SwinBlock",
    "VisionBlock",
    "WindowAttention",
    "keep_banks_local",
    "pack_sequences",
    "unpack_sequences",
]
