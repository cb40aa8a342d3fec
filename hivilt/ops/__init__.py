"""Operations: one file per family, each with argument checks, operator, autograd and backend rows."""

from ._bank_shadow import bank_shadow
from .bank_retrieval import bank_attention, bank_push_, bank_retrieval
from .contrastive_loss import contrastive_loss
from .scale_fusion import interpolate_add, interpolate_tokens, scale_fusion
from .token_pool import token_pool
from .topk_attention import selected_attention, topk_attention, topk_attention_varlen, topk_select

__all__ = [
    "bank_attention",
    "bank_push_",
    "bank_retrieval",
    "bank_shadow",
    "contrastive_loss",
    "interpolate_add",
    "interpolate_tokens",
    "scale_fusion",
    "selected_attention",
    "token_pool",
    "topk_attention",
    "topk_attention_varlen",
    "topk_select",
]
