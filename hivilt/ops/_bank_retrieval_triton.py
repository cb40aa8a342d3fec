"""The Triton rows of bank retrieval: what they refuse.  Triton itself is imported when the first call that they can run
arrives."""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor

from .._backends import Row
from ._triton import DTYPES, guarded, why_no_device, why_no_dtype


@functools.cache
def _kernels() -> ModuleType:
    from ..triton_kernels import bank_retrieval_launch

    return bank_retrieval_launch


def why_not(query, *rest) -> str | None:
    """Every reason at once; None when there is none.  The dtypes of keys and values count too."""
    reasons = [why_no_device(query), why_no_dtype(query)]
    others = {x.dtype: None for x in rest[:4] if isinstance(x, Tensor) and x.dtype not in (*DTYPES, query.dtype)}
    reasons += [f"a tensor of {str(dtype)[6:]}: the kernels take float32, bfloat16 and float16" for dtype in others]
    return "; ".join(filter(None, reasons)) or None


def row(name: str) -> Row:
    """Of operator ``hivilt::<name>``, whose arguments without the backend it takes."""
    return Row("triton", why_not, guarded(lambda *args: getattr(_kernels(), name)(*args)))
