"""The Triton rows of scale fusion and token interpolation: what they refuse.  Triton itself is imported when the first
call that they can run arrives."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from .._backends import Row, probe
from ._topk_attention_triton import _why_no_device

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


@functools.cache
def _kernels() -> ModuleType:
    from ..triton_kernels import scale_fusion_launch

    return scale_fusion_launch


def why_not(*args) -> str | None:
    """Every reason at once; None when there is none."""
    x = probe(args)
    absent = _why_no_device(x)
    reasons = [absent] if absent else []
    if x.dtype not in DTYPES:
        reasons.append(f"dtype {str(x.dtype)[6:]}: the kernels take float32, bfloat16 and float16")
    return "; ".join(reasons) or None


def row(name: str) -> Row:
    """Of operator ``hivilt::<name>``, whose arguments without the backend it takes."""
    return Row("triton", why_not, lambda *args: getattr(_kernels(), name)(*args))
