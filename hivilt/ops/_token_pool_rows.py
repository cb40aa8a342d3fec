"""The operations of token_pool."""

from __future__ import annotations

from .. import _library
from . import _token_pool_reference as reference
from . import _token_pool_schema as schema
from ._running import build
from ._token_pool_triton import row

_library.load()

TOKEN_POOL = build("token_pool", "token_pool", schema, reference, row("token_pool"))
BACKWARD = build("token_pool_backward", "token_pool", schema, reference, row("token_pool_backward"))

_library.register_flops()
