"""Attention inside windows of an image, and Swin's block around it, in plain PyTorch  (arXiv 2103.14030).

softmax(q k^T / sqrt(D) + bias) v in windows of M x M tokens; bias [H, M^2, M^2] depends on where a token lies relative
to the other.  With ``shift`` the windows start that far down and right; where a window then wraps around the image,
tokens see only those of their own side: both sides have region numbers, and pairs of different regions take no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_dropout, check_flag, check_size, check_sizes, check_tensor, refuse
from ._heads import check_heads, merge_heads, project, split_heads
from .vision_block import VisionBlock

Pair = tuple[int, int]


class WindowAttention(nn.Module):
    """Attention of the tokens of an image inside windows, shifted or not.

    Args:
        dim: C.
        num_heads: divides dim.
        window_size: M, or (M_h, M_w).  A grid smaller than a window is one window of its own size.
        qkv_bias: whether ``qkv`` has a bias.
        attn_drop, proj_drop: dropout of the probabilities and of the result.

    Parameters, named as in timm: ``qkv``, ``proj``, ``relative_position_bias_table`` [(2 M_h - 1)(2 M_w - 1), H].

    Cost: 4 N C^2 + 2 N M^2 C multiply-adds an image: linear in the number of tokens N.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        *,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        where = "WindowAttention"
        check_heads(where, dim, num_heads)
        check_flag(where, "qkv_bias", qkv_bias)
        self.dim, self.num_heads = dim, num_heads
        self.window_size = check_pair(where, "window_size", window_size)
        self.attn_drop = check_dropout(where, attn_drop)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(check_dropout(where, proj_drop))
        offsets = math.prod(2 * m - 1 for m in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, grid: Sequence[int], shift: int | Sequence[int] = 0) -> Tensor:
        """Tokens of an image, row by row, to as many.

        Args:
            x: [B, H W, C].
            grid: (H, W), any sizes.  Where a window is not full, zeros are added below and to the right.  Like any
                token they are projected and attended to, as Swin does it, and then cut off.
            shift: how far the windows start down and right, from 0 to M - 1, or one number for each axis.  It means
                nothing along an axis with a single window.

        Returns:
            [B, H W, C].

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where = "WindowAttention"
        check_tensor(where, "x", x, "(B, N, C)", 3)
        grid = check_sizes(where, "grid", grid, 2)
        if x.shape[2] != self.dim:
            refuse(ValueError, where, "x", f"{self.dim} channels", x)
        if x.shape[1] != grid[0] * grid[1]:
            refuse(ValueError, where, "x", f"{grid[0] * grid[1]} tokens, to go with the grid {grid}", x)
        shift = self._check_shift(shift)
        window = tuple(min(m, n) for m, n in zip(self.window_size, grid, strict=True))
        shift = tuple(0 if n <= m else s for s, m, n in zip(shift, self.window_size, grid, strict=True))
        counts = tuple(-(-n // m) for n, m in zip(grid, window, strict=True))
        padded = tuple(c * m for c, m in zip(counts, window, strict=True))

        x = x.unflatten(1, grid)
        if padded != grid:
            x = F.pad(x, (0, 0, 0, padded[1] - grid[1], 0, padded[0] - grid[0]))
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        windows = into_windows(x, counts, window)  # [B, windows, T, C], T tokens each
        q, k, v = (split_heads(part, self.num_heads) for part in project(self.qkv, windows, 3))
        regions = window_regions(padded, counts, window, shift, x.device) if any(shift) else None
        out = self._attend(q, k, v, self._bias(window), regions, self.attn_drop if self.training else 0.0)
        out = self.proj_drop(self.proj(merge_heads(out)))
        out = out.unflatten(2, window).unflatten(1, counts).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            out = out.roll(shift, (1, 2))
        return out[:, : grid[0], : grid[1]].flatten(1, 2)

    def _check_shift(self, shift: Any) -> Pair:
        where, form = "WindowAttention", f"an int from 0 to {min(self.window_size) - 1}, or one for each axis"
        if isinstance(shift, bool | str | Tensor) or not isinstance(shift, int | Sequence):
            refuse(TypeError, where, "shift", form, shift)
        shift = (shift, shift) if isinstance(shift, int) else tuple(shift)
        if len(shift) != 2 or any(isinstance(s, bool) or not isinstance(s, int) for s in shift):
            refuse(TypeError, where, "shift", form, shift)
        if any(not 0 <= s < m for s, m in zip(shift, self.window_size, strict=True)):
            refuse(ValueError, where, "shift", form, shift)
        return shift

    def _bias(self, window: Pair) -> Tensor:
        """[H, T, T]: the table's row of what lies (dy, dx) away is (dy + M_h - 1)(2 M_w - 1) + dx + M_w - 1."""
        table, (height, width) = self.relative_position_bias_table, self.window_size
        y = torch.arange(window[0], device=table.device)
        x = torch.arange(window[1], device=table.device)
        rows = (y[:, None] - y + height - 1)[:, None, :, None] * (2 * width - 1)
        rows = (rows + (x[:, None] - x + width - 1)[None, :, None, :]).flatten(2).flatten(0, 1)
        return table[rows].permute(2, 0, 1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None, dropout_p: float
    ) -> Tensor:
        """q, k, v [B, windows, H, T, D], bias [H, T, T], regions [windows, T] to [B, windows, H, T, D]."""
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = ((q * q.shape[-1] ** -0.5) @ k.mT).to(wide) + bias.to(wide)
        if regions is not None:
            scores = scores.masked_fill(~same_region(regions)[:, None], -torch.inf)
        weights = scores.softmax(-1)
        if dropout_p > 0.0:
            weights = F.dropout(weights, dropout_p)
        return weights.to(v.dtype) @ v

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"


def check_pair(where: str, name: str, x: Any) -> Pair:
    """One size for both axes, or two."""
    if isinstance(x, int) and not isinstance(x, bool):
        return (check_size(where, name, x),) * 2
    return check_sizes(where, name, x, 2)


def into_windows(x: Tensor, counts: Pair, window: Pair) -> Tensor:
    """[B, H, W, C] to [B, windows, T, C]."""
    x = x.unflatten(2, (counts[1], window[1])).unflatten(1, (counts[0], window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_regions(padded: Pair, counts: Pair, window: Pair, shift: Pair, device: torch.device) -> Tensor:
    """[windows, T]: numbers that differ inside a window exactly where the image wraps around."""
    # Only the last window of an axis wraps, and its last ``shift`` tokens are from the other side.
    y, x = (torch.arange(n, device=device) >= n - s for n, s in zip(padded, shift, strict=True))
    regions = 2 * y[:, None].long() + x.long()
    return into_windows(regions[None, ..., None], counts, window)[0, ..., 0]


def same_region(regions: Tensor) -> Tensor:
    """[windows, T] to bool [windows, T, T]."""
    return regions[:, :, None] == regions[:, None, :]


class SwinBlock(VisionBlock):
    """Swin's transformer block: ``norm1``, ``attn``, ``norm2``, ``mlp.fc1``, ``mlp.fc2``.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, dropout, attn_drop, drop_path, eps, activation: as in VisionBlock.
        window_size: M, or (M_h, M_w).
        shift: of its windows; Swin takes M // 2 in every second block.
    """

    attention: type[nn.Module] = WindowAttention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        *,
        eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, eps=eps, window_size=window_size, **options)
        self.shift = self.attn._check_shift(shift)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """x [B, H W, C], grid (H, W) to [B, H W, C].  Nothing shifts on a grid at most a window high or wide."""
        grid = check_sizes("SwinBlock", "grid", grid, 2)
        whole = any(n <= m for n, m in zip(grid, self.attn.window_size, strict=True))
        x = x + self.drop_path(self.attn(self.norm1(x), grid, (0, 0) if whole else self.shift))
        return x + self.drop_path(self.mlp(self.norm2(x)))
