"""The specification: plain PyTorch, float64-able, differentiable, one file per family; and plain modules.

Imports nothing of hivilt.
"""

from . import modules
from .bank_retrieval import bank_attention, bank_retrieval
from .contrastive_loss import contrastive_loss
from .scale_fusion import channel_dropout_keep, interpolate_add, interpolate_tokens, scale_fusion
from .token_pool import token_pool
from .topk_attention import dropout_keep, selected_attention, topk_attention, topk_select

__all__ = [
    "bank_attention",
    "bank_retrieval",
    "channel_dropout_keep",
    "contrastive_loss",
    "dropout_keep",
    "interpolate_add",
    "interpolate_tokens",
    "modules",
    "scale_fusion",
    "selected_attention",
    "token_pool",
    "topk_attention",
    "topk_select",
]
