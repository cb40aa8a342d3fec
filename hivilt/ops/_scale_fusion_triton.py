"""The Triton rows of scale fusion and token interpolation: what they refuse.  Triton itself is imported when the first
call that they can run arrives."""

from __future__ import annotations

import functools
from types import ModuleType

from .._backends import Row, probe
from ._triton import guarded, why_no_device, why_no_dtype


@functools.cache
def _kernels() -> ModuleType:
    from ..triton_kernels import scale_fusion_launch

    return scale_fusion_launch


def why_not(*args) -> str | None:
    """Every reason at once; None when there is none."""
    x = probe(args)
    return "; ".join(filter(None, (why_no_device(x), why_no_dtype(x)))) or None


def row(name: str) -> Row:
    """Of operator ``hivilt::<name>``, whose arguments without the backend it takes."""
    return Row("triton", why_not, guarded(lambda *args: getattr(_kernels(), name)(*args)))
