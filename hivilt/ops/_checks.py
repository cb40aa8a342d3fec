"""Argument checks of the operations: every refusal names the operation, the argument, what was expected and
what came; shapes and dtypes are printed, never data.  The good path compares tuples and returns."""

from __future__ import annotations

import math
import operator
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
AXES = {"keys": 0, "queries": 1}
INT32_MAX = 2**31 - 1


def refuse(kind: type[Exception], op: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise kind(f"{op}: {argument}: expected {expected}; got {describe(got)}")


def describe(x: Any) -> str:
    """A short text about an argument, without its data."""
    if isinstance(x, Tensor):
        if x.is_nested:
            return f"a nested {str(x.dtype)[6:]} tensor"
        layout = "" if x.layout is torch.strided else f"{str(x.layout)[6:]} "
        return f"a {layout}{str(x.dtype)[6:]} tensor of shape {tuple(x.shape)} on {x.device}"
    if isinstance(x, str | bool | int | float | complex | torch.SymInt | torch.SymFloat) or x is None:
        text = repr(x)
        return text if len(text) < 60 else text[:57] + "..."
    return f"a {type(x).__name__}"


class Said(str):
    """Text that ``describe`` would put in quotes, passed through as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def check_tensor(
    op: str, name: str, x: Any, rank: int, form: str, like: Tensor | None = None, like_name: str = "query"
) -> None:
    """A dense tensor of ``rank`` dimensions, of the dtype and on the device of ``like`` (else: any floating dtype)."""
    if not isinstance(x, Tensor):
        refuse(TypeError, op, name, f"a tensor {form}", x)
    if x.is_nested or x.layout is not torch.strided:
        refuse(TypeError, op, name, f"a dense (strided) tensor {form}", x)
    if x.dtype not in FLOATS:
        refuse(TypeError, op, name, "float32, bfloat16, float16 or float64", x)
    if x.dim() != rank:
        refuse(ValueError, op, name, f"{rank} dimensions {form}", x)
    if like is not None and x.dtype != like.dtype:
        refuse(TypeError, op, name, f"{like_name}'s dtype {str(like.dtype)[6:]}", x)
    if like is not None and x.device != like.device:
        refuse(ValueError, op, name, f"{like_name}'s device {like.device}", x)


def check_vector(op: str, name: str, x: Any, size: int, like: Tensor, dtypes: tuple) -> None:
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided:
        refuse(TypeError, op, name, f"a dense tensor of shape ({size},)", x)
    if x.dtype not in dtypes:
        refuse(TypeError, op, name, " or ".join(dict.fromkeys(str(d)[6:] for d in dtypes)), x)
    if tuple(x.shape) != (size,):
        refuse(ValueError, op, name, f"shape ({size},)", x)
    if x.device != like.device:
        refuse(ValueError, op, name, f"the features' device {like.device}", x)


def check_qkv(op: str, query: Any, key: Any, value: Any) -> tuple[int, int, int, int, int]:
    """(B, H, Q, N, D) of [B, H, Q, D], [B, G, N, D], [B, G, N, E]; ``value`` may be ``key`` itself to be left out."""
    try:  # everything at once for the common case; the lines below say what is wrong
        B, H, Q, D = query.shape
        b, G, N, d = key.shape
        batch, groups, tokens, _ = value.shape
        dtype, device = query.dtype, query.device
        if (
            b == B == batch and d == D and G == groups and N == tokens and (G == H or (G != 0 and H % G == 0))
            and dtype in FLOATS and key.dtype == dtype == value.dtype and key.device == device == value.device
            and query.layout is key.layout is value.layout is torch.strided
        ):  # fmt: skip
            return B, H, Q, N, D
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass
    check_tensor(op, "query", query, 4, "(B, H, Q, D)")
    check_tensor(op, "key", key, 4, "(B, G, N, D)", query)
    B, H, Q, D = query.shape
    b, G, N, d = key.shape
    if b != B or d != D:
        refuse(ValueError, op, "key", f"shape ({B}, G, N, {D}) to go with query {tuple(query.shape)}", key)
    if G != H and (G == 0 or H % G):
        refuse(ValueError, op, "key", f"a number of heads that divides query's {H}", key)
    if value is not key:
        check_tensor(op, "value", value, 4, "(B, G, N, E)", query)
        if value.shape[:3] != key.shape[:3]:
            refuse(ValueError, op, "value", f"shape ({B}, {G}, {N}, E) to go with key {tuple(key.shape)}", value)
    return B, H, Q, N, D


def check_packed(op: str, query: Any, key: Any, value: Any) -> None:
    """query [Tq, H, D], key [Tk, G, D], value [Tk, G, E]."""
    check_tensor(op, "query", query, 3, "(Tq, H, D)")
    check_tensor(op, "key", key, 3, "(Tk, G, D)", query)
    check_tensor(op, "value", value, 3, "(Tk, G, E)", query)
    H, D = query.shape[1:]
    G = key.shape[1]
    if key.shape[2] != D:
        refuse(ValueError, op, "key", f"shape (Tk, G, {D}) to go with query {tuple(query.shape)}", key)
    if G != H and (G == 0 or H % G):
        refuse(ValueError, op, "key", f"a number of heads that divides query's {H}", key)
    if value.shape[:2] != key.shape[:2]:
        refuse(ValueError, op, "value", f"shape ({key.shape[0]}, {G}, E) to go with key {tuple(key.shape)}", value)


def check_index(op: str, name: str, x: Any, expected: str = "an int") -> int:
    """Anything that counts as one whole number; no bool, no tensor."""
    if isinstance(x, int | torch.SymInt) and not isinstance(x, bool):  # a traced number has no attributes to ask for
        return x
    if isinstance(x, bool | Tensor) or not hasattr(x, "__index__"):
        refuse(TypeError, op, name, expected, x)
    try:
        return operator.index(x)
    except TypeError:  # an array of several
        refuse(TypeError, op, name, expected, x)


def check_topk(op: str, topk: Any) -> int:
    if isinstance(topk, bool) or not isinstance(topk, int | torch.SymInt):
        if isinstance(topk, bool | Tensor) or not hasattr(topk, "__index__"):
            refuse(TypeError, op, "topk", "an int of at least 1" + (" or None" if "select" not in op else ""), topk)
        topk = operator.index(topk)  # of numpy
    if topk <= 0:
        refuse(ValueError, op, "topk", "at least 1", topk)
    return topk


def check_axis(op: str, axis: Any) -> int:
    if not isinstance(axis, str):
        refuse(TypeError, op, "axis", "'keys' or 'queries'", axis)
    if axis not in AXES:
        refuse(ValueError, op, "axis", "'keys' or 'queries'", axis)
    return AXES[axis]


def check_number(op: str, name: str, x: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite real number in [low, high]; no bool, no tensor."""
    if isinstance(x, bool) or not isinstance(x, int | float | torch.SymInt | torch.SymFloat):
        if isinstance(x, bool | Tensor | str | complex) or not hasattr(x, "__float__"):
            refuse(TypeError, op, name, "a real number", x)
    try:
        x = float(x)
    except OverflowError:
        refuse(ValueError, op, name, "a number that a float can hold", x)
    if not -math.inf < x < math.inf:  # a comparison, which a traced number knows too
        refuse(ValueError, op, name, "a finite number", x)
    if not low <= x <= high:
        refuse(ValueError, op, name, f"a number from {low:g} to {high:g}", x)
    return x


def check_flag(op: str, name: str, x: Any) -> None:
    if not isinstance(x, bool):
        refuse(TypeError, op, name, "a bool", x)


def check_mask(op: str, mask: Any, query: Tensor, keys: int, shared: bool) -> Tensor:
    """The mask with four dimensions, each 1 or full."""
    if not isinstance(mask, Tensor):
        refuse(TypeError, op, "attn_mask", "a bool or floating point tensor", mask)
    if mask.is_nested or mask.layout is not torch.strided:
        refuse(TypeError, op, "attn_mask", "a dense (strided) tensor", mask)
    dtype = query.dtype
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        wanted = " or ".join(dict.fromkeys(("bool", "float32", str(dtype)[6:])))
        refuse(TypeError, op, "attn_mask", wanted, mask)
    if mask.device != query.device:
        refuse(ValueError, op, "attn_mask", f"query's device {query.device}", mask)
    B, H, Q, _ = query.shape
    full = (B, H, Q, keys)
    if mask.dim() > 4 or any(n != 1 and n != m for n, m in zip(mask.shape[::-1], full[::-1])):  # noqa: B905
        refuse(ValueError, op, "attn_mask", f"a shape that broadcasts to (B, H, Q, N) = {full}", mask)
    if mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    if shared and mask.shape[1] != 1:
        refuse(ValueError, op, "attn_mask", "no head axis (or one of size 1) beside select_query", mask)
    if mask.is_floating_point() and dtype == torch.float64:
        mask = mask.double()
    return mask


def check_token_mask(op: str, name: str, mask: Any, query: Tensor, tokens: int, form: str) -> None:
    if not isinstance(mask, Tensor):
        refuse(TypeError, op, name, f"a bool tensor {form}", mask)
    if mask.is_nested or mask.layout is not torch.strided or mask.dtype != torch.bool:
        refuse(TypeError, op, name, f"a dense bool tensor {form}", mask)
    if mask.device != query.device:
        refuse(ValueError, op, name, f"query's device {query.device}", mask)
    if tuple(mask.shape) != (query.shape[0], tokens):
        refuse(ValueError, op, name, f"shape {form} = {(query.shape[0], tokens)}", mask)


def check_selection_source(
    op: str, query: Tensor, select_query: Any, select_key: Any, batch: tuple[int, ...], queries: int, keys: int
) -> tuple[Tensor, Tensor]:
    """select_query [*batch, Q, C] and select_key [*batch, N, C], detached: to autograd the selection is a constant."""
    if select_query is None or select_key is None:
        missing, given = ("select_query", "select_key") if select_query is None else ("select_key", "select_query")
        refuse(ValueError, op, missing, f"a tensor, because {given} is given", None)
    rank = len(batch) + 2
    form = "(B, {}, C)" if batch else "({}, C)"
    check_tensor(op, "select_query", select_query, rank, form.format("Q" if batch else "Tq"))
    check_tensor(op, "select_key", select_key, rank, form.format("N" if batch else "Tk"))
    C = select_query.shape[-1]
    for name, x, tokens in (("select_query", select_query, queries), ("select_key", select_key, keys)):
        if x.device != query.device:
            refuse(ValueError, op, name, f"query's device {query.device}", x)
        if (x.dtype == torch.float64) != (query.dtype == torch.float64):
            refuse(TypeError, op, name, "float64 exactly when query is float64", x)
        if x.dtype != select_query.dtype:
            refuse(TypeError, op, name, f"select_query's dtype {str(select_query.dtype)[6:]}", x)
        if tuple(x.shape) != (*batch, tokens, C):
            refuse(ValueError, op, name, f"shape {(*batch, tokens, C)}", x)
    return select_query.detach(), select_key.detach()


def check_indices(op: str, indices: Any, query: Tensor, rows: int) -> Tensor:
    """int32 [B, H|1, rows, K]; values are judged by the backend."""
    if not isinstance(indices, Tensor):
        refuse(TypeError, op, "indices", "an int32 or int64 tensor", indices)
    if indices.is_nested or indices.layout is not torch.strided or indices.dtype not in (torch.int32, torch.int64):
        refuse(TypeError, op, "indices", "a dense int32 or int64 tensor", indices)
    if indices.device != query.device:
        refuse(ValueError, op, "indices", f"query's device {query.device}", indices)
    B, H = query.shape[:2]
    if indices.dim() != 4 or indices.shape[0] != B or indices.shape[1] not in (1, H) or indices.shape[2] != rows:
        refuse(ValueError, op, "indices", f"shape ({B}, {H} or 1, {rows}, K)", indices)
    if indices.dtype == torch.int64:  # clamped, so that no wrapped value can pass for an index
        indices = indices.clamp(-2, INT32_MAX).to(torch.int32)
    return indices


def check_segments(op: str, name: str, cu_seqlens: Any, query: Tensor) -> Tensor:
    """cu_seqlens as an int32 or int64 CPU tensor [B + 1]."""
    if not isinstance(cu_seqlens, Tensor):
        refuse(TypeError, op, name, "an int32 or int64 tensor (B + 1)", cu_seqlens)
    if cu_seqlens.is_nested or cu_seqlens.layout is not torch.strided:
        refuse(TypeError, op, name, "a dense int32 or int64 tensor (B + 1)", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        refuse(TypeError, op, name, "int32 or int64", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        refuse(ValueError, op, name, "shape (B + 1,)", cu_seqlens)
    if cu_seqlens.device.type not in ("cpu", query.device.type):
        refuse(ValueError, op, name, f"device cpu or {query.device}", cu_seqlens)
    return cu_seqlens.cpu() if cu_seqlens.device.type == "cuda" else cu_seqlens


def check_offsets(op: str, name: str, cu_seqlens: Tensor, total: int, longest: int | None = None) -> list[int]:
    """The values of cu_seqlens: from 0, never falling, at most ``total``; no segment longer than ``longest``."""
    starts = cu_seqlens.tolist()
    if not starts or starts[0] != 0:
        refuse(ValueError, op, name, "a first offset of 0", Said(f"{starts[:1]}"))
    for b, (start, end) in enumerate(pairwise(starts)):
        if end < start:
            refuse(ValueError, op, name, "offsets that never fall", Said(f"{start} before {end} at position {b + 1}"))
        if longest is not None and end - start > longest:
            text = f"at least {end - start}, the length of segment {b} in {name}"
            refuse(ValueError, op, f"max_seqlen_{name[-1]}", text, longest)
    if starts[-1] > total:
        refuse(ValueError, op, name, f"a last offset of at most {total}, the number of tokens", starts[-1])
    return starts


def check_max_seqlen(op: str, name: str, x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt):
        if isinstance(x, bool | Tensor) or not hasattr(x, "__index__"):
            refuse(TypeError, op, name, "an int", x)
        x = operator.index(x)
    if x < 0:
        refuse(ValueError, op, name, "an int of at least 0", x)
    return x


def autocast(*tensors: Any):
    """Under autocast the tensors take its dtype, as those of a Linear do."""
    x = tensors[0]
    if not isinstance(x, Tensor):
        return tensors
    device = x.device.type
    if (device != "cpu" and not torch.amp.is_autocast_available(device)) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    wide = (torch.float64,)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in wide else t for t in tensors
    )
