"""Visual question answering on the modules of hivilt.nn."""

from __future__ import annotations

from torch import nn

from ..reference import models as plain
from ..swap import accelerate


class VQAFusionModel(plain.VQAFusionModel):
    """The twin; attentions and pool run on kernels, those inside the encoders too where they are torch's."""

    def __init__(
        self,
        vision: nn.Module | None,
        text: nn.Module | None,
        fusion: nn.Module,
        num_answers: int,
        *,
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__(vision, text, fusion, num_answers, prefix_tokens=prefix_tokens)
        accelerate(self)
