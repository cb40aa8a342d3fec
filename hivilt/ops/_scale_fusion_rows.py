"""The operations of family B."""

from __future__ import annotations

from .. import _library
from . import _scale_fusion_reference as reference
from . import _scale_fusion_schema as schema
from ._running import build
from ._scale_fusion_triton import row

_library.load()

SCALE_FUSION = build("scale_fusion", "scale_fusion", schema, reference, row("scale_fusion"))
BACKWARD = build("scale_fusion_backward", "scale_fusion", schema, reference, row("scale_fusion_backward"))
INTERPOLATE = build("interpolate_tokens", "interpolate_tokens", schema, reference, row("interpolate_tokens"))
INTERPOLATE_DOT = build("interpolate_tokens_dot", "interpolate_add", schema, reference, row("interpolate_tokens_dot"))

_library.register_flops()
