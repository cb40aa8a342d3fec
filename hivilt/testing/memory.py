"""Hostile memory: every layout a view can have, data that touches a protected page, poison where nobody may look."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .oracle import INF, NAN


def _junk(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory around a view: NaN, True or the largest integer, so that reading it shows."""
    filler = NAN if like.dtype.is_floating_point else True if like.dtype == torch.bool else torch.iinfo(like.dtype).max
    return torch.full(shape, filler, dtype=like.dtype, device=like.device)


def _place(t: Tensor, step: tuple[int, ...], start: tuple[int, ...]) -> Tensor:
    shape = tuple(s + n * k + 3 * (k > 1 or s > 0) for n, k, s in zip(t.shape, step, start, strict=True))
    window = tuple(slice(s, s + n * k, k) for n, k, s in zip(t.shape, step, start, strict=True))
    view = _junk(shape, t)[window]
    view.copy_(t)
    return view


def _along(t: Tensor, dim: int, step: int, start: int) -> Tensor:
    if t.dim() < -dim or t.dim() <= dim:
        return t.clone()
    dim %= t.dim()
    here = [i == dim for i in range(t.dim())]
    return _place(t, tuple(step if h else 1 for h in here), tuple(start if h else 0 for h in here))


def _offset(t: Tensor, count: int) -> Tensor:
    view = _junk((t.numel() + 16,), t)[count : count + t.numel()].view(t.shape)
    return view.copy_(t)


def _tail(t: Tensor) -> Tensor:
    view = _junk((t.numel() + 37,), t)[37:].view(t.shape)
    return view.copy_(t)


def _swapped(t: Tensor, a: int, b: int) -> Tensor:
    return t.transpose(a, b).contiguous().transpose(a, b)


def _odd_ones(t: Tensor) -> Tensor:
    t = t.contiguous()
    strides = [7 + 2 * i if n == 1 else s for i, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True))]
    return t.as_strided(t.shape, strides)


def _expanded(t: Tensor, dim: int) -> Tensor:
    return t.narrow(dim, 0, min(1, t.shape[dim])).clone().expand(t.shape)


def _overlapping(t: Tensor) -> Tensor:
    if t.dim() < 2 or not t.numel():
        return t.clone()
    rows, width = t.shape[-2:]
    base = t.reshape(-1).repeat(2)[: (t.numel() // (rows * width) - 1) + rows + width].clone()
    strides = [math.prod(t.shape[i + 1 : -2]) for i in range(t.dim() - 2)] + [1, 1]
    return base.as_strided(t.shape, strides)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "permuted": lambda t: _swapped(t, 1, 2) if t.dim() > 2 else _swapped(t, 0, -1),
    "column_major": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "last_two_swapped": lambda t: _swapped(t, -1, -2) if t.dim() > 1 else t.clone(),
    "step2_last": lambda t: _along(t, -1, 2, 0),
    "step2_row": lambda t: _along(t, -2, 2, 0),
    "step2_batch": lambda t: _along(t, 0, 2, 0),
    "step3_head": lambda t: _along(t, 1, 3, 1),
    "slice_last": lambda t: _along(t, -1, 1, 3),
    "slice_row": lambda t: _along(t, -2, 1, 2),
    "slice_batch": lambda t: _along(t, 0, 1, 1),
    **{f"offset{n}": (lambda t, n=n: _offset(t, n)) for n in range(1, 16)},
    "tail": _tail,
    "odd_ones": _odd_ones,
    "expanded_batch": lambda t: _expanded(t, 0),
    "expanded_head": lambda t: _expanded(t, min(1, t.dim() - 1)),
    "expanded_row": lambda t: _expanded(t, max(-2, -t.dim())),
    "expanded_last": lambda t: _expanded(t, -1),
    "expanded_all": lambda t: t.reshape(-1)[:1].clone().as_strided(t.shape, [0] * t.dim()) if t.numel() else t.clone(),
    "overlapping": _overlapping,
}


def relayout(t: Tensor, name: str) -> Tensor:
    """A tensor of the same shape in the named layout; the same values, except that expanded ones repeat theirs."""
    return LAYOUTS[name](t.detach()) if t.numel() and t.dim() else t.detach().clone()


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All layouts of a tensor; compare each result with that of ``view.clone(memory_format=contiguous_format)``."""
    return ((name, relayout(t, name)) for name in LAYOUTS)


def guarded(t: Tensor, at: str = "end") -> Tensor:
    """A contiguous copy whose data ends (or, ``at="start"``, starts) at a page that faults when touched."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    if not size:
        return t.detach().clone()
    span = -(-size // page) * page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    base = libc.mmap(None, span + page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise MemoryError("guarded: mmap failed")
    if libc.mprotect(base + (span if at == "end" else 0), page, 0):
        raise OSError(ctypes.get_errno(), "guarded: mprotect failed")
    buffer = (ctypes.c_char * size).from_address(base + (span - size if at == "end" else page))
    weakref.finalize(buffer, libc.munmap, base, span + page)
    return torch.frombuffer(buffer, dtype=t.dtype).view(t.shape).copy_(t)


def poison(inputs: dict, bad: tuple[float, ...] = (NAN, INF, -INF)) -> dict:
    """The same call with NaN and infinities in every query, key and value that no allowed pair touches."""
    x = {name: t.clone() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    B, H, Q, _ = x["query"].shape
    G, N = x["key"].shape[1:3]
    allowed = torch.ones(B, H, Q, N, dtype=torch.bool, device=x["query"].device)
    mask = x.get("attn_mask")
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -INF)
    if x.get("key_mask") is not None:
        allowed = allowed & x["key_mask"][:, None, None]
    if x.get("query_mask") is not None:
        allowed = allowed & x["query_mask"][:, None, :, None]
    idle_query, idle_key = ~allowed.any(3), ~allowed.unflatten(1, (G, H // G)).any(2).any(2)
    idle = {"query": idle_query, "key": idle_key, "value": idle_key}
    idle |= {"select_query": idle_query.all(1), "select_key": idle_key.all(1)}
    for name, rows in idle.items():
        if x.get(name) is not None:
            filler = torch.tensor(bad, dtype=x[name].dtype, device=x[name].device)
            filler = filler[torch.arange(x[name].shape[-1], device=filler.device) % len(bad)]
            x[name] = torch.where(rows[..., None], filler, x[name])
    return x
