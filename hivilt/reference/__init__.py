"""The specification: plain PyTorch, float64-able, differentiable, one file per family. Imports nothing of hivilt."""

from .topk_attention import dropout_keep, selected_attention, topk_attention, topk_select

__all__ = ["dropout_keep", "selected_attention", "topk_attention", "topk_select"]
