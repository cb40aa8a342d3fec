"""How the launch functions of families B, C and D ask for tile sizes; the table is in ``configs.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs, launch
from .configs import Tile


def lookup(x: Tensor, kernel: str, channels: int, dtype: torch.dtype | None = None) -> Tile:
    """Of a kernel that works on x, with so many channels and in the dtype of x or another."""
    part, _ = launch.part_of(x)
    return configs.tile(part, kernel, launch.NAMES[dtype or x.dtype], channels)


def power(n: int) -> int:
    """The power of two from 16 on that holds n."""
    return 1 << max(4, (n - 1).bit_length())
