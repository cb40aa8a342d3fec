"""The calls of scale fusion, token interpolation and token pooling whose kernels are compiled; see ``calls.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..triton_kernels import scale_fusion_launch, token_pool_launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def blank(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Fusion:
    """One call of scale_fusion, forward and backward: three scales, each half as wide as the one before."""

    width: int = 192  # channels of the output and of the first scale
    dtype: str = "bf16"
    grids: tuple = ((56, 56), (28, 28), (14, 14))
    out_grid: tuple = ()  # (): that of the first scale
    batch: int = 16
    norm: str = "layer"
    activation: str = "gelu"
    dropout: bool = False
    prefix: int = 0
    mode: str = "linear"
    impl: str = "auto"
    scales: int = 0  # channels of the first scale; 0: as many as the output
    inference: bool = False
    kernel: str = ""

    def __str__(self) -> str:
        sizes = ["x".join(map(str, grid)) for grid in (self.grids[0], self.out_grid) if grid]
        words = ["fusion", f"B{self.batch}", f"O{self.width}", "to".join(sizes), self.norm, self.activation]
        words += [f"C{self.scales}"] if self.scales else []
        words += [word for word in ("dropout", "inference") if getattr(self, word)]
        words += [f"P{self.prefix}"] if self.prefix else []
        words += [word for word in (self.mode, self.impl) if word not in ("linear", "auto")]
        return "-".join(words)

    def run(self) -> None:
        """Makes the call, to be written down by ``launch.recording``."""
        dtype, first = DTYPES[self.dtype], self.scales or self.width
        widths = [max(1, first >> s) for s in range(len(self.grids))]
        out_grid, B, P = self.out_grid or self.grids[0], self.batch, self.prefix
        features = [
            blank(B, P + prod(grid), width, dtype=dtype) for grid, width in zip(self.grids, widths, strict=True)
        ]
        weight, bias = blank(self.width, sum(widths), dtype=dtype), blank(self.width, dtype=dtype)
        norms = [None if self.norm == "none" else blank(self.width, dtype=torch.float32) for _ in range(2)]
        seed, p = (blank(1, dtype=torch.int64), 0.1) if self.dropout else (None, 0.0)
        how = (seed, [n for grid in self.grids for n in grid], list(out_grid), self.norm, 1e-5, self.activation, p,
               self.mode, False, P, self.impl)  # fmt: skip
        save = not self.inference and (self.norm, self.activation) != ("none", "none")
        out, linear = scale_fusion_launch.scale_fusion(features, weight, bias, *norms, *how, save)
        if not self.inference:
            scale_fusion_launch.scale_fusion_backward(
                torch.empty_like(out), features, weight, *norms, linear, *how, True, True
            )


@dataclass(frozen=True)
class Interpolation:
    """One call of interpolate_add with a learned scale, and its gradients."""

    grid: tuple = (28, 28)
    out_grid: tuple = (56, 56)
    width: int = 192
    dtype: str = "bf16"
    batch: int = 16
    mode: str = "linear"
    kernel: str = ""

    def __str__(self) -> str:
        sizes = ["x".join(map(str, grid)) for grid in (self.grid, self.out_grid)]
        return f"interpolate-B{self.batch}-C{self.width}-{'to'.join(sizes)}-{self.mode}"

    def run(self) -> None:
        """Makes the call, to be written down by ``launch.recording``."""
        dtype, scale = DTYPES[self.dtype], blank(1, dtype=torch.float32)
        y, x = (blank(self.batch, prod(grid), self.width, dtype=dtype) for grid in (self.grid, self.out_grid))
        how = (list(self.grid), list(self.out_grid), len(self.grid), self.mode, False)
        scale_fusion_launch.interpolate_tokens(y, x, scale, 1.0, *how, False)
        scale_fusion_launch.interpolate_tokens(x, None, scale, 1.0, *how, True)
        scale_fusion_launch.interpolate_tokens_dot(x, y, 1.0, *how)


@dataclass(frozen=True)
class Pool:
    """One call of token_pool, forward and backward."""

    tokens: int = 3136
    width: int = 192
    dtype: str = "bf16"
    batch: int = 16
    hidden: int = 0  # 0: half the width
    masked: bool = False
    pools: tuple = (0, 1, 2)
    kernel: str = ""

    def __str__(self) -> str:
        words = ["pool", f"B{self.batch}", f"N{self.tokens}", f"C{self.width}", "".join(map(str, self.pools))]
        return "-".join(words + (["masked"] if self.masked else []))

    def run(self) -> None:
        """Makes the call, to be written down by ``launch.recording``."""
        dtype, K, C = DTYPES[self.dtype], self.hidden or self.width // 2, self.width
        x = blank(self.batch, self.tokens, C, dtype=dtype)
        layer = [blank(*shape, dtype=dtype) if 2 in self.pools else None for shape in ((K, C), (K,), (1, K), (1,))]
        shares = blank(len(self.pools), dtype=torch.float32)
        mask = blank(self.batch, self.tokens, dtype=torch.bool) if self.masked else None
        out, *saved = token_pool_launch.token_pool(x, *layer, shares, mask, self.pools)
        token_pool_launch.token_pool_backward(torch.empty_like(out), x, *layer[:3], shares, mask, *saved, self.pools)


def fusion_calls() -> Iterator[Fusion | Interpolation | Pool]:
    """The table; what is told apart first comes first."""
    stage = Fusion(dropout=True)
    for dtype in DTYPES:
        for width in (96, 128, 192, 256):
            yield replace(stage, width=width, dtype=dtype)
            yield replace(stage, width=width, dtype=dtype, inference=True, dropout=False)
        for width in (384, 512, 768, 1024, 1536):
            for kernel in ("_scale_fusion", "_finish", "_row_statistics"):
                yield replace(stage, width=width, dtype=dtype, scales=256, kernel=kernel)
    # Decode heads; heads of other sizes; either order of steps where the other is chosen.
    for dtype in DTYPES:
        yield Fusion(768, dtype, ((128, 128), (64, 64), (32, 32)), norm="affine", activation="relu", scales=256)
        yield Fusion(40, dtype, ((14, 14), (7, 7), (3, 3)), batch=1, dropout=True)
        for impl in ("prologue", "epilogue"):
            for width in (96, 256):
                yield replace(stage, width=width, dtype=dtype, impl=impl, kernel="_scale_fusion")
    for activation in ("gelu_tanh", "silu", "none"):
        yield replace(stage, activation=activation, kernel="fusion")
        yield replace(stage, norm="none", activation=activation, kernel="_finish")
    yield replace(stage, prefix=1)
    yield replace(stage, width=100, prefix=1)
    yield replace(stage, mode="area", out_grid=(14, 14))
    yield replace(stage, grids=((784,), (392,), (196,)))
    yield replace(stage, grids=((8, 14, 14), (4, 7, 7), (2, 4, 4)), prefix=1)

    for dtype in DTYPES:
        yield Interpolation(dtype=dtype)
        yield Interpolation((784,), (3136,), dtype=dtype)
        yield Interpolation((4, 4), (64, 64), 24, dtype=dtype, mode="area")
        for width in (64, 192, 256, 384, 1024):
            yield Pool(width=width, dtype=dtype)
    yield Interpolation((2, 4, 4), (8, 14, 14))
    yield Pool(masked=True)
    yield Pool(width=100, hidden=33, tokens=200, masked=True)
    yield from (Pool(pools=pools) for pools in ((0,), (1,), (0, 1), (2,)))
