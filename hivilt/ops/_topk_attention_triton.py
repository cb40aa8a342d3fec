"""The Triton row of family A: what it refuses, and the values that only the host can check.  Triton itself is imported
when the first call that it can run arrives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from . import _checks
from ._topk_attention_reference import check_lists
from ._triton import DTYPES, why_no_device, why_no_dtype

WIDTH = 256


@functools.cache
def _kernels() -> ModuleType:
    from ..triton_kernels import topk_attention_launch

    return topk_attention_launch


@functools.cache
def _backward_kernels() -> ModuleType:
    from ..triton_kernels import topk_attention_backward_launch

    return topk_attention_backward_launch


@functools.cache
def _plan() -> ModuleType:
    from ..triton_kernels import topk_attention_plan

    return topk_attention_plan


@functools.cache
def _launch() -> ModuleType:
    from ..triton_kernels import launch

    return launch


def why_not(name: str) -> Callable[..., str | None]:
    """Of the row of operator ``name``; its result joins every reason, None when there is none."""
    query_at, value_at = {"topk_attention_backward": (2, 4), "topk_select": (0, 0)}.get(name, (0, 2))
    select_at = {"topk_attention": 8, "topk_select": 7}.get(name)

    def verdict(*args) -> str | None:
        query, value = args[query_at], args[value_at]
        absent = why_no_device(query)
        reasons = [absent, why_no_dtype(query)]
        D, E = query.shape[-1], value.shape[-1]
        if max(D, E) > WIDTH:
            reasons.append(f"D = {D}, E = {E}: the kernels take up to {WIDTH}")
        if select_at is not None:
            source = args[select_at] if args[select_at] is not None else query
            if source.dtype not in DTYPES:
                reasons.append(f"select_query of dtype {str(source.dtype)[6:]}: the kernels judge by float32 at most")
            elif not absent:
                topk, axis = args[select_at - 5], args[select_at - 4]
                reasons.append(_why_too_many(query, args[1], source.dtype, topk, axis))
        return "; ".join(filter(None, reasons)) or None

    return verdict


def _why_too_many(query: Tensor, key: Tensor, dtype: torch.dtype, topk: int, axis: int) -> str | None:
    return _plan().why_not(_launch().part_of(query)[0], dtype, topk, (key, query)[axis].shape[2])


def topk_attention(
    query, key, value, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key, cu_seqlens_q,
    cu_seqlens_k, seed, scale, dropout_p,
):  # fmt: skip
    """Operator ``hivilt::topk_attention`` without its backend argument."""
    packed = _packed(query, key, cu_seqlens_q, cu_seqlens_k)
    source = _source(select_query, select_key, packed)
    return _kernels().topk_attention(
        query, key, value, topk, axis, attn_mask, key_mask, query_mask, *source, packed, seed, scale, dropout_p
    )


def topk_select(
    query, key, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key, cu_seqlens_q, cu_seqlens_k, scale
):
    """Operator ``hivilt::topk_select`` without its backend argument."""
    packed = _packed(query, key, cu_seqlens_q, cu_seqlens_k)
    source = _source(select_query, select_key, packed)
    return _kernels().topk_select(query, key, topk, axis, attn_mask, key_mask, query_mask, *source, packed, scale)


def selected_attention(query, key, value, indices, axis, attn_mask, cu_seqlens_q, cu_seqlens_k, seed, scale, dropout_p):
    """Operator ``hivilt::selected_attention`` without its backend argument."""
    packed = _packed(query, key, cu_seqlens_q, cu_seqlens_k)
    # Looking at the values waits for the device, which a graph that is being captured cannot do; then the kernels
    # leave out what is out of range.
    if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        check_lists(indices, (key, query)[axis].shape[2])
    return _kernels().selected_attention(query, key, value, indices, axis, attn_mask, packed, seed, scale, dropout_p)


def topk_attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, indices, axis, attn_mask, key_mask, query_mask, cu_seqlens_q,
    cu_seqlens_k, seed, scale, dropout_p, key_grad, bias_grad,
):  # fmt: skip
    """Operator ``hivilt::topk_attention_backward`` without its backend argument."""
    packed = _packed(query, key, cu_seqlens_q, cu_seqlens_k)
    return _backward_kernels().topk_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, indices, axis, attn_mask, key_mask, query_mask, packed, seed,
        scale, dropout_p, key_grad, bias_grad,
    )  # fmt: skip


def _packed(query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None):
    """The segments, checked and on the device; None for a batched call."""
    if cu_seqlens_q is None:
        return None
    starts, longest = [], []
    for name, offsets, x in (("cu_seqlens_q", cu_seqlens_q, query), ("cu_seqlens_k", cu_seqlens_k, key)):
        values = _checks.check_offsets("hivilt", name, offsets, x.shape[2])
        longest.append(max((end - start for start, end in pairwise(values)), default=0))
        starts.append(torch.tensor(values, dtype=torch.int32, device="cpu").to(x.device, non_blocking=True))
    return _plan().Packed(*starts, *longest)


def _source(select_query: Tensor | None, select_key: Tensor | None, packed):
    """The selection source as [B, T, C]; packed ones have one batch."""
    if select_query is None or packed is None:
        return select_query, select_key
    return select_query[None], select_key[None]
