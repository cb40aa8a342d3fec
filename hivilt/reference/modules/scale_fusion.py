"""Layers of a multi-scale vision transformer in plain PyTorch: patches of one scale, and tokens of all scales in one.

They write what hivilt.nn.CrossScaleFusion and its relatives never write: the tokens of every scale interpolated to the
finest grid, [B, N, C_s] each, and their concatenation [B, N, sum C_s].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._bank_arguments import check_number
from ._checks import (
    check_active,
    check_choice,
    check_dropout,
    check_grids,
    check_scales,
    check_size,
    check_sizes,
    check_tensor,
    refuse,
)

Grid = tuple[int, ...]
LINEAR = ("linear", "bilinear", "trilinear")
NORMS = ("layernorm", "none")
ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "none": nn.Identity,
}


def resize_tokens(x: Tensor, grid: Grid, out_grid: Grid, align_corners: bool = False) -> Tensor:
    """Tokens [B, prod(grid), C] to [B, prod(out_grid), C], (bi-, tri-) linear, in raster order."""
    if grid == out_grid:
        return x
    maps = x.transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(maps, size=out_grid, mode=LINEAR[len(grid) - 1], align_corners=align_corners)
    return maps.flatten(2).transpose(1, 2)


def check_compat(where: str, compat: Any, **options: tuple[Any, Any]) -> str | None:
    """None or "seed", beside which each option (what came, its default) has its default."""
    if compat is None:
        return None
    check_choice(where, "compat", compat, ("seed",))
    for name, (x, default) in options.items():
        if x != default:
            refuse(ValueError, where, name, f"{default!r}, because compat is 'seed'", x)
    return compat


def halving_widths(where: str, hidden_dim: int, num_scales: int) -> tuple[int, ...]:
    """C, C/2, C/4, ...: the widths of the scales unless others are given."""
    if hidden_dim >> (num_scales - 1) == 0:
        refuse(ValueError, where, "hidden_dim", f"at least {1 << (num_scales - 1)} for {num_scales} scales", hidden_dim)
    return tuple(hidden_dim >> s for s in range(num_scales))


class HierarchicalPatchEmbedding(nn.Module):
    """Cuts an image into patches of one scale and projects each to a token.

    Args:
        in_channels: of the image.
        hidden_dim: C, channels of a token.
        patch_size: side of a patch; rows and columns that do not fill a patch are left out.
        pos_grid: (H, W) of a learned position table added after the norm and resized to any other grid; None: no table.
        compat: None, or "seed": the layer as first written, which is the one without a table.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_dim: int,
        patch_size: int,
        *,
        pos_grid: Sequence[int] | None = None,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        where = "HierarchicalPatchEmbedding"
        check_compat(where, compat, pos_grid=(pos_grid, None))
        self.patch_size = check_size(where, "patch_size", patch_size)
        self.hidden_dim = check_size(where, "hidden_dim", hidden_dim)
        self.projection = nn.Conv2d(
            check_size(where, "in_channels", in_channels), hidden_dim, kernel_size=patch_size, stride=patch_size
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.pos_grid = None if pos_grid is None else check_sizes(where, "pos_grid", pos_grid, 2)
        if self.pos_grid is None:
            self.register_parameter("pos_embed", None)
        else:
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.pos_grid), hidden_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor, return_grid: bool = False) -> Tensor | tuple[Tensor, tuple[int, int]]:
        """Image [B, in_channels, H, W] to tokens [B, N, C]; with return_grid also their grid, N = grid[0] * grid[1].

        Raises:
            ValueError, TypeError: x is no such image, or smaller than a patch.
        """
        where = "HierarchicalPatchEmbedding"
        check_tensor(where, "x", x, "(B, in_channels, H, W)", 4)
        if x.shape[1] != self.projection.in_channels:
            refuse(ValueError, where, "x", f"{self.projection.in_channels} channels", x)
        if min(x.shape[2:]) < self.patch_size:
            refuse(ValueError, where, "x", f"an image of at least one patch, {self.patch_size} x {self.patch_size}", x)
        maps = self.projection(x)
        grid = tuple(maps.shape[2:])
        tokens = self.norm(maps.flatten(2).transpose(1, 2))
        if self.pos_embed is not None:
            tokens = tokens + self._positions(grid)
        return (tokens, grid) if return_grid else tokens

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        return resize_tokens(self.pos_embed, self.pos_grid, grid)


class CrossScaleFusion(nn.Module):
    """Brings the tokens of all scales to the grid of the first, concatenates them and projects: one token per place.

    Args:
        hidden_dim: C, channels of the result.
        num_scales: S.
        dropout: after the activation.
        dims: channels of each scale; C, C/2, C/4, ... by default.
        norm: "layernorm" or "none".
        act: "gelu", "gelu_tanh", "relu", "silu" or "none".
        align_corners: as in torch.nn.functional.interpolate.
        norm_eps: of the layer norm.
        compat: None, or "seed": the layer as first written, which is the one without any option.

    Parameters: ``fusion.0`` is the Linear over the concatenated channels, ``fusion.1`` the LayerNorm.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_scales: int = 3,
        dropout: float = 0.1,
        dims: Sequence[int] | None = None,
        norm: str = "layernorm",
        act: str = "gelu",
        align_corners: bool = False,
        norm_eps: float = 1e-5,
        *,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        where = "CrossScaleFusion"
        defaults = {"dims": (dims, None), "norm": (norm, "layernorm"), "act": (act, "gelu")}
        check_compat(where, compat, **defaults, align_corners=(align_corners, False), norm_eps=(norm_eps, 1e-5))
        self.hidden_dim = check_size(where, "hidden_dim", hidden_dim)
        self.num_scales = check_size(where, "num_scales", num_scales)
        if dims is None:
            self.dims = halving_widths(where, hidden_dim, num_scales)
        else:
            self.dims = check_sizes(where, "dims", dims, num_scales)
        check_choice(where, "norm", norm, NORMS)
        check_choice(where, "act", act, tuple(ACTIVATIONS))
        check_number(where, "norm_eps", norm_eps, 0.0, math.inf)
        if not isinstance(align_corners, bool):
            refuse(TypeError, where, "align_corners", "a bool", align_corners)
        self.align_corners = align_corners
        self.fusion = nn.Sequential(
            nn.Linear(sum(self.dims), hidden_dim),
            nn.LayerNorm(hidden_dim, norm_eps) if norm == "layernorm" else nn.Identity(),
            ACTIVATIONS[act](),
            nn.Dropout(check_dropout(where, dropout)),
        )

    def forward(
        self,
        scale_features: Sequence[Tensor],
        grid_sizes: Sequence[Sequence[int]] | None = None,
        *,
        num_scales: int | None = None,
    ) -> Tensor:
        """Tokens [B, N_s, C_s] of S scales to [B, N_0, C].

        Args:
            scale_features: S tensors; the first sets the grid of the result.
            grid_sizes: S tuples of 1, 2 or 3 sizes, each with N_s cells, any ratio between them; left out, every N_s
                must be a square number.  Pass them wherever images may not be square.
            num_scales: features and grids are those of the first so many scales only; the others count as zeros.

        Raises:
            ValueError, TypeError: features or grids that do not fit.
        """
        count = check_active("CrossScaleFusion", num_scales, self.num_scales)
        features = check_scales("CrossScaleFusion", "scale_features", scale_features, self.dims[:count])
        grids = check_grids("CrossScaleFusion", "grid_sizes", features, grid_sizes, "scale_features")
        return self._fuse(features, grids)

    def _fuse(self, features: list[Tensor], grids: list[Grid]) -> Tensor:
        aligned = [
            resize_tokens(x, grid, grids[0], self.align_corners) for x, grid in zip(features, grids, strict=True)
        ]
        if missing := self.dims[len(features) :]:
            aligned.append(features[0].new_zeros(()).expand(*features[0].shape[:2], sum(missing)))
        return self.fusion(torch.cat(aligned, -1))


class AdaptiveFusion(nn.Module):
    """Weighted sum of all scales: sum_s softmax(scale_weights)_s P_s f_s on the grid of the first.

    Args:
        num_scales: S.
        dims: channels of each scale.
        hidden_dim: C, channels of the result.  With ``dims``, or ``hidden_dim`` (dims then C, C/2, C/4, ..., and
            hidden_dim by default dims[0]), P_s is a Linear of dims[s] to C; with neither, P_s is the identity and all
            scales have the same channels.
        compat: None, or "seed": the layer as first written, a weighted sum of S tensors of one shape, whatever that is.

    Parameters: ``scale_weights`` [S]; ``projections.s`` where there are projections.
    """

    def __init__(
        self,
        num_scales: int,
        dims: Sequence[int] | None = None,
        hidden_dim: int | None = None,
        *,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        where = "AdaptiveFusion"
        self.compat = check_compat(where, compat, dims=(dims, None), hidden_dim=(hidden_dim, None))
        self.num_scales = check_size(where, "num_scales", num_scales)
        self.scale_weights = nn.Parameter(torch.ones(num_scales))
        if hidden_dim is not None:
            check_size(where, "hidden_dim", hidden_dim)
        self.projections: nn.ModuleList | None = None
        if dims is not None:
            dims = check_sizes(where, "dims", dims, num_scales)
        elif hidden_dim is not None:
            dims = halving_widths(where, hidden_dim, num_scales)
        if dims is not None:
            hidden_dim = dims[0] if hidden_dim is None else hidden_dim
            self.projections = nn.ModuleList(nn.Linear(width, hidden_dim) for width in dims)
        self.dims, self.hidden_dim = dims, hidden_dim

    def forward(self, scale_features: Sequence[Tensor], grid_sizes: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Tokens [B, N_s, C_s] of S scales to [B, N_0, C], or pooled features [B, C_s] to [B, C].

        Args:
            scale_features: S tensors.
            grid_sizes: as in ``CrossScaleFusion.forward``; not needed where all N_s are equal.

        Raises:
            ValueError, TypeError: features or grids that do not fit.
        """
        where, name = "AdaptiveFusion", "scale_features"
        first = scale_features[0] if isinstance(scale_features, Sequence) and len(scale_features) else None
        if self.compat == "seed" and isinstance(first, Tensor):
            features = check_scales(where, name, scale_features, [None] * self.num_scales, first.dim())
            for s, x in enumerate(features):
                if x.shape != first.shape:
                    refuse(ValueError, where, f"{name}[{s}]", f"shape {tuple(first.shape)}, as {name}[0] has", x)
            return self._mix_pooled(features)
        pooled = isinstance(first, Tensor) and first.dim() == 2
        widths = self.dims
        if widths is None:
            widths = [first.shape[-1] if isinstance(first, Tensor) and first.dim() else None] * self.num_scales
        features = check_scales(where, name, scale_features, widths, 2 if pooled else 3)
        if pooled:
            if grid_sizes is not None:
                refuse(ValueError, where, "grid_sizes", "None beside pooled features", grid_sizes)
            return self._mix_pooled(features)
        same = all(x.shape[1] == features[0].shape[1] for x in features)
        if grid_sizes is None and same:
            grids = [(features[0].shape[1],)] * len(features)
        else:
            grids = check_grids(where, "grid_sizes", features, grid_sizes, name)
        return self._mix(features, grids)

    def _mix_pooled(self, features: list[Tensor]) -> Tensor:
        if self.projections is not None:
            features = [project(x) for x, project in zip(features, self.projections, strict=True)]
        return sum(w * x for w, x in zip(self.scale_weights.softmax(0), features, strict=True))

    def _mix(self, features: list[Tensor], grids: list[Grid]) -> Tensor:
        aligned = [resize_tokens(x, grid, grids[0]) for x, grid in zip(features, grids, strict=True)]
        return self._mix_pooled(aligned)

    def extra_repr(self) -> str:
        return f"num_scales={self.num_scales}, dims={self.dims}, hidden_dim={self.hidden_dim}"
