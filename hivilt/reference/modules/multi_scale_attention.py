"""Attention among the tokens of several scales, in plain PyTorch: every scale over itself, the finest over the coarser.

Scale s has N_s tokens of C_s channels, C, C/2, C/4, ...; all attend with the full width C.  Written are the tokens of
each scale three times over (query, key, value); with ``need_weights`` also N_s x N_s probabilities per head.
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
    check_flag,
    check_grids,
    check_mask,
    check_scales,
    check_size,
    check_sizes,
    check_tensor,
    refuse,
)
from .scale_fusion import Grid, HierarchicalPatchEmbedding, halving_widths

MAX_POOLS = F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d


def masks_of_scales(mask: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """bool [B, N_s] of every scale from that of the first: a token takes part where any of the first that lies in its
    cell does."""
    fine, pool = mask.unflatten(1, grids[0])[:, None].float(), MAX_POOLS[len(grids[0]) - 1]
    return [mask, *(pool(fine, grid).flatten(1) > 0 for grid in grids[1:])]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(query key^T scale) value of [B, H, N, D]; a masked query, and one without keys, gives zeros."""
    if key_mask is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)
    some = key_mask.any(1, keepdim=True)
    keep = (key_mask | ~some)[:, None, None]  # softmax of no key at all is NaN, and so is its gradient
    out = F.scaled_dot_product_attention(query, key, value, keep, dropout_p, scale=scale)
    rows = some if query_mask is None else some & query_mask
    return torch.where(rows[:, None, :, None], out, 0.0)


def probabilities(query: Tensor, key: Tensor, key_mask: Tensor | None, query_mask: Tensor | None) -> Tensor:
    """What ``attend`` multiplies with values, [B, H, Q, N] in float32 at least: zeros where nothing is kept."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT * query.shape[-1] ** -0.5
    if key_mask is None:
        return scores.softmax(-1)
    some = key_mask.any(1, keepdim=True)
    shares = scores.masked_fill(~(key_mask | ~some)[:, None, None], -math.inf).softmax(-1)
    rows = some if query_mask is None else some & query_mask
    return torch.where(rows[:, None, :, None], shares, 0.0)


def check_heads(where: str, hidden_dim: Any, num_heads: Any) -> tuple[int, int]:
    """hidden_dim and num_heads, of which the first is a multiple of the second."""
    C, H = check_size(where, "hidden_dim", hidden_dim), check_size(where, "num_heads", num_heads)
    if C % H:
        refuse(ValueError, where, "num_heads", f"a divisor of hidden_dim = {C}", num_heads)
    return C, H


def check_masks(where: str, name: str, masks: Any, features: Sequence[Tensor]) -> list[Tensor]:
    """A bool mask [B, N_s] per scale."""
    if isinstance(masks, Tensor) or not isinstance(masks, Sequence) or len(masks) != len(features):
        refuse(ValueError, where, name, f"{len(features)} tensors (B, N), one per scale", masks)
    return [
        check_mask(where, f"{name}[{s}]", mask, tuple(x.shape[:2]))
        for s, (mask, x) in enumerate(zip(masks, features, strict=True))
    ]


class MultiScaleAttention(nn.Module):
    """Self-attention of every scale: out_s = projs_s(softmax(q k^T / sqrt(C / H)) v), q, k, v = qkv_projections_s(x_s).

    Args:
        hidden_dim: C; scale s has C / 2^s channels and attends with C.
        num_heads: H, a divisor of C.
        dropout: of the attention probabilities.
        num_scales: S.
        compat: None, or "seed": one ``proj`` C -> C for all scales, so results are C wide; ``attention_weights`` is
            always there, as the tensor of the last scale, dropout included; a mask, then the second argument, is a
            float that is added to the scores of every scale.

    Parameters: ``qkv_projections.s`` (C_s -> 3 C); ``projs.s`` (C -> C_s).
    """

    def __init__(
        self, hidden_dim: int, num_heads: int, dropout: float = 0.1, num_scales: int = 3, *, compat: str | None = None
    ) -> None:
        super().__init__()
        where = "MultiScaleAttention"
        self.hidden_dim, self.num_heads = check_heads(where, hidden_dim, num_heads)
        self.head_dim = hidden_dim // num_heads
        self.num_scales = check_size(where, "num_scales", num_scales)
        self.dims = halving_widths(where, hidden_dim, num_scales)
        self.compat = None if compat is None else check_choice(where, "compat", compat, ("seed",))
        self.qkv_projections = nn.ModuleList(nn.Linear(width, 3 * hidden_dim) for width in self.dims)
        if compat == "seed":
            self.proj = nn.Linear(hidden_dim, hidden_dim)
        else:
            self.projs = nn.ModuleList(nn.Linear(hidden_dim, width) for width in self.dims)
        self.dropout = nn.Dropout(check_dropout(where, dropout))

    def forward(
        self,
        features: Sequence[Tensor],
        need_weights: bool = False,
        attention_mask: Tensor | Sequence[Tensor] | None = None,
        grid_sizes: Sequence[Sequence[int]] | None = None,
        *,
        num_scales: int | None = None,
    ) -> dict[str, Any]:
        """Every scale attends to itself.

        Args:
            features: S tensors [B, N_s, C_s].
            need_weights: also return the probabilities.
            attention_mask: bool or integer [B, N_0], True or 1 takes part.  A token of another scale takes part where
                any of these lies in its cell.  Or S such masks [B, N_s].  What other tokens hold does not matter, NaN
                included; they give the bias of ``projs.s``.
            grid_sizes: S tuples of 1, 2 or 3 sizes with N_s cells each, asked for only beside one mask; left out, every
                N_s must be a square number.
            num_scales: features are the first so many scales only.

        Returns:
            dict: ``scale_features``, S tensors [B, N_s, C_s]; ``attention_weights``, None or S tensors [B, H, N_s, N_s]
            in float32 at least, before dropout.

        Raises:
            ValueError, TypeError: an argument that does not fit.

        Cost beside the projections: 4 B C sum_s N_s^2 flops; memory O(sum_s N_s C), with need_weights O(H sum_s N_s^2).
        """
        where = "MultiScaleAttention"
        count = check_active(where, num_scales, self.num_scales)
        features = check_scales(where, "features", features, self.dims[:count])
        if self.compat == "seed" and isinstance(need_weights, Tensor):
            need_weights, attention_mask = False, need_weights
        check_flag(where, "need_weights", need_weights)
        if self.compat == "seed":
            return self._as_seed(features, attention_mask)
        masks: Sequence[Tensor | None] = [None] * count
        if isinstance(attention_mask, Sequence):
            masks = check_masks(where, "attention_mask", attention_mask, features)
        elif attention_mask is not None:
            mask = check_mask(where, "attention_mask", attention_mask, tuple(features[0].shape[:2]))
            masks = masks_of_scales(mask, check_grids(where, "grid_sizes", features, grid_sizes, "features"))
        outputs, weights = [], []
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        for s, (x, mask) in enumerate(zip(features, masks, strict=True)):
            if mask is not None:
                x = torch.where(mask[..., None], x, 0.0)  # hidden NaN must not meet a probability of 0
            q, k, v = self._heads(s, x)
            if need_weights:
                shares = probabilities(q, k, mask, mask)
                weights.append(shares)
                out = F.dropout(shares, dropout_p).to(v.dtype) @ v
            else:
                out = self._attend(q, k, v, mask, dropout_p)
            outputs.append(self.projs[s](out.transpose(1, 2).flatten(2)))
        return {"scale_features": outputs, "attention_weights": weights if need_weights else None}

    def _heads(self, s: int, x: Tensor) -> list[Tensor]:
        """q, k, v [B, H, N, D], views of one product."""
        qkv = self.qkv_projections[s](x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return [part.transpose(1, 2) for part in qkv.unbind(2)]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
        return attend(q, k, v, mask, mask, dropout_p)

    def _as_seed(self, features: list[Tensor], attention_mask: Tensor | None) -> dict[str, Any]:
        outputs, shares = [], None
        for s, x in enumerate(features):
            q, k, v = self._heads(s, x)
            scores = q @ k.mT * self.head_dim**-0.5
            if attention_mask is not None:
                scores = scores + attention_mask
            shares = self.dropout(scores.softmax(-1))
            outputs.append(self.proj((shares @ v).transpose(1, 2).flatten(2)))
        return {"scale_features": outputs, "attention_weights": shares}

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, num_scales={self.num_scales}"


class CrossScaleAttention(nn.Module):
    """The finest tokens attend to all coarser ones, which are not resized: out = x_0 + out_proj(attend(q_0, k, v)).

    q_0 = q_proj(norm_0(x_0)); k, v = kv_projections(norm_s(x_s)) of the scales s >= 1, one behind the other.

    Args:
        hidden_dim: C; scale s has C / 2^s channels.
        num_heads: H, a divisor of C.
        dropout: of the attention probabilities.
        num_scales: S, at least 2.

    Parameters: ``norms.s``, ``q_proj``, ``kv_projections.(s - 1)`` (C_s -> 2 C), ``out_proj``.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float = 0.1, num_scales: int = 3) -> None:
        super().__init__()
        where = "CrossScaleAttention"
        self.hidden_dim, self.num_heads = check_heads(where, hidden_dim, num_heads)
        self.head_dim = hidden_dim // num_heads
        if check_size(where, "num_scales", num_scales) < 2:
            refuse(ValueError, where, "num_scales", "at least 2, for there to be a coarser scale", num_scales)
        self.num_scales = num_scales
        self.dims = halving_widths(where, hidden_dim, num_scales)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.dims)
        self.q_proj = nn.Linear(hidden_dim, hidden_dim)
        self.kv_projections = nn.ModuleList(nn.Linear(width, 2 * hidden_dim) for width in self.dims[1:])
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        self.dropout = nn.Dropout(check_dropout(where, dropout))

    def forward(
        self,
        scale_features: Sequence[Tensor],
        grid_sizes: Sequence[Sequence[int]] | None = None,
        *,
        masks: Sequence[Tensor] | None = None,
        num_scales: int | None = None,
    ) -> Tensor:
        """Tokens [B, N_s, C_s] of S scales to [B, N_0, C].

        Args:
            scale_features: S tensors.
            grid_sizes: not looked at: tokens are not resized.  It is there so that this takes the place of
                ``CrossScaleFusion``.
            masks: bool or integer [B, N_s] of every scale, True or 1 takes part; masked tokens may hold anything.
            num_scales: the first so many scales only; with 1 the result is x_0.

        Raises:
            ValueError, TypeError: features or masks that do not fit.

        Cost beside the projections: 4 B C N_0 sum_(s >= 1) N_s flops.
        """
        where = "CrossScaleAttention"
        count = check_active(where, num_scales, self.num_scales)
        features = check_scales(where, "scale_features", scale_features, self.dims[:count])
        query_mask, key_mask = None, None
        if masks is not None:
            masks = check_masks(where, "masks", masks, features)
            features = [torch.where(mask[..., None], x, 0.0) for mask, x in zip(masks, features, strict=True)]
            query_mask, key_mask = masks[0], torch.cat(masks[1:], 1) if count > 1 else None
        if count == 1:
            return features[0]
        heads = self.num_heads, self.head_dim
        q = self.q_proj(self.norms[0](features[0])).unflatten(-1, heads).transpose(1, 2)
        parts = zip(features[1:], self.norms[1:], self.kv_projections, strict=False)  # fewer features, if num_scales
        kv = torch.cat([project(norm(x)) for x, norm, project in parts], 1).unflatten(-1, (2, *heads))
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        out = self._attend(q, k, v, key_mask, query_mask, dropout_p).transpose(1, 2).flatten(2)
        return features[0] + self.out_proj(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask, query_mask, dropout_p: float) -> Tensor:
        return attend(q, k, v, key_mask, query_mask, dropout_p)

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_heads={self.num_heads}, num_scales={self.num_scales}"


class ScaleExtraction(nn.Module):
    """Gives every scale its share of fused tokens: projs_s(mean of the fused tokens over the area of a token of s).

    Args:
        hidden_dim: C of the fused tokens; scale s gets C / 2^s channels.
        num_scales: S.

    Parameters: ``projs.s`` (C -> C_s).
    """

    def __init__(self, hidden_dim: int, num_scales: int = 3) -> None:
        super().__init__()
        where = "ScaleExtraction"
        self.hidden_dim = check_size(where, "hidden_dim", hidden_dim)
        self.num_scales = check_size(where, "num_scales", num_scales)
        self.dims = halving_widths(where, hidden_dim, num_scales)
        self.projs = nn.ModuleList(nn.Linear(hidden_dim, width) for width in self.dims)

    def forward(
        self, fused: Tensor, grid_sizes: Sequence[Sequence[int]], *, masks: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Tokens [B, N_0, C] to [B, N_s, C_s] of the scales in ``grid_sizes``, which may be the first ones only.

        Args:
            fused: tokens of the first grid.
            grid_sizes: tuples of 1, 2 or 3 sizes.
            masks: bool [B, N_s] of every scale, True takes part: means are over the tokens of ``fused`` that do, and 0
                where there are none.

        Raises:
            ValueError, TypeError: fused, grids or masks that do not fit.
        """
        where = "ScaleExtraction"
        check_tensor(where, "fused", fused, "(B, N, C)", 3)
        if fused.shape[2] != self.hidden_dim:
            refuse(ValueError, where, "fused", f"{self.hidden_dim} channels", fused)
        if isinstance(grid_sizes, str | Tensor) or not isinstance(grid_sizes, Sequence):
            refuse(TypeError, where, "grid_sizes", "tuples of sizes, one per scale", grid_sizes)
        if not 1 <= len(grid_sizes) <= self.num_scales:
            refuse(ValueError, where, "grid_sizes", f"1 to {self.num_scales} tuples of sizes", len(grid_sizes))
        grids = check_grids(where, "grid_sizes", [fused], [grid_sizes[0]], "fused")
        grids += [check_sizes(where, f"grid_sizes[{s}]", g, len(grids[0])) for s, g in enumerate(grid_sizes) if s]
        if masks is None:
            return [proj(self._pool(fused, grids[0], g)) for proj, g in zip(self.projs, grids, strict=False)]
        if isinstance(masks, Tensor) or not isinstance(masks, Sequence) or len(masks) != len(grids):
            refuse(ValueError, where, "masks", f"{len(grids)} tensors (B, N), one per scale", masks)
        mask = check_mask(where, "masks[0]", masks[0], tuple(fused.shape[:2]))
        fused = torch.where(mask[..., None], fused, 0.0)
        outputs = []
        for proj, grid in zip(self.projs, grids, strict=False):
            covered = pool_tokens(mask[..., None].to(fused.dtype), grids[0], grid)  # share of the area that takes part
            mean = self._pool(fused, grids[0], grid) / torch.where(covered > 0, covered, 1.0)
            outputs.append(proj(mean))
        return outputs

    def _pool(self, x: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
        return pool_tokens(x, grid, out_grid)

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, num_scales={self.num_scales}"


def pool_tokens(x: Tensor, grid: Grid, out_grid: Grid) -> Tensor:
    """Tokens [B, prod(grid), C] to [B, prod(out_grid), C], means over areas as in adaptive average pooling."""
    if grid == out_grid:
        return x
    maps = F.interpolate(x.transpose(1, 2).unflatten(2, grid), size=out_grid, mode="area")
    return maps.flatten(2).transpose(1, 2)


class FlashMultiScaleAttention(nn.Module):
    """Attention without a table of probabilities, over tensors of flash-attention's layout [B, N, H, D].

    Args:
        dropout: of the attention probabilities.
        scale: of the scores, 1 / sqrt(D) by default.
    """

    def __init__(self, dropout: float = 0.0, scale: float | None = None) -> None:
        super().__init__()
        self.dropout = check_dropout("FlashMultiScaleAttention", dropout)
        self.scale = scale
        if scale is not None:
            self.scale = check_number("FlashMultiScaleAttention", "scale", scale, -math.inf, math.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """q [B, Q, H, D], k [B, N, H, D], v [B, N, H, E] to [B, Q, H, E].

        Args:
            key_mask: bool or integer [B, N], True or 1 takes part; other keys and values may hold anything.  Without a
                key that takes part the result is zeros.

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where = "FlashMultiScaleAttention"
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tensor(where, name, x, "(B, N, H, D)", 4)
        if (k.shape[0], k.shape[2], k.shape[3]) != (q.shape[0], q.shape[2], q.shape[3]):
            refuse(ValueError, where, "k", f"shape ({q.shape[0]}, N, {q.shape[2]}, {q.shape[3]})", k)
        if v.shape[:3] != k.shape[:3]:
            refuse(ValueError, where, "v", f"shape {(*k.shape[:3], 'E')}", v)
        if key_mask is not None:
            key_mask = check_mask(where, "key_mask", key_mask, (k.shape[0], k.shape[1]))
            k, v = (torch.where(key_mask[..., None, None], x, 0.0) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self._attend(q, k, v, key_mask, self.dropout if self.training else 0.0).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, dropout_p: float) -> Tensor:
        return attend(q, k, v, key_mask, None, dropout_p, self.scale)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, scale={self.scale}"


class EfficientScaleProcessor(nn.ModuleDict):
    """The patch embeddings of all scales, from one call: scale s has patches of P 2^s and C / 2^s channels.

    Args:
        scales: S.
        hidden_dim: C.
        patch_size: P.
        in_channels: of the image.
        pos_size: (H, W) of images for which every scale gets a learned position table; None: no tables.

    Parameters: ``scale_s``, a ``HierarchicalPatchEmbedding`` each.
    """

    embedding: type[HierarchicalPatchEmbedding] = HierarchicalPatchEmbedding

    def __init__(
        self,
        scales: int,
        hidden_dim: int,
        patch_size: int = 16,
        in_channels: int = 3,
        *,
        pos_size: Sequence[int] | None = None,
    ) -> None:
        where = "EfficientScaleProcessor"
        check_size(where, "scales", scales)
        widths = halving_widths(where, check_size(where, "hidden_dim", hidden_dim), scales)
        sides = [check_size(where, "patch_size", patch_size) << s for s in range(scales)]
        check_size(where, "in_channels", in_channels)
        grids: list[Grid | None] = [None] * scales
        if pos_size is not None:
            if min(pos_size := check_sizes(where, "pos_size", pos_size, 2)) < sides[-1]:
                refuse(ValueError, where, "pos_size", f"at least the coarsest patch, {sides[-1]}", pos_size)
            grids = [tuple(n // side for n in pos_size) for side in sides]
        super().__init__(
            {f"scale_{s}": self.embedding(in_channels, widths[s], sides[s], pos_grid=grids[s]) for s in range(scales)}
        )

    def forward(
        self, x: Tensor, return_grid: bool = False, *, num_scales: int | None = None
    ) -> list[Tensor] | tuple[list[Tensor], list[Grid]]:
        """Image [B, in_channels, H, W] to tokens [B, N_s, C_s] per scale; with return_grid also their grids.

        Args:
            num_scales: only the first so many scales.

        Raises:
            ValueError, TypeError: x is no such image, or smaller than a patch of a scale.
        """
        count = check_active("EfficientScaleProcessor", num_scales, len(self))
        found = [self[f"scale_{s}"](x, return_grid=True) for s in range(count)]
        tokens, grids = [t for t, _ in found], [grid for _, grid in found]
        return (tokens, grids) if return_grid else tokens
