"""Retrieval from a feature bank: exact top-k by dot product, softmax, weighted sum, with gradients.

The public functions ``bank_retrieval``, ``bank_attention`` and ``bank_push_``: they check, fill in defaults and call.
Meaning: hivilt/reference/bank_retrieval.py; why: docs/bank_retrieval.md.  No B x M matrix is ever in memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library
from ._bank_retrieval_autograd import BankRetrieval
from ._bank_retrieval_rows import BANK_RETRIEVAL
from ._bank_shadow import SHADOW_QUERIES, check_shadow
from ._checks import INT32_MAX, Said, check_index, check_number, check_tensor, check_topk, refuse
from ._running import eager, record, records, run
from .topk_attention import topk_attention

PRECISIONS = ("exact", "fp32", "bf16")
NONFINITE = ("skip", "raise", "keep")
_autocast_anywhere = torch._C._is_any_autocast_enabled


def bank_retrieval(
    query: Tensor,
    keys: Tensor,
    topk: int,
    *,
    values: Tensor | None = None,
    scale: float | Tensor = 1.0,
    count: int | Tensor | None = None,
    mask: Tensor | None = None,
    exclude: int | Tensor | None = None,
    shadow: Tensor | None = None,
    precision: str = "exact",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``topk`` rows of a bank with the largest dot products, and their softmax-weighted sum.

    Args:
        query: float32, bfloat16, float16 or float64 [B, C].
        keys: [M, C], the bank, of any of these dtypes (float64 exactly when query is).
        topk: how many rows; more than M pads.
        values: [M, E], what is summed; the keys by default.
        scale: of the scores in the softmax; a number, or a tensor of one element, which gets a gradient.
        count: rows from this one on are not valid; a number or an integer tensor of one element, never synchronised.
        mask: bool [M] or [B, M], True takes part.
        exclude: a row that is not valid, -1 for none; a number, or an integer tensor [B], one for each query.  A number
            outside -1..M-1 raises; in a tensor on another device than the CPU, and in compiled code, where asking would
            wait, it excludes nothing.
        shadow: what ``bank_shadow`` made of these very keys: few queries then read a quarter of the bank or less, with
            the same result.  Used on the CPU, by precision="exact", where it pays; one of other keys gives wrong rows.
        precision: "exact" is the exact top-k of the float32 dot products, found by whatever is fastest: a pass in
            lower precision with a proven margin, whose survivors are scored again.  "fp32" computes every product in
            float32, with the same result.  "bf16" trusts the lower precision: fast and approximate.
        backend: "reference", "cpu", "triton", "cuda" or "auto"; None obeys use_backend and HIVILT_BACKEND.

    Returns:
        retrieved [B, E] in query's dtype; scores [B, topk], the raw dot products in float32 (float64 for float64),
        descending, ties by index ascending; indices int64 [B, topk].  Where valid rows run out: -inf and -1.  A query
        without a valid row retrieves zeros.  A NaN among a query's valid scores makes its retrieved and scores NaN.

    Raises:
        ValueError, TypeError: a malformed argument.  BackendError: the backend asked for cannot run the call.

    Cost: 2 B M C flops for the scores; memory beside the results O(B topk), and B topk (C + E) elements where a
    gradient is wanted: backward keeps the rows it read, so the bank may change before it.  Gradients reach query, keys,
    values and scale, through retrieved and scores; second derivatives raise.
    """
    args, _ = _bind_bank_retrieval(query, keys, topk, values, scale, count, mask, exclude, shadow, precision, backend)
    if not records(args[0], args[1], args[2], args[4]):
        return run(BANK_RETRIEVAL, backend, args)[:3]
    args = (*args[:-1], True)
    chosen = _backends.choose(BANK_RETRIEVAL, backend, args) if eager(args[0]) else backend or ""
    return record(BankRetrieval, (*args, chosen))[:3]


def bank_attention(
    query: Tensor,
    keys: Tensor,
    *,
    values: Tensor | None = None,
    scale: float | Tensor = 1.0,
    count: int | Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """All valid rows of a bank, weighted by the softmax of scale <q, key>: dense retrieval.

    Args:
        query, keys, values, scale, count, mask: as in ``bank_retrieval``.

    Returns:
        retrieved [B, E] in query's dtype and lse [B], the log-sum-exp of the scaled scores in float32 (float64 for
        float64), by which results of several banks can be merged; zeros and -inf without a valid row.

    Raises:
        ValueError, TypeError: a malformed argument.  BackendError: the backend asked for cannot run the call.  In
        backward RuntimeError, where the bank was written to since.

    Cost: 4 B M C flops, nothing of size B x M in memory.  It is topk_attention of one head that keeps every row.
    """
    op = "bank_attention"
    query, keys, values, factor, scale, count, mask, _ = _check_bank(op, query, keys, values, scale, count, mask, None)
    _backends.check_name(backend, f"{op}: backend")
    M = keys.shape[0]
    values = keys if values is None else values
    dtype = query.dtype
    wide = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), values.dtype)
    if scale is not None:
        wide = torch.promote_types(wide, torch.float32)
    query, keys, values = query.to(wide), keys.to(wide), values.to(wide)
    if scale is not None:
        query = _scaled(query, scale.to(wide))
    key_mask = attn_mask = None
    if count is not None:
        key_mask = (torch.arange(M, device=query.device) < count)[None]
    if mask is not None and mask.dim() == 1:
        key_mask = mask[None] if key_mask is None else key_mask & mask
    elif mask is not None:
        attn_mask = mask[None, None]
    # Autocast would round the bank.
    with torch.autocast(query.device.type, enabled=False) if _autocast_anywhere() else nullcontext():
        out, lse = topk_attention(
            query[None, None], keys[None, None], values[None, None], attn_mask=attn_mask, key_mask=key_mask,
            scale=factor, return_lse=True, backend=backend,
        )  # fmt: skip
    return out[0, 0].to(dtype), lse[0, 0]


def _scaled(query: Tensor, scale: Tensor) -> Tensor:
    """query * scale, whose gradient for the scale leaves out what is not finite: a query that no valid row answers gets
    the gradient 0, and 0 * NaN would be NaN.  One that a row does answer is lost, its gradient is NaN anyway."""
    query = query.contiguous()
    fine = query.isfinite()
    # First a sum along each row: neither strides nor, below 2^15 queries, threads choose its order.
    each = scale.expand(query.shape[0], 1)
    return torch.where(fine, torch.where(fine, query, 0.0) * each, query * scale.detach())


def bank_push_(
    keys: Tensor,
    pointer: Tensor,
    count: Tensor,
    features: Tensor,
    *,
    values: Tensor | None = None,
    rows: Tensor | None = None,
    skipped: Tensor | None = None,
    on_nonfinite: str = "skip",
) -> Tensor:
    """Writes rows into a ring buffer, in place: features[i] to slot (pointer + i) mod M, the last M of them.

    Args:
        keys: [M, C], written; values: [M, E] or None, written.
        pointer: int64, one element: the next slot; count: int64, one element: how many slots hold a row.  Both are
            written, on their device: nothing waits for it.
        features: [B, C], rows: [B, E] exactly where values are given; rounded to the bank's dtype, without gradients.
        skipped: int64, one element or None: rows left out are added to it.
        on_nonfinite: "skip" leaves out rows of features or rows that hold NaN or infinity, or would once rounded to the
            bank's dtype; "raise" refuses them all (and waits for the device to know), "keep" writes them.

    Returns:
        keys.

    Raises:
        ValueError, TypeError: a malformed argument, before anything is written.

    Cost: O(min(B, M) (C + E)).
    """
    op = "bank_push_"
    check_tensor(op, "keys", keys, 2, "(M, C)")
    check_tensor(op, "features", features, 2, "(B, C)")
    M, C = keys.shape
    if M == 0:
        refuse(ValueError, op, "keys", "at least one slot", keys)
    if features.shape[1] != C:
        refuse(ValueError, op, "features", f"shape (B, {C})", features)
    if (values is None) != (rows is None):
        missing = "values" if values is None else "rows"
        refuse(ValueError, op, missing, "a tensor, because the other of values and rows is given", None)
    tensors = [("features", features)]
    if values is not None:
        check_tensor(op, "values", values, 2, "(M, E)")
        check_tensor(op, "rows", rows, 2, "(B, E)")
        if values.shape[0] != M:
            refuse(ValueError, op, "values", f"shape ({M}, E)", values)
        if tuple(rows.shape) != (features.shape[0], values.shape[1]):
            refuse(ValueError, op, "rows", f"shape ({features.shape[0]}, {values.shape[1]})", rows)
        tensors += [("values", values), ("rows", rows)]
    for name, x in (("pointer", pointer), ("count", count), ("skipped", skipped)):
        if x is None and name == "skipped":
            continue
        if not isinstance(x, Tensor) or x.dtype != torch.int64 or not _dense(x):
            refuse(TypeError, op, name, "a dense int64 tensor of one element", x)
        if x.numel() != 1:
            refuse(ValueError, op, name, "one element", x)
        tensors.append((name, x))
    for name, x in tensors:
        if x.device != keys.device:
            refuse(ValueError, op, name, f"the bank's device {keys.device}", x)
    for name, x in (("keys", keys), ("values", values)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            refuse(ValueError, op, name, "a tensor that wants no gradient: it is written in place", x)
        if x is not None and any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True)):
            refuse(ValueError, op, name, "rows with memory of their own: they are written in place", x)
    written = [("keys", keys), ("values", values), ("pointer", pointer), ("count", count), ("skipped", skipped)]
    for i, (name, x) in enumerate(written):
        if x is not None and any(x is y for _, y in written[:i]):
            refuse(ValueError, op, name, "a tensor of its own: it is written in place", x)
    if not isinstance(on_nonfinite, str) or on_nonfinite not in NONFINITE:
        kind = ValueError if isinstance(on_nonfinite, str) else TypeError
        refuse(kind, op, "on_nonfinite", f"one of {', '.join(map(repr, NONFINITE))}", on_nonfinite)
    features, rows = features.detach(), None if rows is None else rows.detach()
    if on_nonfinite == "raise":
        for name, x, bank in (("features", features, keys), ("rows", rows, values)):
            if x is not None and not bool(x.to(bank.dtype).isfinite().all()):
                refuse(ValueError, op, name, "finite rows, because on_nonfinite='raise'", Said("NaN or infinity"))
    torch.ops.hivilt.bank_push_(keys, pointer, count, values, skipped, features, rows, on_nonfinite == "skip")
    return keys


def _push(keys, pointer, count, values, skipped, features, rows, skip: bool) -> None:
    """Without a branch on data: row j of the rows that stay goes to slot pointer + j, and as many slots as rows were
    left out are written with what they hold."""
    M, B = keys.shape[0], features.shape[0]
    if B == 0:
        return
    features, rows = features.to(keys.dtype), None if rows is None else rows.to(values.dtype)
    stays = torch.ones(B, dtype=torch.bool, device=features.device)
    if skip:
        stays = features.isfinite().all(1)
        stays = stays if rows is None else stays & rows.isfinite().all(1)
    number = stays.sum()
    order = (~stays).to(torch.uint8).argsort(stable=True)  # those that stay first, in their order
    rank = torch.arange(min(B, M), device=features.device) + (number - M).clamp(min=0)
    source, is_new = order[rank.clamp(max=B - 1)], rank < number
    slots = (pointer.reshape(()) + rank) % M
    for bank, new in ((keys, features), (values, rows)):
        if bank is not None:
            bank[slots] = torch.where(is_new[:, None], new[source], bank[slots])
    pointer.copy_((pointer + number) % M)
    count.copy_((count + number).clamp(max=M))
    if skipped is not None:
        skipped.add_(B - number)


_library.LIBRARY.define(
    "bank_push_(Tensor(a!) keys, Tensor(b!) pointer, Tensor(c!) count, Tensor(d!)? values, Tensor(e!)? skipped, "
    "Tensor features, Tensor? rows, bool skip) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
_library.LIBRARY.impl("bank_push_", _push, "CompositeExplicitAutograd")
torch.library.register_fake("hivilt::bank_push_", lambda *args: None, lib=_library.LIBRARY)


# From public arguments to those of an operator. Each returns (operator arguments, nothing else).


def _bind_bank_retrieval(query, keys, topk, values=None, scale=1.0, count=None, mask=None, exclude=None, shadow=None,
                         precision="exact", backend=None):  # fmt: skip
    op = "bank_retrieval"
    query, keys, values, factor, scale, count, mask, exclude = _check_bank(
        op, query, keys, values, scale, count, mask, exclude
    )
    topk = check_topk(op, topk)
    if max(1, query.shape[0]) * topk > INT32_MAX:
        refuse(ValueError, op, "topk", "fewer than 2^31 rows in all", topk)
    if not isinstance(precision, str) or precision not in PRECISIONS:
        kind = ValueError if isinstance(precision, str) else TypeError
        refuse(kind, op, "precision", f"one of {', '.join(map(repr, PRECISIONS))}", precision)
    _backends.check_name(backend, f"{op}: backend")
    if shadow is not None:
        check_shadow(op, shadow, keys)
        shadow = shadow if query.shape[0] <= SHADOW_QUERIES else None
    return (query, keys, values, topk, scale, factor, count, mask, exclude, shadow, precision, False), None


def _check_bank(op, query, keys, values, scale, count, mask, exclude):
    """The arguments as operators take them: scale as (factor, tensor or None), count as an int64 tensor of no
    dimensions, exclude as int64 [B]."""
    check_tensor(op, "query", query, 2, "(B, C)")
    check_tensor(op, "keys", keys, 2, "(M, C)")
    B, C = query.shape
    M = keys.shape[0]
    if keys.shape[1] != C:
        refuse(ValueError, op, "keys", f"shape (M, {C}) to go with query {tuple(query.shape)}", keys)
    named = [("keys", keys)]
    if values is not None:
        check_tensor(op, "values", values, 2, "(M, E)")
        if values.shape[0] != M:
            refuse(ValueError, op, "values", f"shape ({M}, E) to go with keys {tuple(keys.shape)}", values)
        named.append(("values", values))
    for name, x in named:
        if (x.dtype == torch.float64) != (query.dtype == torch.float64):
            refuse(TypeError, op, name, "float64 exactly when query is float64", x)
        if x.device != query.device:
            refuse(ValueError, op, name, f"query's device {query.device}", x)
    if M > INT32_MAX:
        refuse(ValueError, op, "keys", "fewer than 2^31 rows", keys)
    factor = 1.0
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            refuse(TypeError, op, "scale", "a floating point tensor", scale)
        if not _dense(scale) or scale.numel() != 1 or scale.device != query.device:
            refuse(ValueError, op, "scale", f"a number or a dense tensor of one element on {query.device}", scale)
        scale = scale.to(torch.float64 if query.dtype == torch.float64 else torch.float32).reshape(())
    else:
        factor, scale = check_number(op, "scale", scale), None
    if count is not None:
        count = _check_integers(op, "count", count, query, 1).reshape(())
    if mask is not None:
        if not isinstance(mask, Tensor) or not _dense(mask):
            refuse(TypeError, op, "mask", "a dense bool tensor (M,) or (B, M)", mask)
        if mask.dtype != torch.bool:
            refuse(TypeError, op, "mask", "bool", mask)
        fits = (
            mask.shape[-1] == M and (mask.dim() == 1 or (mask.dim() == 2 and mask.shape[0] == B))
            if mask.dim()
            else False
        )
        if not fits:
            refuse(ValueError, op, "mask", f"shape ({M},) or ({B}, {M})", mask)
        if mask.device != query.device:
            refuse(ValueError, op, "mask", f"query's device {query.device}", mask)
    if exclude is not None:
        number, exclude = exclude, _check_integers(op, "exclude", exclude, query, B)
        if not isinstance(number, Tensor):
            inside = -1 <= number < M
        else:  # elsewhere looking at the numbers would wait for the device
            inside = not (exclude.is_cpu and eager(query)) or bool(((exclude >= -1) & (exclude < M)).all())
        if not inside:
            refuse(ValueError, op, "exclude", f"values from -1 to {M - 1}", Said("one outside"))
    return query, keys, values, factor, scale, count, mask, exclude


def _dense(x: Tensor) -> bool:
    return not x.is_nested and x.layout is torch.strided


def _check_integers(op: str, name: str, x: Any, query: Tensor, size: int) -> Tensor:
    """int64 [size] on query's device."""
    if not isinstance(x, Tensor):
        x = check_index(op, name, x, "an int or an integer tensor")
        if not -(2**63) <= x < 2**63:
            refuse(ValueError, op, name, "a number that int64 can hold", x)
        return torch.full((size,), x, dtype=torch.int64, device=query.device)
    if x.dtype not in (torch.int32, torch.int64) or not _dense(x):
        refuse(TypeError, op, name, "dense int32 or int64", x)
    if x.device != query.device:
        refuse(ValueError, op, name, f"query's device {query.device}", x)
    if x.numel() != size or x.dim() > 1:
        refuse(ValueError, op, name, f"{size} element{'' if size == 1 else 's'}", x)
    return x.to(torch.int64).reshape(size)


_backends.explainable(BANK_RETRIEVAL, bank_retrieval, _bind_bank_retrieval)
