"""Interpolation of tokens on the GPU: tables per axis, how kernels read through them, and the kernels that only
interpolate.

An axis is None where the size stays, else (starts int32 [out], weights fp32 [out, T], T): output o reads the inputs
starts[o] + t with weights[o, t], and a weight of 0 reads nothing, so that NaN stays where it is.  The transposed axis
is the same sparse matrix read by columns, so that gradients are gathered, in one fixed order, with exactly the weights
of the forward pass.

A source is (pointer, strides of batch and token, tokens before its grid, three axes without their T, height, width,
three times T): images have the axis None for their depth, sequences for depth and height; T is 1 where there is none.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import narrow, wide

Axis = tuple[Tensor, Tensor, int]


# Tables, on the host.


@functools.lru_cache(maxsize=1024)
def axis(size: int, out_size: int, mode: str, align_corners: bool, transposed: bool, device: str) -> Axis | None:
    """How an axis of ``out_size`` reads one of ``size``; transposed: how that of ``size`` reads what was put out."""
    if size == out_size:
        return None
    outputs, inputs, weights = _taps(size, out_size, mode, align_corners)
    rows, cols, count = (inputs, outputs, size) if transposed else (outputs, inputs, out_size)
    some = weights != 0.0
    rows, cols, weights = rows[some], cols[some], weights[some]
    # What one row reads lies side by side: positions grow with the output.
    none = size + out_size
    starts = torch.full((count,), none, device="cpu").scatter_reduce_(0, rows, cols, "amin")
    starts = torch.where(starts == none, 0, starts)
    width = int((cols - starts[rows]).max()) + 1
    table = torch.zeros(count, width, device="cpu").index_put_((rows, cols - starts[rows]), weights, accumulate=True)
    return starts.int().to(device), table.to(device), width


def _taps(size: int, out_size: int, mode: str, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(output, input, weight) of every tap, in the fp32 arithmetic of torch.nn.functional.interpolate."""
    o = torch.arange(out_size, device="cpu")
    if mode == "area":
        start, end = o * size // out_size, ((o + 1) * size + out_size - 1) // out_size
        outputs = o.repeat_interleave(end - start)
        inputs = torch.cat(
            [torch.arange(a, b, device="cpu") for a, b in zip(start.tolist(), end.tolist(), strict=True)]
        )
        return outputs, inputs, torch.ones((), dtype=torch.float32, device="cpu") / (end - start)[outputs]
    if mode == "nearest":
        inputs = (o.float() * _ratio(size, out_size)).floor().long().clamp(max=size - 1)
        return o, inputs, torch.ones(out_size, dtype=torch.float32, device="cpu")
    if align_corners:
        x = o.float() * _ratio(size - 1, out_size - 1)
    else:
        x = ((o.float() + 0.5) * _ratio(size, out_size) - 0.5).clamp(min=0.0)
    i = x.long().clamp(max=size - 1)
    part = (x - i).clamp(0.0, 1.0)
    return torch.cat([o, o]), torch.cat([i, (i + 1).clamp(max=size - 1)]), torch.cat([1.0 - part, part])


def _ratio(a: int, b: int) -> Tensor:
    return torch.tensor(a / b if b > 0 else 0.0, dtype=torch.float32, device="cpu")


def axes(grid, out_grid, mode: str, align_corners: bool, transposed: bool, device: torch.device) -> list[Axis | None]:
    """Three axes of grids of up to three sizes."""
    found = [
        axis(size, out_size, mode, align_corners, transposed, str(device))
        for size, out_size in zip(grid, out_grid, strict=True)
    ]
    return [None] * (3 - len(found)) + found


def taps_of(found: list[Axis | None]) -> int:
    """How many tokens an output reads, at most."""
    count = 1
    for one in found:
        count *= 1 if one is None else one[2]
    return count


# Reading through them, in kernels.


@triton.jit
def axis_tap(axis, taps, at, t):
    """(index, weight) of tap t of positions ``at``."""
    if axis is None:
        return at, tl.full(at.shape, 1.0, tl.float32)
    else:
        return tl.load(axis[0] + at) + t, tl.load(axis[1] + at * taps + t)


@triton.jit
def place(rows, prefix, cells, height, width):
    """(z, y, x) of output tokens; tokens before and behind the grid get a place inside it."""
    cell = tl.minimum(tl.maximum(rows - prefix, 0), cells - 1)
    return cell // (width * height), cell // width % height, cell % width


@triton.jit
def source_taps(source):
    return source[9] * source[10] * source[11]


@triton.jit
def source_tap(source, rows, z, y, x, t, prefix, PREFIX: tl.constexpr):
    """(token, weight) that outputs read as tap t.  A token before the grid reads its like, or nothing."""
    down, across = source[10], source[11]
    z, in_depth = axis_tap(source[4], source[9], z, t // (across * down))
    y, in_height = axis_tap(source[5], down, y, t // across % down)
    x, in_width = axis_tap(source[6], across, x, t % across)
    token = (z * source[7] + y) * source[8] + x + source[3]
    weight = in_depth * in_height * in_width
    if PREFIX:
        before = rows < prefix
        token = tl.where(before, rows, token)
        weight = tl.where(before, tl.where((source[3] > 0) & (t == 0), 1.0, 0.0), weight)
    return token, weight


@triton.jit
def gathered(
    source, base, rows, inside, z, y, x, prefix, cols, cols_ok, PREFIX: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """fp32 [R, C]: columns of the interpolated source; base points to its sample.  A loop of run time: written out,
    the neighbours would keep the registers of all their addresses."""
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for t in range(source_taps(source)):
        token, weight = source_tap(source, rows, z, y, x, t, prefix, PREFIX)
        ok = (inside & (weight != 0.0))[:, None] & cols_ok[None, :]
        at = token.to(tl.int64)[:, None] * source[2] + cols[None, :]
        total += weight[:, None] * wide(tl.load(base + at, mask=ok, other=0.0))
    return total


@triton.jit
def _interpolate_kernel(
    source, base, scale, factor, out, count, prefix, cells, height, width, channels, blocks, col_blocks,
    PREFIX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = base + factor * scale * U source.  base: None, out: (pointer, strides of batch, token)."""
    task = tl.program_id(0)
    b = (task // (blocks * col_blocks)).to(tl.int64)
    rows = task // col_blocks % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = task % col_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    z, y, x = place(rows, prefix, cells, height, width)
    total = gathered(
        source, source[0] + b * source[1], rows, rows < count, z, y, x, prefix, cols, cols < channels, PREFIX, BLOCK_R,
        BLOCK_C,
    )  # fmt: skip
    if scale is not None:
        factor = factor * tl.load(scale)
    total *= factor
    ok = (rows < count)[:, None] & (cols < channels)[None, :]
    if base is not None:
        at = base[0] + b * base[1] + rows.to(tl.int64)[:, None] * base[2] + cols[None, :]
        total = wide(tl.load(at, mask=ok, other=0.0)) + total
    to = out[0] + b * out[1] + rows.to(tl.int64)[:, None] * out[2] + cols[None, :]
    tl.store(to, narrow(total, out[0].dtype.element_ty), mask=ok)


@triton.jit
def _interpolate_dot_kernel(
    source, grad, partial, factor, count, cells, height, width, channels, blocks, col_blocks, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[program] = factor * sum(grad * U source) over its tile."""
    task = tl.program_id(0)
    b = (task // (blocks * col_blocks)).to(tl.int64)
    rows = task // col_blocks % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = task % col_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    z, y, x = place(rows, 0, cells, height, width)
    inside, cols_ok = rows < count, cols < channels
    fine = gathered(source, source[0] + b * source[1], rows, inside, z, y, x, 0, cols, cols_ok, False, BLOCK_R, BLOCK_C)
    at = grad[0] + b * grad[1] + rows.to(tl.int64)[:, None] * grad[2] + cols[None, :]
    g = wide(tl.load(at, mask=inside[:, None] & cols_ok[None, :], other=0.0))
    tl.store(partial + task, factor * tl.sum(g * fine))
