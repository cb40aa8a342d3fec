"""HiViT on the modules of hivilt.nn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..reference import models as plain
from ..reference.models.hivit import VARIANTS, of_size
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


hivit_tiny, hivit_small, hivit_base, hivit_large = (of_size(HiViT, name) for name in VARIANTS)
