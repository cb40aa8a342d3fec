"""The block of vision transformers in plain PyTorch: x + attention(norm(x)), then x + mlp(norm(x))  (arXiv 2010.11929).

Parameter names are timm's and those of the DeiT and Swin repositories.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._bank_arguments import check_number
from ._checks import check_choice, check_dropout, check_flag, check_size, check_tensor, refuse
from ._heads import attend, check_heads, merge_heads, project, split_heads

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class Mlp(nn.Module):
    """dropout(fc2(act(fc1(x)))): [..., dim] to [..., dim] through ``hidden`` channels."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        where = "Mlp"
        check_size(where, "dim", dim)
        check_size(where, "hidden", hidden)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act = ACTIVATIONS[check_choice(where, "activation", activation, tuple(ACTIVATIONS))]()
        self.drop = nn.Dropout(check_dropout(where, dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class DropPath(nn.Module):
    """Drops whole samples of a residual branch while training, and scales the rest up  (arXiv 1603.09382)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = check_dropout("DropPath", p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.p == 1.0:
            return torch.zeros_like(x)
        kept = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), device=x.device) >= self.p
        return x * (kept.to(x.dtype) / (1.0 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class SelfAttention(nn.Module):
    """Attention of tokens [B, N, dim] among themselves.

    Args:
        dim: C.
        num_heads: divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        attn_drop, proj_drop: dropout of the probabilities and of the result.

    Parameters: ``qkv``, ``proj``.
    """

    _attend = staticmethod(attend)

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, *, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        check_heads("SelfAttention", dim, num_heads)
        check_flag("SelfAttention", "qkv_bias", qkv_bias)
        self.dim, self.num_heads = dim, num_heads
        self.attn_drop = check_dropout("SelfAttention", attn_drop)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(check_dropout("SelfAttention", proj_drop))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]; ValueError or TypeError for anything else."""
        check_tensor("SelfAttention", "x", x, "(B, N, C)", 3)
        if x.shape[2] != self.dim:
            refuse(ValueError, "SelfAttention", "x", f"{self.dim} channels", x)
        q, k, v = (split_heads(part, self.num_heads) for part in project(self.qkv, x, 3))
        out = self._attend(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(merge_heads(out)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class VisionBlock(nn.Module):
    """A pre-norm transformer block: ``norm1``, ``attn``, ``norm2``, ``mlp.fc1``, ``mlp.fc2``.

    Args:
        dim, num_heads, qkv_bias: of the attention.
        mlp_ratio: hidden channels of the mlp over dim, or ``hidden`` itself.
        dropout: of both branches; attn_drop: of the probabilities; drop_path: of whole branches.
        eps: of the norms; activation: of the mlp, one of ACTIVATIONS.
    """

    attention: type[nn.Module] = SelfAttention

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        *,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        activation: str = "gelu",
        hidden: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_heads(where, dim, num_heads)
        check_number(where, "mlp_ratio", mlp_ratio, 0.0, math.inf)
        check_number(where, "eps", eps, 0.0, math.inf)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = self.attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=dropout, **options)
        self.mlp = Mlp(dim, int(dim * mlp_ratio) if hidden is None else hidden, activation, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
