"""An int8 copy of a feature bank, by which few queries find their rows, the exact ones: docs/bank_retrieval.md says
why."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from .._backends import BackendError
from ._checks import Said, check_tensor, refuse
from ._running import eager, why_not_cpu

SHADOW_QUERIES = 64  # with more, multiplying takes longer than reading, and scoring again more than it saves
FACTS = 16  # bytes behind the codes of a row: step, norm, residue (float32) and -128 times the sum of its codes (int32)


def bank_shadow(keys: Tensor, *, shadow: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    """The rows of a bank in bytes, for ``bank_retrieval(..., shadow=...)``.

    A row is step * codes with step = max |row| / 127, codes rounded to nearest.  Beside them stand upper bounds of its
    length and of what rounding took, from which retrieval proves that it misses no row.

    Args:
        keys: float32, bfloat16 or float16 [M, C], on the CPU.
        shadow: written in place, and returned: what an earlier call returned for a bank of this shape.
        slots: int64 [B], the rows that changed since; all by default, and only with ``shadow``.

    Returns:
        int8 [M, C rounded up to 16, + 16].

    Raises:
        ValueError, TypeError: a malformed argument, before anything is written.  BackendError: the C++ kernels are
        missing, or keys are not on the CPU or of another dtype.

    Cost: one pass over the rows that are written.
    """
    op = "bank_shadow"
    check_tensor(op, "keys", keys, 2, "(M, C)")
    reason = why_not_cpu(keys)
    if reason:
        raise BackendError(f"{op}: only the cpu backend makes one: {reason}")
    M, C = keys.shape
    if shadow is None:
        if slots is not None:
            refuse(ValueError, op, "slots", "None, because there is no shadow yet", slots)
        shadow = torch.zeros(M, _row_bytes(C), dtype=torch.int8)
    else:
        check_shadow(op, shadow, keys)
    if slots is not None:
        if not isinstance(slots, Tensor) or slots.layout is not torch.strided or slots.dtype != torch.int64:
            refuse(TypeError, op, "slots", "a dense int64 tensor (B,)", slots)
        if slots.dim() != 1 or not slots.is_cpu:
            refuse(ValueError, op, "slots", "one dimension, on the CPU", slots)
        if bool(((slots < 0) | (slots >= M)).any()):
            refuse(ValueError, op, "slots", f"values from 0 to {M - 1}", Said("one outside"))
    WRITE(keys.detach(), shadow, slots)
    return shadow


def is_used(keys: Tensor) -> bool:
    """Whether retrieval from these keys would look at a shadow, and one can be kept of them: what a transform or a fake
    mode wraps has no memory."""
    return eager(keys) and why_not_cpu(keys) is None and torch.ops.hivilt.isa() == "avx512_bf16"


def check_shadow(op: str, shadow: Tensor, keys: Tensor) -> None:
    if not isinstance(shadow, Tensor) or shadow.layout is not torch.strided or shadow.dtype != torch.int8:
        refuse(TypeError, op, "shadow", "an int8 tensor that bank_shadow made", shadow)
    shape = (keys.shape[0], _row_bytes(keys.shape[1]))
    if tuple(shadow.shape) != shape or not shadow.is_contiguous() or shadow.device != keys.device:
        refuse(ValueError, op, "shadow", f"a contiguous tensor of shape {shape} on {keys.device}", shadow)


def _row_bytes(width: int) -> int:
    return (width + 15) // 16 * 16 + FACTS


WRITE = _library.define(
    "bank_shadow_cpu(Tensor keys, Tensor(a!) shadow, Tensor? slots) -> ()", fake=lambda keys, shadow, slots: None
)
