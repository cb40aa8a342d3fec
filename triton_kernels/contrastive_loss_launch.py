"""Which kernels run a contrastive loss: tensors in, tensors out.

forward    one pass over the pairs; parts of the log-sum-exps are merged in order
backward   slice of columns by slice: gradients of its logits, then their products with y and with x
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import contrastive_loss as kernels
from . import launch as launching
from .configs import Tile
from .fusion_tiles import lookup, power

PROGRAMS = 264  # that a pass is split into, if it has tiles for so many
PART_BYTES = 64 << 20  # of column parts in memory at a time
LEAST_SLICE = 1024  # columns of a slice; otherwise as many as there are channels


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tile(x: Tensor, images: int, columns: int) -> Tile:
    tile = lookup(x, "contrast", x.shape[-1])
    rows = tile.rows // 2 if x.shape[1] > 1 else tile.rows  # the best so far and which it is lie beside the next
    return tile._replace(rows=min(rows, power(images)), cols=min(tile.cols, power(columns)),
                         inner=min(tile.inner, power(x.shape[-1])))  # fmt: skip


def _side(x: Tensor) -> tuple:
    """[rows, C]."""
    x = launching.rows(x)
    return x, x.stride(0)


def _packed(x: Tensor | None) -> Tensor | None:
    """Numbers that kernels read one behind the other."""
    return None if x is None else x.contiguous()


def _merge(parts: Tensor, running: Tensor | None, out: Tensor, first: bool, last: bool, siglip: bool = False) -> None:
    """parts [n, size, 2] after ``running``; see the kernel."""
    n, size = parts.shape[:2]
    launching.launch(
        kernels._contrast_merge_kernel, _cdiv(size, 128), (parts, running, out, n, size), 4, 1, FIRST=first, LAST=last,
        SIGLIP=siglip, BLOCK=128,
    )  # fmt: skip


def contrastive_loss(x, y, scale, factor, bias, offset, labels, columns, kind):
    """Operator ``hivilt::contrastive_loss`` without its backend argument."""
    B, R, C = x.shape
    N, device, siglip = y.shape[0], x.device, kind == "siglip"
    labels = _packed(labels)
    row_lse = torch.empty(B, dtype=torch.float64, device=device)
    column_lse = torch.empty(N if columns else 0, dtype=torch.float64, device=device)
    # A label outside the columns leaves NaN.
    target = torch.full((0 if siglip else B,), float("nan"), dtype=torch.float64, device=device)
    tile = _tile(x, B, N)
    blocks, tiles = _cdiv(B, tile.rows), _cdiv(N, tile.cols)
    splits = max(1, min(tiles, PROGRAMS // blocks))
    per_split = _cdiv(tiles, splits) * tile.cols
    splits = _cdiv(N, per_split)
    row_parts = torch.empty(splits, B, 2, dtype=torch.float32, device=device)
    at_once = max(1, min(blocks, PART_BYTES // (8 * N))) if columns else blocks
    column_parts = torch.empty(at_once if columns else 0, N, 2, dtype=torch.float32, device=device)
    running = torch.empty(N, 2, dtype=torch.float64, device=device) if columns and at_once < blocks else None
    sides = _side(x.reshape(B * R, C)), _side(y)
    for first in range(0, blocks, at_once):
        some = min(at_once, blocks - first)
        launching.launch(
            kernels._contrast_forward_kernel, some * splits,
            (*sides, factor, scale, offset, bias, labels, row_parts, column_parts, target, B, N, C, first, splits,
             per_split),
            tile.warps, tile.stages, QUERIES=R, SIGLIP=siglip, COLUMNS=columns, BLOCK_I=tile.rows, BLOCK_J=tile.cols,
            BLOCK_C=tile.inner,
        )  # fmt: skip
        if columns:
            _merge(column_parts[:some], running, column_lse, first == 0, first + some == blocks)
    _merge(row_parts, None, row_lse, True, True, siglip)
    return row_lse, column_lse, target


def contrastive_loss_backward(x, y, scale, factor, bias, offset, labels, kind, row_lse, column_lse, grad_rows,
                              grad_columns, grad_target, x_grad, y_grad):  # fmt: skip
    """Operator ``hivilt::contrastive_loss_backward`` without its backend argument."""
    B, R, C = x.shape
    N, device, dtype = y.shape[0], x.device, x.dtype
    flat = x.reshape(B * R, C)
    sides = _side(flat), _side(y)
    labels, *shares = map(_packed, (labels, grad_rows, grad_columns, grad_target))
    tile = _tile(x, B, N)
    width = min(_cdiv(N, tile.cols), _cdiv(max(C, LEAST_SLICE), tile.cols)) * tile.cols
    # Shares of a softmax are small: float16 would lose them.
    pairs = torch.empty(B * R, width, dtype=torch.float32 if dtype == torch.float16 else dtype, device=device)
    of_rows = torch.empty((B * R, C) if x_grad else (0, C), dtype=torch.float32, device=device)
    grad_y = torch.empty((N, C) if y_grad else (0,), dtype=dtype, device=device)
    blocks, col_blocks = _cdiv(B, tile.rows), width // tile.cols
    sums = torch.empty(_cdiv(N, width), blocks, col_blocks, 2, dtype=torch.float32, device=device)
    terms_in_a_step = lookup(x, "contrast", C).inner
    wide = min(64, power(C))
    for i, first in enumerate(range(0, N, width)):
        some = min(width, N - first)
        launching.launch(
            kernels._contrast_pairs_kernel, blocks * col_blocks,
            (*sides, factor, scale, offset, bias, labels, row_lse, column_lse, *shares, pairs, sums[i], B, N, C, first,
             width, col_blocks),
            tile.warps, tile.stages, QUERIES=R, SIGLIP=kind == "siglip", BLOCK_I=tile.rows, BLOCK_J=tile.cols,
            BLOCK_C=tile.inner,
        )  # fmt: skip
        # (gradient, its rows, summed over, strides of pairs, the other side, its first row, added to what is there)
        rows = (of_rows, B * R, some, (width, 1), sides[1], first, i > 0) if x_grad else None
        cols = (grad_y[first:], some, B * R, (1, width), sides[0], 0, False) if y_grad else None
        for out, n, terms, strides, other, begin, more in filter(None, (rows, cols) if C else ()):
            block, steps = min(64, power(n)), min(terms_in_a_step, power(terms))
            launching.launch(
                kernels._contrast_product_kernel, _cdiv(n, block) * _cdiv(C, wide),
                ((pairs, *strides), other, (out, out.stride(0)), factor, scale, n, terms, C, begin, _cdiv(C, wide)),
                4, 2, ADD=more, BLOCK_R=block, BLOCK_C=wide, BLOCK_K=steps,
            )  # fmt: skip
    along, plain = sums.double().sum((0, 1, 2)).unbind()
    if kind != "siglip":
        # The shares of a softmax add up to 1 but for rounding errors, which would be all that is left.
        lse = (row_lse, column_lse, row_lse)
        plain = sum((g * (1.0 + 0.0 * t)).sum() for g, t in zip(shares, lse, strict=True) if g is not None)
    empty = x.new_empty(0, dtype=torch.float32)
    return (
        of_rows.to(dtype).view(B, R, C) if x_grad else x.new_empty(0),
        grad_y,
        empty if scale is None else (factor * along).float(),
        empty if bias is None else plain.float(),
    )
