"""Operations: one file per family, each with argument checks, operator, autograd and backend rows."""

from .topk_attention import selected_attention, topk_attention, topk_attention_varlen, topk_select

__all__ = ["selected_attention", "topk_attention", "topk_attention_varlen", "topk_select"]
