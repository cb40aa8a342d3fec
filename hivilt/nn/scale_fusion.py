"""Layers that join scales, on hivilt.ops.scale_fusion and interpolate_add: no scale is written at the finest grid and
nothing is concatenated.  Constructors, parameters and meaning are those of the plain twins in hivilt.reference.modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import interpolate_add, interpolate_tokens, scale_fusion
from ..reference import modules as plain
from ..reference.modules.scale_fusion import Grid
from ._choice import Inner, kernel_exists, why_changed

ACTIVATION_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "none"}


class HierarchicalPatchEmbedding(plain.HierarchicalPatchEmbedding):
    """The twin, whose position table is resized token by token: its backward gathers, the same bits every time."""

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        table = self.pos_embed
        if grid == self.pos_grid or not kernel_exists("interpolate_add", table.device.type, table.dtype):
            return super()._positions(grid)
        return interpolate_tokens(table, self.pos_grid, grid)


class CrossScaleFusion(plain.CrossScaleFusion):
    """The twin in one operator: interpolation, projection, norm, activation and dropout.

    Cost: 2 B C sum_s min(N_s, N_0) C_s flops.  Memory beyond the result: one tensor like it where gradients are wanted.
    The dropout mask is counter-based, in steps of 2^-16 of probability; second derivatives raise.

    Where a module of ``fusion`` was replaced, hooked or parametrized, or no kernel takes the call, the twin works.
    """

    def _fuse(self, features: list[Tensor], grids: list[Grid]) -> Tensor:
        x = features[0]
        if why_changed(fusion_parts(self)) or not kernel_exists("scale_fusion", x.device.type, x.dtype):
            return super()._fuse(features, grids)
        linear, norm, act, dropout = self.fusion
        layer = isinstance(norm, nn.LayerNorm)
        weight = linear.weight
        if len(features) < self.num_scales:  # scales that are left out are zeros, which their columns would meet
            weight = weight[:, : sum(self.dims[: len(features)])]
        return scale_fusion(
            features,
            weight,
            linear.bias,
            grids=grids,
            norm="layer" if layer else "none",
            norm_weight=norm.weight if layer else None,
            norm_bias=norm.bias if layer else None,
            eps=norm.eps if layer else 1e-5,
            activation=activation_name(act),
            dropout_p=dropout.p,
            training=dropout.training,
            align_corners=self.align_corners,
        )


def fusion_parts(module: plain.CrossScaleFusion) -> list[Inner]:
    """What the operator reads of ``fusion``; another number of modules in it is a change of ``fusion`` itself."""
    if len(module.fusion) != 4:
        return [Inner("fusion", module.fusion, ())]
    kinds = (
        (nn.Linear,),
        (nn.LayerNorm, nn.Identity),
        (nn.GELU, *ACTIVATION_NAMES),
        (nn.Dropout,),
    )
    parts = [Inner(f"fusion.{i}", child, k) for i, (child, k) in enumerate(zip(module.fusion, kinds, strict=True))]
    return [Inner("fusion", module.fusion, (nn.Sequential,)), *parts]


def activation_name(act: nn.Module) -> str:
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return ACTIVATION_NAMES[type(act)]


class AdaptiveFusion(plain.AdaptiveFusion):
    """The twin for tokens: with projections one operator of the weighted weights, without them one pass per scale.

    Cost with projections: 2 B C sum_s min(N_s, N_0) C_s flops.  Second derivatives raise.
    """

    def _mix(self, features: list[Tensor], grids: list[Grid]) -> Tensor:
        x, projections = features[0], self.projections
        operation = "interpolate_add" if projections is None else "scale_fusion"
        if why_changed(projection_parts(self)) or not kernel_exists(operation, x.device.type, x.dtype):
            return super()._mix(features, grids)
        shares = self.scale_weights.softmax(0)
        if projections is None:
            out = features[0] * shares[0]
            for s in range(1, len(features)):
                out = interpolate_add(out, features[s], shares[s], grid=grids[s], out_grid=grids[0])
            return out
        # Interpolation weights of a place add up to 1, so the bias may be added behind it.
        weight = torch.cat([share * linear.weight for share, linear in zip(shares, projections, strict=True)], 1)
        biases = [s * linear.bias for s, linear in zip(shares, projections, strict=True) if linear.bias is not None]
        bias = sum(biases) if biases else None
        return scale_fusion(features, weight, bias, grids=grids, norm="none", activation="none")


def projection_parts(module: plain.AdaptiveFusion) -> list[Inner]:
    if module.projections is None:
        return []
    return [Inner(f"projections.{s}", linear, (nn.Linear,)) for s, linear in enumerate(module.projections)]
