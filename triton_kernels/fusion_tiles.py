"""Tile sizes of the kernels of scale fusion, token interpolation, token pooling and bank retrieval: a table, so that a
first call measures nothing."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """rows: tokens (of a weight's gradient: its rows; of a bank: queries); cols: channels; inner: what is summed over
    in one step."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


# (kernel, works in float32) -> channels up to which the tile serves, ascending -> tile.
TABLE: dict[tuple[str, bool], dict[int, Tile]] = {
    ("interpolate", False): {32: Tile(64, 32, 0, 4, 1), 10**9: Tile(32, 64, 0, 4, 1)},
    ("rows_product", False): {10**9: Tile(64, 64, 64, 4, 3)},
    ("rows_product", True): {10**9: Tile(32, 64, 16, 4, 2)},
    ("weight_gradient", False): {10**9: Tile(64, 64, 64, 4, 3)},
    ("weight_gradient", True): {10**9: Tile(32, 64, 16, 4, 2)},
    ("fusion", False): {
        64: Tile(64, 0, 32, 4, 2), 256: Tile(64, 0, 32, 8, 2), 512: Tile(32, 0, 32, 8, 2), 1024: Tile(16, 0, 32, 8, 2),
    },
    ("fusion", True): {128: Tile(32, 0, 32, 8, 1), 256: Tile(16, 0, 32, 8, 1), 512: Tile(16, 0, 16, 8, 1)},
    ("finish", True): {10**9: Tile(4, 512, 0, 4, 1)},
    ("finish_gradient", False): {
        128: Tile(32, 128, 0, 8, 1), 256: Tile(16, 0, 0, 8, 1), 512: Tile(8, 0, 0, 8, 1), 1024: Tile(4, 0, 0, 8, 1),
    },
    ("token_scores", False): {10**9: Tile(64, 64, 64, 4, 2)},
    ("token_scores", True): {10**9: Tile(32, 32, 64, 4, 1)},
    ("pool", False): {64: Tile(64, 0, 64, 4, 1), 256: Tile(32, 0, 64, 8, 1), 10**9: Tile(32, 128, 16, 4, 2)},
    ("pool", True): {10**9: Tile(32, 128, 16, 4, 1)},
    ("score_gradient", False): {10**9: Tile(64, 64, 64, 8, 2)},
    ("score_gradient", True): {10**9: Tile(32, 32, 64, 4, 1)},
    ("pool_gradient", False): {10**9: Tile(64, 64, 64, 8, 2)},
    ("pool_gradient", True): {10**9: Tile(32, 64, 32, 4, 1)},
    # 128 bank rows are the columns of a tile.
    ("bank_maxima", False): {128: Tile(128, 0, 64, 8, 3), 10**9: Tile(128, 0, 64, 8, 2)},
    ("bank_maxima", True): {10**9: Tile(32, 0, 16, 8, 2)},
    ("bank_stream", True): {10**9: Tile(4, 0, 32, 8, 2)},
}  # fmt: skip


@functools.cache
def lookup(kernel: str, dtype: torch.dtype, channels: int) -> Tile:
    rows = TABLE.get((kernel, dtype == torch.float32)) or TABLE[kernel, not dtype == torch.float32]
    return next(tile for limit, tile in rows.items() if channels <= limit)


def power(n: int) -> int:
    """The power of two from 16 on that holds n."""
    return 1 << max(4, (n - 1).bit_length())
