"""HiViT on the modules of hivilt.nn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..reference import models as plain
from ..reference.models.hivit import VARIANTS
from ..swap import accelerate


class HiViT(plain.HiViT):
    """The twin; attention, fusion, extraction and the bank run on kernels."""

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        accelerate(self)


class ProgressiveHiViT(plain.ProgressiveHiViT):
    """The twin; scales that are not active take no part in any kernel."""

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        accelerate(self)


def hivit_tiny(**options: Any) -> HiViT:
    """C = 96, 8 heads, 12 layers; ``options`` as for HiViT."""
    return HiViT(VARIANTS["tiny"], **options)


def hivit_small(**options: Any) -> HiViT:
    """C = 128, 8 heads, 12 layers; ``options`` as for HiViT."""
    return HiViT(VARIANTS["small"], **options)


def hivit_base(**options: Any) -> HiViT:
    """C = 192, 12 heads, 12 layers; ``options`` as for HiViT."""
    return HiViT(VARIANTS["base"], **options)


def hivit_large(**options: Any) -> HiViT:
    """C = 256, 16 heads, 24 layers; ``options`` as for HiViT."""
    return HiViT(VARIANTS["large"], **options)
