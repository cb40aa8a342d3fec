"""Top-k cross-modal attention: out_i = sum over kept j of softmax_j(s_ij) v_j, s_ij = scale <q_i, k_j> + bias_ij.

The public functions ``topk_attention``, ``topk_attention_varlen``, ``topk_select`` and ``selected_attention``: they
check, fill in defaults and call.  Meaning: hivilt/reference/topk_attention.py; why: docs/topk_attention.md.  No Q x N
matrix is ever in memory, forward or backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _backends
from ._checks import (
    autocast,
    check_axis,
    check_flag,
    check_indices,
    check_mask,
    check_max_seqlen,
    check_number,
    check_offsets,
    check_packed,
    check_qkv,
    check_segments,
    check_selection_source,
    check_token_mask,
    check_topk,
    refuse,
)
from ._running import draw_seed, eager, record, records, run
from ._topk_attention_autograd import SelectedAttention, TopkAttention
from ._topk_attention_rows import SELECTED_ATTENTION, TOPK_ATTENTION, TOPK_SELECT

_autocast_anywhere = torch._C._is_any_autocast_enabled


def topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    topk: int | None = None,
    *,
    axis: str = "keys",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    select_query: Tensor | None = None,
    select_key: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_indices: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention in which each query keeps its ``topk`` best keys, or each key its ``topk`` best queries.

    Args:
        query: float32, bfloat16, float16 or float64 [B, H, Q, D].
        key: same dtype [B, G, N, D], H a multiple of G; query head h reads key head h // (H / G).
        value: same dtype [B, G, N, E].
        topk: how many to keep; None keeps all (dense attention), and so does a number that is large enough.
        axis: "keys": query i keeps its best keys.  "queries": key j keeps its best queries; a query may keep none.
        attn_mask: bool, True takes part, or float bias (float32 or query's dtype), broadcastable to [B, H, Q, N].
        key_mask, query_mask: bool [B, N], [B, Q], True takes part.
        select_query, select_key: float [B, Q, C], [B, N, C]; given, their plain dot product selects, one set for all
            heads (then attn_mask may have no head axis); the softmax still uses the attention scores.
        scale: of the dot products, 1 / sqrt(D) by default.
        dropout_p: probability of dropping a kept probability; applied whenever it is not 0.
        return_lse, return_indices: also return the log-sum-exp and the selection.
        backend: "reference", "cpu", "triton", "cuda" or "auto"; None obeys use_backend and HIVILT_BACKEND.

    Returns:
        out [B, H, Q, E] in query's dtype, or a tuple (out[, lse][, indices]): lse float32 [B, H, Q] (float64 for
        float64), indices int32 [B, H, Q, topk] (axis="queries": [B, H, N, topk]; shared selection: H = 1), ascending,
        padded with -1.  A query that keeps nothing has out 0, lse -inf and no gradient; a NaN or +inf among its valid
        scores makes its out and lse NaN.

    Raises:
        ValueError, TypeError: a malformed argument.  BackendError: the backend asked for cannot run the call.

    Cost: 2 B H (Q N D + kept pairs E) flops; memory beside the results: O(B H Q topk), for the indices.
    Gradients reach query, key, value and a float attn_mask; second derivatives raise.
    """
    args, width = _bind_topk_attention(query, key, value, topk, axis, attn_mask, key_mask, query_mask, select_query,
                                       select_key, scale, dropout_p, return_lse, return_indices, backend)  # fmt: skip
    out, lse, indices = _forward(args, backend)
    if return_indices:
        indices = _pad(indices, width, args)
        return (out, lse, indices) if return_lse else (out, indices)
    return (out, lse) if return_lse else out


def topk_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    topk: int | None = None,
    *,
    axis: str = "keys",
    select_query: Tensor | None = None,
    select_key: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_indices: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``topk_attention`` of packed sequences: segment b of the queries attends to segment b of the keys.

    Args:
        query: [Tq, H, D]; key: [Tk, G, D]; value: [Tk, G, E].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1], where each segment starts and the last one ends.  Empty
            segments are legal, and so are tokens behind the last segment: their out is 0 and their lse -inf.
        max_seqlen_q, max_seqlen_k: at least the longest segment (not checked while a graph is traced).
        select_query, select_key: [Tq, C], [Tk, C].

    Returns:
        out [Tq, H, E], or a tuple (out[, lse [Tq, H]][, indices [Tq, H, topk]]); axis="queries": [Tk, H, topk].
        Indices count from the start of their segment.
    """
    args, width = _bind_topk_attention_varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, topk, axis, select_query, select_key,
        scale, dropout_p, return_lse, return_indices, backend,
    )  # fmt: skip
    out, lse, indices = _forward(args, backend)
    result = [out[0].transpose(0, 1)]
    if return_lse:
        result.append(lse[0].transpose(0, 1))
    if return_indices:
        result.append(_pad(indices, width, args)[0].transpose(0, 1))
    return tuple(result) if len(result) > 1 else result[0]


def topk_select(
    query: Tensor,
    key: Tensor,
    topk: int,
    *,
    axis: str = "keys",
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    select_query: Tensor | None = None,
    select_key: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The selection of ``topk_attention`` alone; same arguments without value.

    Returns:
        int32 [B, H, Q, topk] (axis="queries": [B, H, N, topk]; shared selection: H = 1), ascending, padded with -1.
        No gradient passes.  Never in memory: the scores.
    """
    args, width = _bind_topk_select(query, key, topk, axis, attn_mask, key_mask, query_mask, select_query, select_key,
                                    scale, backend)  # fmt: skip
    indices = run(TOPK_SELECT, backend, args) if args[2] > 0 else query.new_empty(0)  # 0: nothing to select from
    return _pad(indices, width, (args[0], args[1], None, *args[2:]))


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    axis: str = "keys",
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over pairs chosen beforehand, by ``topk_select`` or otherwise.

    Args:
        indices: int32 or int64 [B, H, Q, K] (axis="queries": [B, H, N, K]), or with 1 instead of H; in any order, none
            twice in a row, -1 lists nothing.
        attn_mask: bool or float bias; a listed pair that it forbids takes no part.

    Returns:
        out [B, H, Q, E], or (out, lse).

    Raises:
        ValueError: also for an index outside -1..N-1 (axis="queries": -1..Q-1) and for one listed twice in a row.
    """
    args, _ = _bind_selected_attention(query, key, value, indices, axis, attn_mask, scale, dropout_p, return_lse,
                                       backend)  # fmt: skip
    if not records(args[0], args[1], args[2], args[5]):
        out, lse = run(SELECTED_ATTENTION, backend, args)
    elif eager(args[0]):
        out, lse = record(SelectedAttention, (*args, _backends.choose(SELECTED_ATTENTION, backend, args)))
    else:
        out, lse = record(SelectedAttention, (*args, backend or ""))
    return (out, lse) if return_lse else out


# From public arguments to those of an operator. Each returns (operator arguments, width of the indices asked for).


def _bind_topk_attention(query, key, value, topk=None, axis="keys", attn_mask=None, key_mask=None, query_mask=None,
                         select_query=None, select_key=None, scale=None, dropout_p=0.0, return_lse=False,
                         return_indices=False, backend=None):  # fmt: skip
    op = "topk_attention"
    if _autocast_anywhere():
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    B, H, Q, N, D = check_qkv(op, query, key, value)
    if not (attn_mask is key_mask is query_mask is select_query is select_key is None):
        attn_mask, select_query, select_key = _check_choice(
            op, query, N, attn_mask, key_mask, query_mask, select_query, select_key
        )
    axis = 0 if axis == "keys" else check_axis(op, axis)
    kept = width = -1
    if topk is not None or return_indices is not False:
        width = _check_width(op, topk, return_indices)
        kept = _clamp(op, width, N if axis == 0 else Q, return_indices, B * H, Q if axis == 0 else N)
    if return_lse is not False:
        check_flag(op, "return_lse", return_lse)
    scale = default_scale(D) if scale is None else check_number(op, "scale", scale)
    seed = None
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = check_number(op, "dropout_p", dropout_p, 0.0, 1.0)
        seed = draw_seed(query) if dropout_p > 0.0 else None
    if backend is not None:
        _backends.check_name(backend, f"{op}: backend")
    return (query, key, value, kept, axis, attn_mask, key_mask, query_mask, select_query, select_key, None, None, seed,
            scale, dropout_p), width  # fmt: skip


def _bind_topk_attention_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, topk=None,
                                axis="keys", select_query=None, select_key=None, scale=None, dropout_p=0.0,
                                return_lse=False, return_indices=False, backend=None):  # fmt: skip
    op = "topk_attention_varlen"
    if _autocast_anywhere():
        query, key, value, _ = _autocast(query, key, value, None)
    check_packed(op, query, key, value)
    Tq, H, D = query.shape
    Tk = key.shape[0]
    cu_seqlens_q = check_segments(op, "cu_seqlens_q", cu_seqlens_q, query)
    cu_seqlens_k = check_segments(op, "cu_seqlens_k", cu_seqlens_k, query)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        refuse(ValueError, op, "cu_seqlens_k", f"as many segments as cu_seqlens_q, shape {tuple(cu_seqlens_q.shape)}",
               cu_seqlens_k)  # fmt: skip
    check_max_seqlen(op, "max_seqlen_q", max_seqlen_q)
    check_max_seqlen(op, "max_seqlen_k", max_seqlen_k)
    if eager(cu_seqlens_q):
        check_offsets(op, "cu_seqlens_q", cu_seqlens_q, Tq, max_seqlen_q)
        check_offsets(op, "cu_seqlens_k", cu_seqlens_k, Tk, max_seqlen_k)
    if select_query is not None or select_key is not None:
        select_query, select_key = check_selection_source(op, query, select_query, select_key, (), Tq, Tk)
    axis = check_axis(op, axis)
    width = _check_width(op, topk, return_indices)
    kept = _clamp(op, width, Tk if axis == 0 else Tq, return_indices, H, Tq if axis == 0 else Tk)
    check_flag(op, "return_lse", return_lse)
    scale = default_scale(D) if scale is None else check_number(op, "scale", scale)
    dropout_p = check_number(op, "dropout_p", dropout_p, 0.0, 1.0)
    _backends.check_name(backend, f"{op}: backend")
    seed = draw_seed(query) if dropout_p > 0.0 else None
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return (query, key, value, kept, axis, None, None, None, select_query, select_key, cu_seqlens_q, cu_seqlens_k, seed,
            scale, dropout_p), width  # fmt: skip


def _bind_topk_select(query, key, topk, axis="keys", attn_mask=None, key_mask=None, query_mask=None,
                      select_query=None, select_key=None, scale=None, backend=None):  # fmt: skip
    op = "topk_select"
    if _autocast_anywhere():
        query, key, _, attn_mask = _autocast(query, key, key, attn_mask)
    B, H, Q, N, D = check_qkv(op, query, key, key)
    attn_mask, select_query, select_key = _check_choice(
        op, query, N, attn_mask, key_mask, query_mask, select_query, select_key
    )
    axis = check_axis(op, axis)
    width = check_topk(op, topk)
    kept = _clamp(op, width, N if axis == 0 else Q, True, B * H, Q if axis == 0 else N)
    scale = default_scale(D) if scale is None else check_number(op, "scale", scale)
    _backends.check_name(backend, f"{op}: backend")
    return (query, key, kept, axis, attn_mask, key_mask, query_mask, select_query, select_key, None, None, scale), width


def _bind_selected_attention(query, key, value, indices, axis="keys", attn_mask=None, scale=None, dropout_p=0.0,
                             return_lse=False, backend=None):  # fmt: skip
    op = "selected_attention"
    if _autocast_anywhere():
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    _, _, Q, N, D = check_qkv(op, query, key, value)
    axis = check_axis(op, axis)
    indices = check_indices(op, indices, query, Q if axis == 0 else N)
    if attn_mask is not None:
        attn_mask = check_mask(op, attn_mask, query, N, False)
    check_flag(op, "return_lse", return_lse)
    scale = default_scale(D) if scale is None else check_number(op, "scale", scale)
    dropout_p = check_number(op, "dropout_p", dropout_p, 0.0, 1.0)
    _backends.check_name(backend, f"{op}: backend")
    seed = draw_seed(query) if dropout_p > 0.0 else None
    return (query, key, value, indices, axis, attn_mask, None, None, seed, scale, dropout_p), None


def _autocast(query: Any, key: Any, value: Any, attn_mask: Any):
    """Under autocast query, key and value take its dtype, as in scaled_dot_product_attention, and a float mask of
    another half type follows them.  The selection source is left as given."""
    if isinstance(attn_mask, Tensor) and attn_mask.dtype != torch.float32:
        return autocast(query, key, value, attn_mask)
    return *autocast(query, key, value), attn_mask


def _check_choice(op, query, keys, attn_mask, key_mask, query_mask, select_query, select_key):
    """attn_mask in four dimensions and the selection source without its graph, each None where it is not given."""
    batch, _, queries, _ = query.shape
    if select_query is not None or select_key is not None:
        select_query, select_key = check_selection_source(op, query, select_query, select_key, (batch,), queries, keys)
    if attn_mask is not None:
        attn_mask = check_mask(op, attn_mask, query, keys, select_query is not None)
    if key_mask is not None:
        check_token_mask(op, "key_mask", key_mask, query, keys, "(B, N)")
    if query_mask is not None:
        check_token_mask(op, "query_mask", query_mask, query, queries, "(B, Q)")
    return attn_mask, select_query, select_key


def _check_width(op: str, topk: Any, return_indices: Any) -> int:
    """The checked topk; -1 for None."""
    check_flag(op, "return_indices", return_indices)
    if topk is not None:
        return check_topk(op, topk)
    if return_indices:
        refuse(ValueError, op, "topk", "an int, because return_indices=True", None)
    return -1


def _clamp(op: str, topk: int, most: int, wants_indices: bool, slices: int, rows: int) -> int:
    """What the operator is told; -1 is dense, which is what a large topk means unless someone wants the indices."""
    if topk < most:
        return topk
    if not wants_indices:
        return -1
    if topk > most and max(1, slices * rows) * topk > 2**31 - 1:
        refuse(ValueError, op, "topk", f"fewer than 2^31 indices in all, at most {most} a row are not -1", topk)
    return most if most > 0 else -1


def _pad(indices: Tensor, width: int, args: tuple) -> Tensor:
    """The indices with ``width`` columns; there are none yet where nothing could be selected."""
    if indices.dim() == 4:
        missing = width - indices.shape[3]
        return torch.nn.functional.pad(indices, (0, missing), value=-1) if missing else indices
    query, key = args[0], args[1]
    heads = query.shape[1] if args[8] is None else 1
    rows = (query, key)[args[4]].shape[2]
    return query.new_full((query.shape[0], heads, rows, width), -1, dtype=torch.int32)


def default_scale(width: int) -> float:
    """1 / sqrt(D); vectors without entries have scores of 0 whatever the scale."""
    return 1.0 / math.sqrt(width) if width else 1.0


def _forward(args: tuple, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    if not records(args[0], args[1], args[2], args[5]):
        return run(TOPK_ATTENTION, backend, args)
    # Backward asks for the backend that ran forward; a traced graph only knows what was asked for.
    chosen = _backends.choose(TOPK_ATTENTION, backend, args) if eager(args[0]) else backend or ""
    return record(TopkAttention, (*args, chosen))


_backends.explainable(TOPK_ATTENTION, topk_attention, _bind_topk_attention)
_backends.explainable(TOPK_ATTENTION, topk_attention_varlen, _bind_topk_attention_varlen)
_backends.explainable(TOPK_SELECT, topk_select, _bind_topk_select)
_backends.explainable(SELECTED_ATTENTION, selected_attention, _bind_selected_attention)
