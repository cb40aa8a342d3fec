"""Modules that take the place of torch's: same constructor, same parameters, same state_dict, faster inside."""

from .topk_attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
