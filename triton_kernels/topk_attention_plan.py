"""What decides how a call of family A runs: its sizes, the limits between kernels, the tiles of each.

A ``Call`` says once what every kernel of a call is told about its tensors, masks and dropout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import configs, launch

TOPK_LONG = 928  # most that a row longer than a tile may keep: its candidates have to fit into a program
GATHER_FROM = 32  # columns per kept one from which lists beat a bitmask (docs/topk_attention.md)
FUSED = 128  # columns up to which one kernel selects and attends in a half type; more would need too many registers
SAMPLE = 256  # columns looked at for the first bar
SAMPLE_SINGLE = 64  # the same for float32 and wide heads, whose products take registers


class Packed(NamedTuple):
    """Segments of packed sequences: where they start, on the device, and the longest."""

    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int

    @property
    def batches(self) -> int:
        return self.starts_q.shape[0] - 1


class Problem(NamedTuple):
    """The sizes of a call, and where the segments of a packed one start."""

    batches: int
    heads: int
    queries: int  # the longest segment's
    keys: int
    starts_q: Tensor | None
    starts_k: Tensor | None

    def reversed(self) -> Problem:
        """Keys for queries and queries for keys."""
        return Problem(self.batches, self.heads, self.keys, self.queries, self.starts_k, self.starts_q)


class Masks(NamedTuple):
    """Which pairs and tokens take part; a float attn_mask is a bias."""

    attn_mask: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None

    def arguments(self) -> tuple:
        """What kernels of attention take, whose rows are queries: mask, query_mask, key_mask."""
        return launch.mask(self.attn_mask), launch.token_mask(self.query_mask), launch.token_mask(self.key_mask)


class Call(NamedTuple):
    """Attention, forward or backward, as its kernels see it."""

    problem: Problem
    query: Tensor
    key: Tensor
    value: Tensor
    masks: Masks
    seed: Tensor | None
    scale: float
    dropout_p: float

    @property
    def width(self) -> int:
        return self.query.shape[3]

    @property
    def value_width(self) -> int:
        return self.value.shape[3]

    def sides(self, grad_out: Tensor | None = None) -> tuple:
        """query, key, value and, where given, grad_out as arguments of kernels."""
        p = self.problem
        inputs = ((self.query, p.starts_q), (self.key, p.starts_k), (self.value, p.starts_k), (grad_out, p.starts_q))
        return tuple(launch.side(x, p.heads, starts) for x, starts in inputs if x is not None)

    def dropout(self) -> tuple:
        """seed and dropout_p as arguments of kernels."""
        return self.seed, launch.dropout(self.dropout_p) if self.seed is not None else None

    def tiles(self, kernel: str) -> configs.Config:
        """Those of calls with dropout or a bias may differ: both take registers.  What is masked changes no tile."""
        mask = self.masks.attn_mask
        bias = mask if mask is not None and mask.is_floating_point() else None
        return tiles(self.query, kernel, (self.width, self.value_width), (self.seed, bias))

    def query_tasks(self, rows: int) -> tuple[int, int]:
        """(programs, blocks of a head) for blocks of so many queries."""
        blocks = cdiv(self.problem.queries, rows)
        return self.problem.batches * self.problem.heads * blocks, blocks

    def key_tasks(self, cols: int) -> tuple[int, int]:
        """(programs, blocks of a group) for blocks of so many keys."""
        blocks = cdiv(self.problem.keys, cols)
        return self.problem.batches * self.key.shape[1] * blocks, blocks


def problem(query: Tensor, key: Tensor, packed: Packed | None) -> Problem:
    if packed is None:
        return Problem(query.shape[0], query.shape[1], query.shape[2], key.shape[2], None, None)
    return Problem(packed.batches, query.shape[1], packed.longest_q, packed.longest_k, packed.starts_q, packed.starts_k)


# Limits.


def why_not(part: str, dtype: torch.dtype, topk: int, columns: int) -> str | None:
    """The reason why a selection of ``topk`` from ``columns`` does not fit, or None."""
    tile = one_tile(part, dtype, True)
    if topk <= TOPK_LONG or topk >= columns or columns <= tile:
        return None
    return f"topk = {topk} of {columns}: the kernels keep up to {TOPK_LONG} of rows longer than {tile}"


def one_tile(part: str, dtype: torch.dtype, heavy: bool) -> int:
    """Columns up to which a row is selected from in one tile; ``heavy`` calls have wide heads or masks."""
    limits = configs.limits(part)
    if dtype == torch.float32:
        return limits.one_tile_single
    return min(512, limits.one_tile_half) if heavy else limits.one_tile_half


def in_one_tile(x: Tensor, columns: int, masks: Masks) -> bool:
    """Whether rows of so many columns, selected from with the queries x under these masks, fit into a tile."""
    part, _ = launch.part_of(x)
    heavy = x.shape[-1] > 64 or any(mask is not None for mask in masks)
    return columns <= one_tile(part, x.dtype, heavy)


# Tiles.


def tiles(x: Tensor, kernel: str, widths: tuple[int, ...], extras: tuple = ()) -> configs.Config:
    """The configuration of a kernel for the dtype of x and these head widths.

    Where any of ``extras`` (masks, a bias, a seed) is there, the kernel needs more registers and may have another.
    """
    part, _ = launch.part_of(x)
    heavy = any(extra is not None for extra in extras)
    return configs.lookup(
        part, f"{kernel}_heavy" if heavy else kernel, launch.NAMES[x.dtype], min(256, max(1, *widths))
    )


# Triton's own cdiv and next_power_of_2 take ten times as long: they may be called inside kernels as well.


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def link(width: int, dtype: torch.dtype) -> int:
    """Elements of a head that one product of scores takes; the interpreter sums as float32 does in either type."""
    return min(16 if dtype == torch.float32 or launch.INTERPRETED else 64, power(width))


def backward_link(width: int, dtype: torch.dtype) -> int:
    """The link with which backward repeats forward's sums; a matrix instruction's chain does not depend on it."""
    return link(width, dtype) if dtype == torch.float32 or launch.INTERPRETED else power(width)


# Memory.


def token_major(like: Tensor, width: int, packed: Packed | None) -> Tensor:
    """[B, H, T, width] whose memory is [B, T, H, width].

    In packed calls tokens behind the last segment belong to nobody and no kernel writes them: they are 0.
    """
    B, H, T, _ = like.shape
    new = like.new_empty if packed is None else like.new_zeros
    return new(B, T, H, width).transpose(1, 2)


def list_strides(lists: Tensor) -> tuple:
    """(pointer, strides of batch, head, row); one head's lists serve all."""
    return (lists, lists.stride(0), lists.stride(1) if lists.shape[1] > 1 else 0, lists.shape[3])
