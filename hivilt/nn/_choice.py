"""Whether a module takes its operator or its plain twin.

The operator reads parameters of inner modules without calling them, so nobody may have changed those; and, unless a
backend was asked for, there must be a kernel for the call.
"""

from __future__ import annotations

import torch

from .._backends import policy
from ..ops._bank_retrieval_rows import BANK_RETRIEVAL
from ..ops._scale_fusion_rows import INTERPOLATE, SCALE_FUSION
from ..ops._token_pool_rows import TOKEN_POOL
from ..ops._topk_attention_rows import TOPK_ATTENTION
from ..reference.modules._inner import PLAIN_TENSORS, Inner, why_changed

__all__ = ["MARK", "PLAIN_TENSORS", "Inner", "kernel_exists", "why_changed"]

MARK = "_hivilt_swapped"  # in the __dict__ of an instance that accelerate made: the class it had before


# For each operation, the arguments of an empty call on a tensor x [0, 1, width].  bank_attention is topk_attention.
EMPTY_CALLS = {
    "bank_retrieval": (
        BANK_RETRIEVAL,
        lambda x: (x[:, 0], x[:, 0], None, 1, None, 1.0, None, None, None, None, "exact", False),
    ),
    "bank_attention": (TOPK_ATTENTION, lambda x: (x[:, None], x[:, None], x[:, None], -1, 0, *[None] * 8, 1.0, 0.0)),
    "scale_fusion": (
        SCALE_FUSION,
        lambda x: ([x], x.new_empty(1, 1), None, None, None, None, [1], [1], "none", 1e-5, "none", 0.0, "linear", False,
                   0, "auto", False),
    ),
    "interpolate_add": (INTERPOLATE, lambda x: (x, x, None, 1.0, [1], [1], 1, "linear", False, False)),
    "token_pool": (TOKEN_POOL, lambda x: (x, None, None, None, None, x.new_empty(1), None, [0])),
}  # fmt: skip


@torch.compiler.assume_constant_result
def kernel_exists(operation: str, device: str, dtype: torch.dtype, width: int = 1) -> bool:
    """Whether a call is worth the operator: not where its only row would be the reference, unless asked for."""
    if policy(None) != "auto":
        return True
    rows, empty_call = EMPTY_CALLS[operation]
    call = empty_call(torch.empty((0, 1, width), dtype=dtype, device=device))
    return any(row.why_not(*call) is None for name, row in rows.rows.items() if name != "reference")
