"""How a kernel is started, and how tensors become its arguments.

Every launch goes through ``launch``: it starts the kernel, or, inside ``recording``, only writes down what would be
started, so that a machine without a GPU can compile exactly what ships (``hivilt.kernel_report``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
INTERPRETED = bool(triton.knobs.runtime.interpret)  # kernels run on the CPU, program after program


class Recorded(NamedTuple):
    """One launch that was written down instead of started."""

    kernel: Any
    programs: int
    args: tuple
    constants: dict[str, Any]
    warps: int
    stages: int


_recorded: list[Recorded] | None = None
_recorded_part: str | None = None


@contextlib.contextmanager
def recording(part: str) -> Iterator[list[Recorded]]:
    """Collects launches as on a GPU of the kind ``part`` ("sm_90", "gfx942", ...); nothing runs."""
    global _recorded, _recorded_part
    _recorded, _recorded_part = [], part
    try:
        yield _recorded
    finally:
        _recorded, _recorded_part = None, None


def launch(kernel: Any, programs: int, args: tuple, warps: int, stages: int, **constants: Any) -> None:
    """Starts ``programs`` programs on the device of the first tensor, on its current stream."""
    if _recorded is not None:
        _recorded.append(Recorded(kernel, programs, args, constants, warps, stages))
        return
    like = _first_tensor(args)
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[(programs,)](*args, num_warps=warps, num_stages=stages, **constants)
    else:
        kernel[(programs,)](*args, num_warps=warps, num_stages=stages, **constants)


def _first_tensor(args: tuple) -> Tensor:
    """Tuples of arguments begin with theirs."""
    for x in args:
        if isinstance(x, tuple) and x:
            x = x[0]
        if isinstance(x, Tensor):
            return x
    raise TypeError(f"a kernel's arguments: expected a tensor among them; got {args!r}")


@functools.cache
def _device_part(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def part_of(x: Tensor) -> tuple[str, int]:
    """(name of the GPU's architecture, multiprocessors) of the device of x; what the interpreter stands for on a
    CPU."""
    if _recorded_part is not None:
        return _recorded_part, 132
    return _device_part(x.device.index) if x.is_cuda else ("sm_90", 2)


# Tensors as arguments; what the tuples hold is said in ``tiles.py``.


def rows(x: Tensor) -> Tensor:
    """x itself where the elements of a row lie side by side, else a copy in which they do."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


# One question for all strides: a call asks for those of ten tensors and more before anything starts.


def side(x: Tensor, heads: int, cu_seqlens: Tensor | None = None) -> tuple:
    """[B, G, T, width] that ``heads`` heads read."""
    x = rows(x)
    steps, shape = x.stride(), x.shape
    return (x, steps[0], steps[1], steps[2], shape[2], heads // max(1, shape[1]), cu_seqlens)


def shared_side(x: Tensor, cu_seqlens: Tensor | None = None) -> tuple:
    """[B, T, width] that all heads share, as a side of one head."""
    return side(x[:, None], 1, cu_seqlens)


def strided(x: Tensor) -> tuple:
    """(pointer, strides of batch, head, token) of a result or gradient [B, H, T(, width)]."""
    steps = x.stride()
    return (x, steps[0], steps[1], steps[2])


def mask(x: Tensor | None, transposed: bool = False) -> tuple | None:
    """attn_mask [B|1, H|1, Q|1, N|1] against rows of queries, or transposed against rows of keys."""
    if x is None:
        return None
    steps = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    if transposed:
        steps[2], steps[3] = steps[3], steps[2]
    return (x.view(torch.uint8) if x.dtype == torch.bool else x, *steps)


def token_mask(x: Tensor | None) -> tuple | None:
    """key_mask or query_mask [B, T]."""
    return None if x is None else (x.view(torch.uint8), x.stride(0), x.stride(1))


def dropout(p: float) -> tuple[int, float]:
    """(first word that stays, factor of what stays)."""
    return int(p * 2.0**32), 1.0 / (1.0 - p) if p < 1.0 else 0.0
