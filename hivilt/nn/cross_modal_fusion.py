"""Fusion of vision with text on hivilt.nn.MultiheadAttention, hivilt.ops.scale_fusion and hivilt.ops.token_pool."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import scale_fusion
from ..reference import modules as plain
from ._choice import Inner, kernel_exists, why_changed
from .token_pool import AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention


class LocalFusionModule(plain.LocalFusionModule):
    """The twin; joining a token with what it saw is one operator, and the concatenation that it reads is never written.

    Cost beside the attentions: 4 B (N_v + N_t) C C flops.  Second derivatives of f raise; its dropout mask is
    counter-based.  Where a module of ``fusion`` was replaced, hooked or parametrized, or no kernel takes the call, the
    twin works.
    """

    attention = MultiheadAttention

    def _fuse(self, rows: Tensor, seen: Tensor) -> Tensor:
        empty = rows.shape[1] == 0
        if empty or why_changed(join_parts(self)) or not kernel_exists("scale_fusion", rows.device.type, rows.dtype):
            return super()._fuse(rows, seen)
        linear, norm, _, dropout = self.fusion
        features = [rows, seen, rows * seen] if self.product else [rows, seen]
        return scale_fusion(
            features,
            linear.weight,
            linear.bias,
            grids=[(rows.shape[1],)] * len(features),
            norm="layer",
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            activation="gelu",
            dropout_p=dropout.p,
            training=dropout.training,
        )


def join_parts(module: plain.LocalFusionModule) -> list[Inner]:
    """What the operator reads of ``fusion``."""
    kinds = nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout
    if len(module.fusion) != len(kinds):
        return [Inner("fusion", module.fusion, ())]
    parts = [Inner(f"fusion.{i}", m, (kind,)) for i, (m, kind) in enumerate(zip(module.fusion, kinds, strict=True))]
    return [Inner("fusion", module.fusion, (nn.Sequential,)), *parts]


class GlobalFusionModule(plain.GlobalFusionModule):
    """The twin; each pool reads its tokens once."""

    attention = MultiheadAttention
    pooling = AdaptiveGlobalPooling


class FusionModule(plain.FusionModule):
    """The twin, of the modules of this room."""

    local_class = LocalFusionModule
    global_class = GlobalFusionModule


class SparseLocalFusion(plain.SparseLocalFusion):
    """The twin, whose attention never writes the scores.  Memory: O(B H N_v top_k)."""

    attention = MultiheadAttention


class CheckpointedFusionModule(plain.CheckpointedFusionModule):
    """The twin, of the modules of this room."""

    local_class = LocalFusionModule
    global_class = GlobalFusionModule
