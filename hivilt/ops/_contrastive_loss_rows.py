"""The operations of family D."""

from __future__ import annotations

from .. import _library
from . import _contrastive_loss_reference as reference
from . import _contrastive_loss_schema as schema
from ._contrastive_loss_triton import row
from ._running import build

_library.load()

CONTRASTIVE_LOSS = build("contrastive_loss", "contrastive_loss", schema, reference, row("contrastive_loss"))
BACKWARD = build("contrastive_loss_backward", "contrastive_loss", schema, reference, row("contrastive_loss_backward"))

_library.register_flops()
