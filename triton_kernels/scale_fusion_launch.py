"""Which kernels run a call of scale_fusion and of token interpolation: tensors in, tensors out.

forward    one kernel; before it a product for each scale that is projected at its own size.  A layer norm over more
           channels than a program holds goes through a buffer of float32
backward   gradient to the sum, then for each scale: that gradient gathered to the scale's own size (coarser scales), or
           the scale interpolated and its gradient gathered (finer ones), and two products
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from . import interpolation, products
from . import launch as launching
from . import scale_fusion as kernels
from .fusion_tiles import Tile, lookup, power

NORMS = {"none": 0, "layer": 1, "affine": 2}
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}
INTERPOLATE_FIRST = 128  # output channels up to which coarse scales are interpolated before they are projected
WHOLE_ROW = {torch.float32: 512, torch.bfloat16: 1024, torch.float16: 1024}  # channels that one program normalises
HELD_ROW = 1024  # channels whose layer norm one program differentiates
AXIS_BY_AXIS = 64  # tokens read per output from which each axis is interpolated by itself
SPLITS = 64  # of the tokens, at most, in a weight's gradient
PROGRAMS = 264  # that share the tokens, at most, in the sums for norm and bias


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _strided(x: Tensor) -> tuple:
    """(pointer, strides of batch, token)."""
    return (x, x.stride(0), x.stride(1))


def _source(x: Tensor, prefix: int, found: list, grid) -> tuple:
    sizes = (1, 1, *grid)
    # Triton 3.6 forgets a number 1 that lies two tuples deep: the axes hold tensors alone.
    axes = [None if axis is None else axis[:2] for axis in found]
    taps = [1 if axis is None else axis[2] for axis in found]
    return (x, x.stride(0), x.stride(1), prefix, *axes, sizes[-2], sizes[-1], *taps)


def _sizes(grid) -> tuple[int, int, int]:
    """(cells, height, width) of a grid of up to three sizes."""
    sizes = (1, 1, *grid)
    return prod(grid), sizes[-2], sizes[-1]


# Interpolation.


def interpolate_tokens(x, base, scale, factor, grid, out_grid, rank, mode, align_corners, transposed) -> Tensor:
    """Operator ``hivilt::interpolate_tokens`` without its backend argument."""
    pairs = [(grid[i : i + rank], out_grid[i : i + rank]) for i in range(0, len(grid), rank)]
    x = launching.rows(x)
    base = None if base is None else launching.rows(base)
    total = sum(prod(a if transposed else b) for a, b in pairs)
    out = torch.empty(x.shape[0], total, x.shape[2], dtype=x.dtype, device=x.device)
    read = written = 0
    for small, large in pairs:
        if transposed:
            small, large = large, small
        inputs, outputs = prod(small), prod(large)
        _interpolate(
            x[:, read : read + inputs], small, large, out[:, written : written + outputs], mode, align_corners,
            transposed, None if base is None else base[:, written : written + outputs], scale, factor,
        )  # fmt: skip
        read, written = read + inputs, written + outputs
    return out


def _interpolate(x, grid, out_grid, out, mode, align_corners, transposed, base=None, scale=None, factor=1.0, prefix=0,
                 own_prefix=0) -> None:  # fmt: skip
    """out = base + factor * scale * U x from ``grid`` to ``out_grid``, behind own_prefix and prefix tokens."""
    how = (mode, align_corners, transposed, x.device)
    found = _axes(grid, out_grid, *how)
    changing = [i for i, (a, b) in enumerate(zip(grid, out_grid, strict=True)) if a != b]
    if len(changing) > 1 and interpolation.taps_of(found) > AXIS_BY_AXIS:
        last = changing[-1]
        between = [*grid[:last], out_grid[last], *grid[last + 1 :]]
        buffer = x.new_empty(x.shape[0], own_prefix + prod(between), x.shape[2], dtype=torch.float32)
        _interpolate(x, grid, between, buffer, mode, align_corners, transposed, None, None, 1.0, own_prefix, own_prefix)
        x, grid = buffer, between
        found = _axes(grid, out_grid, *how)
        if len(changing) > 2:
            return _interpolate(x, grid, out_grid, out, mode, align_corners, transposed, base, scale, factor, prefix,
                                own_prefix)  # fmt: skip
    B, N, C = out.shape
    tile = lookup(x, "interpolate", C)
    blocks, col_blocks = _cdiv(N, tile.rows), _cdiv(C, tile.cols)
    if B * blocks * col_blocks:
        launching.launch(
            interpolation._interpolate_kernel, B * blocks * col_blocks,
            (_source(x, own_prefix, found, grid), None if base is None else _strided(base), scale, float(factor),
             _strided(out), N, prefix, *_sizes(out_grid), C, blocks, col_blocks),
            tile.warps, tile.stages, PREFIX=prefix > 0, BLOCK_R=tile.rows, BLOCK_C=tile.cols,
        )  # fmt: skip
    return None


def _axes(grid, out_grid, mode, align_corners, transposed, device) -> list:
    # The transposed table of an axis is that of the way there.
    there = (out_grid, grid) if transposed else (grid, out_grid)
    return interpolation.axes(*there, mode, align_corners, transposed, device)


def interpolate_tokens_dot(grad, x, factor, grid, out_grid, rank, mode, align_corners) -> Tensor:
    """Operator ``hivilt::interpolate_tokens_dot`` without its backend argument."""
    grad, x = launching.rows(grad), launching.rows(x)
    B, _, C = x.shape
    tile = lookup(x, "interpolate", C)
    col_blocks = _cdiv(C, tile.cols)
    pairs = [(grid[i : i + rank], out_grid[i : i + rank]) for i in range(0, len(grid), rank)]
    programs = [B * col_blocks * _cdiv(prod(b), tile.rows) for _, b in pairs]
    partial = torch.empty(sum(programs), dtype=torch.float32, device=x.device)
    read = written = first = 0
    for (small, large), count in zip(pairs, programs, strict=True):
        inputs, outputs = prod(small), prod(large)
        source = x[:, read : read + inputs]
        found = _axes(small, large, mode, align_corners, False, x.device)
        if count:
            launching.launch(
                interpolation._interpolate_dot_kernel, count,
                (_source(source, 0, found, small), _strided(grad[:, written : written + outputs]), partial[first:],
                 float(factor), outputs, *_sizes(large), C, _cdiv(outputs, tile.rows), col_blocks),
                tile.warps, tile.stages, BLOCK_R=tile.rows, BLOCK_C=tile.cols,
            )  # fmt: skip
        read, written, first = read + inputs, written + outputs, first + count
    return sum_partials(partial[:, None], torch.empty(1, dtype=torch.float32, device=x.device)).reshape(())


# Products and sums.


def sum_partials(partial: Tensor, out: Tensor) -> Tensor:
    """out = partial.sum(0) in one order; out may be a matrix with a stride between its rows."""
    parts = partial.shape[0]
    size, width = out.numel(), out.shape[-1]
    block_p, block_c = (512, 1) if size == 1 else (8, 128)
    if size:
        launching.launch(
            products._sum_partials_kernel, _cdiv(size, block_c),
            (partial, out, parts, size, width, out.stride(0) if out.dim() > 1 else width), 4, 1, BLOCK_P=block_p,
            BLOCK_C=block_c,
        )  # fmt: skip
    return out


def rows_product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out[b, n, j] = sum_k x[b, n, k] weight[k, j]."""
    B, N, C = x.shape
    result = out
    if B and x.stride(0) == N * x.stride(1) and out.stride(0) == N * out.stride(1):  # one long sample fills its tiles
        x, out, B, N = x.as_strided((1, B * N, C), (0, *x.stride()[1:])), out.reshape(1, B * N, -1), 1, B * N
    width = out.shape[2]
    tile = lookup(x, "rows_product", width)
    blocks, col_blocks = _cdiv(N, tile.rows), _cdiv(width, tile.cols)
    if B * blocks * col_blocks:
        launching.launch(
            products._rows_product_kernel, B * blocks * col_blocks,
            (_strided(x), (weight, *weight.stride()), _strided(out), N, C, width, blocks, col_blocks),
            tile.warps, tile.stages, BLOCK_R=tile.rows, BLOCK_C=tile.cols, BLOCK_K=tile.inner,
        )  # fmt: skip
    return result


def weight_gradient(grad: Tensor, x: Tensor, out: Tensor, token_mask: Tensor | None = None) -> None:
    """out[o, c] = sum over all tokens of grad[b, n, o] x[b, n, c]; out: rows at any stride."""
    B, N, O = grad.shape  # noqa: E741
    C = x.shape[2]
    tile = lookup(x, "weight_gradient", max(O, C))
    blocks, row_blocks, col_blocks = _cdiv(N, tile.inner), _cdiv(O, tile.rows), _cdiv(C, tile.cols)
    tiles = B * blocks
    if not tiles or not C:
        out.zero_()
        return
    per_split = _cdiv(tiles, min(tiles, SPLITS, max(1, 512 // (row_blocks * col_blocks))))
    splits = _cdiv(tiles, per_split)
    partial = out[None] if splits == 1 else torch.empty(splits, O, C, dtype=torch.float32, device=x.device)
    launching.launch(
        products._weight_gradient_kernel, splits * row_blocks * col_blocks,
        (_strided(grad), _strided(x), launching.token_mask(token_mask), _strided(partial), N, tiles, per_split, O, C,
         blocks, row_blocks, col_blocks),
        tile.warps, tile.stages, BLOCK_O=tile.rows, BLOCK_C=tile.cols, BLOCK_R=tile.inner,
    )  # fmt: skip
    if splits > 1:
        sum_partials(partial.view(splits, -1), out)


# Fusion.


def _dropout(p: float) -> tuple[int, float]:
    """(first 16-bit number that stays, factor of what stays)."""
    threshold = round(p * 65536)
    return threshold, 65536 / max(1, 65536 - threshold)


def _scales(features, grids, out_grid, prefix_tokens):
    """(tokens, own prefix tokens, grid, first column of the weight) of each scale with channels."""
    rank, column = len(out_grid), 0
    for s, x in enumerate(features):
        grid = grids[s * rank : (s + 1) * rank]
        if x.shape[2]:
            yield s, launching.rows(x), prefix_tokens if x.shape[1] == prefix_tokens + prod(grid) else 0, grid, column
        column += x.shape[2]


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def scale_fusion(features, weight, bias, norm_weight, norm_bias, seed, grids, out_grid, norm, eps, activation,
                 dropout_p, mode, align_corners, prefix_tokens, impl, save) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Operator ``hivilt::scale_fusion`` without its backend argument."""
    like = features[0]
    B, O, N = like.shape[0], weight.shape[0], prefix_tokens + prod(out_grid)  # noqa: E741
    out = torch.empty(B, N, O, dtype=like.dtype, device=like.device)
    linear = torch.empty_like(out) if save else like.new_empty(0)
    if not B:
        return out, linear
    interpolated, projected = [], []
    for _, x, own, grid, column in _scales(features, grids, out_grid, prefix_tokens):
        found = _axes(grid, out_grid, mode, align_corners, False, x.device)
        here = all(axis is None for axis in found)
        finer = x.shape[1] - own > N - prefix_tokens
        after = impl == "epilogue" or (impl == "auto" and not finer and O > INTERPOLATE_FIRST)
        if after and not here:
            # float16 might not hold what is only a part of the sum.
            dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
            own_size = torch.empty(B, x.shape[1], O, dtype=dtype, device=x.device)
            rows_product(x, weight[:, column : column + x.shape[2]].t(), own_size)
            projected.append(_source(own_size, own, found, grid))
        else:
            interpolated.append((_source(x, own, found, grid), x.shape[2], column))

    whole = NORMS[norm] == 1 and O <= WHOLE_ROW[like.dtype]
    buffered = NORMS[norm] == 1 and not whole
    tile, blocks_0, blocks_1 = _tile(like, O, whole)
    blocks, col_blocks = _cdiv(N, tile.rows), _cdiv(O, blocks_0 + blocks_1)
    # The rows that a program cannot normalise come out in float32, unless rounding them is asked for anyway.
    raw = torch.empty(B, N, O, dtype=torch.float32, device=like.device) if buffered else linear if save else None
    parameters = (_optional(norm_weight), _optional(norm_bias), seed, _dropout(dropout_p), float(eps))
    launching.launch(
        kernels._scale_fusion_kernel, B * blocks * col_blocks,
        ((weight, *weight.stride()), tuple(interpolated), tuple(projected), _optional(bias), *parameters,
         None if buffered else _strided(out), None if raw is None else _strided(raw), N, prefix_tokens,
         *_sizes(out_grid), blocks, col_blocks),
        tile.warps, tile.stages, INTERPOLATED=len(interpolated), PROJECTED=len(projected), WIDTH=O, NORM=NORMS[norm],
        ACTIVATION=ACTIVATIONS[activation], PREFIX=prefix_tokens > 0, BLOCK_R=tile.rows, BLOCK_K=tile.inner,
        BLOCK_0=blocks_0, BLOCK_1=blocks_1,
    )  # fmt: skip
    if buffered:
        tile = lookup(raw, "finish", O)
        blocks = _cdiv(N, tile.rows)
        launching.launch(
            kernels._finish_kernel, B * blocks, (_strided(raw), *parameters, _strided(out), N, blocks), tile.warps,
            tile.stages, WIDTH=O, NORM=NORMS[norm], ACTIVATION=ACTIVATIONS[activation], BLOCK_R=tile.rows,
            BLOCK_C=tile.cols,
        )  # fmt: skip
        if save:
            linear.copy_(raw)
    return out, linear


def _tile(x: Tensor, O: int, whole: bool) -> tuple[Tile, int, int]:  # noqa: E741
    """Tile sizes, and how a program's columns split into powers of two."""
    if not whole and O > 128:
        return lookup(x, "fusion", 128), 128, 0
    tile = lookup(x, "fusion", O)
    full = power(O)
    half = full // 2
    if half >= 32 and O <= half + half // 2:
        return tile, half, half // 2
    return tile, full, 0


def scale_fusion_backward(grad_out, features, weight, norm_weight, norm_bias, linear, seed, grids, out_grid, norm, eps,
                          activation, dropout_p, mode, align_corners, prefix_tokens, impl, features_grad,
                          parameters_grad):  # fmt: skip
    """Operator ``hivilt::scale_fusion_backward`` without its backend argument."""
    B, N, O = grad_out.shape  # noqa: E741
    of_features = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if features_grad else x.new_empty(0) for x in features
    ]
    of_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    of_norm = [None if x is None else torch.zeros(O, dtype=x.dtype, device=x.device) for x in (norm_weight, norm_bias)]
    of_bias = weight.new_zeros(O)
    if B:
        grad, sums = _finish_gradient(
            grad_out, linear, norm_weight, norm_bias, seed, norm, eps, activation, dropout_p, parameters_grad
        )
        if parameters_grad:
            of_bias = sums[0].to(weight.dtype)
            of_norm = [None if x is None else s.to(x.dtype) for x, s in zip(of_norm, sums[1:], strict=True)]
        for s, x, own, grid, column in _scales(features, grids, out_grid, prefix_tokens):
            columns = slice(column, column + x.shape[2])
            _scale_gradient(
                grad, x, weight[:, columns], of_features[s] if features_grad else None,
                of_weight[:, columns] if parameters_grad else None, own, prefix_tokens, grid, out_grid, mode,
                align_corners,
            )  # fmt: skip
    else:
        of_weight.zero_()
    if not parameters_grad:
        return of_features, *(weight.new_empty(0) for _ in range(4))
    of_norm = [weight.new_empty(0) if x is None else x for x in of_norm]
    return of_features, of_weight, of_bias, *of_norm


def _finish_gradient(grad_out, linear, norm_weight, norm_bias, seed, norm, eps, activation, dropout_p, summed):
    """(gradient to the sum [B, N, O], sums [3, O] of it, for the norm's weight, for the norm's bias, or None)."""
    B, N, O = grad_out.shape  # noqa: E741
    whole = O <= HELD_ROW
    layer = norm == "layer"
    grad_out = launching.rows(grad_out)
    tile = lookup(grad_out, "finish_gradient", O if layer and whole else 128)
    cols = power(O) if layer and whole else min(tile.cols, power(O))
    arguments = (
        _strided(grad_out), _strided(linear) if linear.dim() == 3 else None, _optional(norm_weight),
        _optional(norm_bias), seed, _dropout(dropout_p), float(eps),
    )  # fmt: skip
    constants = {"WIDTH": O, "NORM": NORMS[norm], "ACTIVATION": ACTIVATIONS[activation]}
    statistics = None
    if layer and not whole:
        statistics = torch.empty(B, N, 4, dtype=torch.float32, device=grad_out.device)
        step = lookup(statistics, "finish", O)
        blocks = _cdiv(N, step.rows)
        launching.launch(
            kernels._row_statistics_kernel, B * blocks, (*arguments, statistics, N, blocks), step.warps, step.stages,
            **constants, BLOCK_R=step.rows, BLOCK_C=step.cols,
        )  # fmt: skip
    blocks, col_blocks = _cdiv(N, tile.rows), _cdiv(O, cols)
    per_program = _cdiv(B * blocks, PROGRAMS)
    parts = _cdiv(B * blocks, per_program)
    grad = torch.empty(B, N, O, dtype=grad_out.dtype, device=grad_out.device)
    partial = torch.empty(parts, 3 * O, dtype=torch.float32, device=grad.device) if summed else None
    launching.launch(
        kernels._finish_gradient_kernel, parts * col_blocks,
        (*arguments, statistics, _strided(grad), partial, N, blocks, B * blocks, per_program, col_blocks),
        tile.warps, tile.stages, **constants, STATISTICS=0 if not layer else 1 if whole else 2, BLOCK_R=tile.rows,
        BLOCK_C=cols,
    )  # fmt: skip
    sums = None
    if summed:
        sums = sum_partials(partial, torch.empty(3 * O, dtype=torch.float32, device=grad.device)).view(3, O)
    return grad, sums


def _scale_gradient(grad, x, weight, of_x, of_weight, own, prefix, grid, out_grid, mode, align_corners) -> None:
    """Gradients of one scale; the projection's flops are spent on whichever of the two sizes is smaller."""
    B, N, O = grad.shape  # noqa: E741
    cells = x.shape[1] - own
    how = (mode, align_corners)
    if list(grid) == list(out_grid):
        coarse = grad[:, prefix - own :]  # a scale without prefix tokens sees none of their gradient
    elif cells <= N - prefix:
        coarse = torch.empty(B, own + cells, O, dtype=grad.dtype, device=grad.device)
        _interpolate(grad, out_grid, grid, coarse, *how, True, prefix=own, own_prefix=prefix)
    else:
        if of_x is not None:
            fine = rows_product(grad, weight, torch.empty(B, N, x.shape[2], dtype=x.dtype, device=x.device))
            _interpolate(fine, out_grid, grid, of_x, *how, True, prefix=own, own_prefix=prefix)
        if of_weight is not None:
            fine = torch.empty(B, N, x.shape[2], dtype=x.dtype, device=x.device)
            _interpolate(x, grid, out_grid, fine, *how, False, prefix=prefix, own_prefix=own)
            weight_gradient(grad, fine, of_weight)
        return
    if of_x is not None:
        rows_product(coarse, weight, of_x)
    if of_weight is not None:
        weight_gradient(coarse, x, of_weight)
