"""The Triton rows of token_pool; what they refuse is what those of scale fusion refuse."""

from __future__ import annotations

import functools
from types import ModuleType

from .._backends import Row
from ._scale_fusion_triton import why_not
from ._triton import guarded


@functools.cache
def _kernels() -> ModuleType:
    from ..triton_kernels import token_pool_launch

    return token_pool_launch


def row(name: str) -> Row:
    """Of operator ``hivilt::<name>``, whose arguments without the backend it takes."""
    return Row("triton", why_not, guarded(lambda *args: getattr(_kernels(), name)(*args)))
