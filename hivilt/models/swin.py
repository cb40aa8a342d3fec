"""SwinTransformer on the modules of hivilt.nn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..reference import models as plain
from ..swap import accelerate


class SwinTransformer(plain.SwinTransformer):
    """The twin; its attentions run on kernels."""

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        accelerate(self)
