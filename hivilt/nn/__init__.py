"""Modules that take the place of torch's, of hivilt.reference.modules' and of Hugging Face's: same constructor, same
parameters, same state_dict, faster inside."""

from ..reference.modules import keep_banks_local
from ._bank_file import BankFileError
from .bank_retrieval import FeatureBank
from .progressive_fusion import ProgressiveFusion
from .scale_fusion import AdaptiveFusion, CrossScaleFusion, HierarchicalPatchEmbedding
from .segformer import SegformerFusionHead, replace_segformer_heads
from .token_pool import AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention

__all__ = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "BankFileError",
    "CrossScaleFusion",
    "FeatureBank",
    "HierarchicalPatchEmbedding",
    "MultiheadAttention",
    "ProgressiveFusion",
    "SegformerFusionHead",
    "keep_banks_local",
    "replace_segformer_heads",
]
