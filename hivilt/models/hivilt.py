"""HiViLT on the modules of hivilt.nn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..reference import models as plain
from ..swap import accelerate


class HierarchicalViLTransformer(plain.HierarchicalViLTransformer):
    """The twin; attentions, pools and the joining of local fusion run on kernels, those inside the encoders too."""

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        vision_encoder: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(config, vision_encoder=vision_encoder, text_encoder=text_encoder, **settings)
        accelerate(self)
