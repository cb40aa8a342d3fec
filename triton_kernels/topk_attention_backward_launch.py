"""From the backward operator of family A to kernels: which ones run a call, and the memory they write."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from . import topk_attention_plan as plan
from .dense_attention_backward import (
    _bias_gradient_kernel,
    _delta_kernel,
    _key_gradient_kernel,
    _query_gradient_kernel,
)
from .selected_attention import _gather_key_gradient_kernel, _gather_query_gradient_kernel
from .topk_attention_launch import bits_of
from .topk_attention_plan import Call, Masks, cdiv, power


class Upstream(NamedTuple):
    """What backward knows beside the call."""

    grad_out: Tensor
    lse: Tensor
    delta: Tensor

    def row_arguments(self) -> tuple:
        """lse and delta as arguments of kernels."""
        return launch.strided(self.lse), self.delta


def topk_attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, indices, axis, attn_mask, key_mask, query_mask, packed, seed,
    scale, dropout_p, key_grad, bias_grad,
):  # fmt: skip
    """Operator ``hivilt::topk_attention_backward``: gradients of query, key, value and the bias."""
    p = plan.problem(query, key, packed)
    sparse = indices.dim() > 1
    masks = Masks(attn_mask, key_mask, query_mask)
    if sparse:  # the lists already honour every mask; a float bias still enters the scores
        masks = Masks(attn_mask if attn_mask is not None and attn_mask.is_floating_point() else None)
    call = Call(p, query, key, value, masks, seed, scale, dropout_p)
    up = Upstream(grad_out, lse.contiguous(), _delta(grad_out, grad_lse, out))
    grads = [plan.token_major(query, query.shape[3], packed)]
    grads += [plan.token_major(x, x.shape[3], packed) if key_grad else x.new_empty(0) for x in (key, value)]
    indices = indices.contiguous()
    gather = sparse and axis == 0 and packed is None and p.keys >= plan.GATHER_FROM * max(1, indices.shape[3])
    orientation = axis + 1 if sparse else 0
    bits = bits_of(p, indices, orientation) if sparse and (bias_grad or not gather) else None
    if gather:
        _gather_backward(call, up, indices, grads)
    else:
        _dense_backward(call, up, bits, orientation, grads)
    grad_bias = _bias_gradient(call, up, bits, orientation) if bias_grad else query.new_empty(0)
    return (*grads, grad_bias)


def _delta(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    B, H, T, width = out.shape
    delta = out.new_empty((B, H, T), dtype=torch.float32)
    config = plan.tiles(out, "delta", (64,))
    blocks = cdiv(T, config.rows)
    if B * H * blocks:
        grad_lse = None if grad_lse is None else (grad_lse, *grad_lse.stride())
        launch.launch(
            _delta_kernel, B * H * blocks,
            (launch.strided(launch.rows(grad_out)), launch.strided(launch.rows(out)), grad_lse, delta, H, T, blocks),
            config.warps, config.stages, VALUE_WIDTH=width, BLOCK_R=config.rows, BLOCK_E=power(width),
        )  # fmt: skip
    return delta


# Over lists.


def _gather_backward(call: Call, up: Upstream, lists: Tensor, grads: list[Tensor]) -> None:
    key_grad = grads[1].dim() > 1
    grad_query, grad_key, grad_value = (launch.strided(x) if x.dim() > 1 else None for x in grads)
    config = call.tiles("gather_backward")
    sides, mask, length = call.sides(up.grad_out), launch.mask(call.masks.attn_mask), lists.shape[3]
    widths = {
        "WIDTH": call.width, "VALUE_WIDTH": call.value_width, "BLOCK_R": config.rows, "BLOCK_L": config.cols,
        "BLOCK_D": power(call.width), "BLOCK_E": power(call.value_width),
    }  # fmt: skip
    tasks, blocks = call.query_tasks(config.rows)
    if tasks:
        launch.launch(
            _gather_query_gradient_kernel, tasks,
            (*sides, plan.list_strides(lists), *up.row_arguments(), grad_query, mask, *call.dropout(), length,
             call.scale, call.problem.heads, blocks),
            config.warps, config.stages, **widths,
        )  # fmt: skip
    tasks, blocks = call.key_tasks(config.rows)
    if tasks and key_grad:
        runs, entries = _inverse(lists, call.problem.keys)
        launch.launch(
            _gather_key_gradient_kernel, tasks,
            (*sides, runs, entries, *up.row_arguments(), grad_key, grad_value, mask, *call.dropout(), max(1, length),
             lists.shape[1], call.scale, call.key.shape[1], blocks),
            config.warps, config.stages, **widths,
        )  # fmt: skip


def _inverse(lists: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(runs, entries): flat positions of the lists sorted by slice and column, and where the run of each column starts.

    The sort is stable, so a column's rows come in ascending order and its sum has one order only.
    """
    slices = lists.shape[0] * lists.shape[1]
    number = torch.arange(slices, device=lists.device).view(*lists.shape[:2], 1, 1) * columns
    # What is out of range, which no captured graph checks, would be taken for a column of the next slice.
    column = torch.where((lists < 0) | (lists >= columns), slices * columns, lists + number).flatten()
    if slices * columns < 2**31 - 1:
        column = column.to(torch.int32)
    column, entries = column.sort(stable=True)
    every = torch.arange(slices * columns + 1, device=lists.device, dtype=column.dtype)
    return torch.searchsorted(column, every), entries


# Over all pairs, or over those of a bitmask.


def _dense_widths(call: Call, orientation: int) -> dict[str, int]:
    return {
        "WIDTH": call.width, "VALUE_WIDTH": call.value_width, "BLOCK_D": power(call.width),
        "BLOCK_E": power(call.value_width), "BITS": orientation,
        "LINK": plan.backward_link(call.width, call.query.dtype),
    }  # fmt: skip


def _dense_backward(call: Call, up: Upstream, bits: tuple | None, orientation: int, grads: list[Tensor]) -> None:
    key_grad = grads[1].dim() > 1
    grad_query, grad_key, grad_value = (launch.strided(x) if x.dim() > 1 else None for x in grads)
    before = (*call.sides(up.grad_out), *up.row_arguments())
    after = (bits, *call.masks.arguments(), *call.dropout(), call.scale)
    widths = _dense_widths(call, orientation)
    config = call.tiles("dense_query_gradient")
    tasks, blocks = call.query_tasks(config.rows)
    if tasks:
        launch.launch(
            _query_gradient_kernel, tasks, (*before, grad_query, *after, call.problem.heads, blocks),
            config.warps, config.stages, BLOCK_R=config.rows, BLOCK_C=config.cols, **widths,
        )  # fmt: skip
    config = call.tiles("dense_key_gradient")
    tasks, blocks = call.key_tasks(config.cols)
    if tasks and key_grad:
        launch.launch(
            _key_gradient_kernel, tasks, (*before, grad_key, grad_value, *after, call.key.shape[1], blocks),
            config.warps, config.stages, BLOCK_R=config.rows, BLOCK_C=config.cols, **widths,
        )  # fmt: skip


def _bias_gradient(call: Call, up: Upstream, bits: tuple | None, orientation: int) -> Tensor:
    p, bias = call.problem, call.masks.attn_mask
    config = plan.tiles(call.query, "bias_gradient", (call.width, call.value_width))
    row_blocks, col_blocks = cdiv(p.queries, config.rows), cdiv(p.keys, config.cols)
    # An axis of size 1 needs no summing where the call has one element of it as well.
    sizes = (p.batches, p.heads, p.queries, p.keys)
    over = [own == 1 and all_ > 1 for own, all_ in zip(bias.shape, sizes, strict=True)]
    grad = bias.new_empty(bias.shape, dtype=torch.float32)
    own_blocks = (1 if over[2] else row_blocks) * (1 if over[3] else col_blocks)
    tasks = bias.shape[0] * bias.shape[1] * own_blocks
    if tasks * p.batches * p.heads == 0:
        return torch.zeros_like(grad).to(bias.dtype)
    launch.launch(
        _bias_gradient_kernel, tasks,
        (*call.sides(up.grad_out), *up.row_arguments(), grad, bits, *call.masks.arguments(), *call.dropout(),
         call.scale, p.batches, p.heads, bias.shape[1], row_blocks, col_blocks),
        config.warps, config.stages, BLOCK_R=config.rows, BLOCK_C=config.cols, **_dense_widths(call, orientation),
        OVER_BATCHES=over[0], OVER_HEADS=over[1], OVER_ROWS=over[2], OVER_COLS=over[3],
    )  # fmt: skip
    return grad.to(bias.dtype)
