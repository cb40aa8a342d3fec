"""The operations of family C."""

from __future__ import annotations

from .. import _library
from . import _bank_retrieval_reference as reference
from . import _bank_retrieval_schema as schema
from ._bank_retrieval_triton import row
from ._running import CPU_DTYPES, build, why_not_cpu

_library.load()


def _why_not_cpu(query, *rest) -> str | None:
    """The keys' and values' dtypes count too: they may differ from the query's."""
    others = [x.dtype for x in rest[:4] if x is not None and hasattr(x, "dtype") and x.dtype not in CPU_DTYPES]
    reasons = [why_not_cpu(query)] if why_not_cpu(query) else []
    reasons += [f"a tensor of {str(dtype)[6:]}: the kernels take float32, bfloat16 and float16" for dtype in others]
    return "; ".join(reasons) or None


BANK_RETRIEVAL = build("bank_retrieval", "bank_retrieval", schema, reference, row("bank_retrieval"), _why_not_cpu)
BACKWARD = build(
    "bank_retrieval_backward", "bank_retrieval", schema, reference, row("bank_retrieval_backward"), _why_not_cpu
)

_library.register_flops()
