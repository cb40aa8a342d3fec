"""The backends of family A: which rows exist, why a row refuses a call, how each runs one, and the operators on top."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library
from .._backends import Operation, Row, choose
from . import _topk_attention_reference as reference
from . import _topk_attention_schema as schema
from . import _topk_attention_triton as triton
from ._running import absent, cpp
from ._triton import guarded

CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
CPU_WIDTH = 256

_library.load()


def _why_not_cpu(query: Tensor, value: Tensor, select_query: Tensor | None) -> str:
    """Every reason at once; empty when there is none."""
    reasons = [_library.load_failure()] if _library.load_failure() else []
    if not query.is_cpu:
        reasons.append(f"the tensors are on {query.device}")
    if query.dtype not in CPU_DTYPES:
        reasons.append(f"dtype {str(query.dtype)[6:]}: the kernels take float32, bfloat16 and float16")
    if select_query is not None and select_query.dtype not in CPU_DTYPES:
        reasons.append(f"select_query of dtype {str(select_query.dtype)[6:]}: the kernels judge by float32 at most")
    D, E = query.shape[-1], value.shape[-1]
    if max(D, E) > CPU_WIDTH:
        reasons.append(f"D = {D}, E = {E}: the kernels take up to {CPU_WIDTH}")
    return "; ".join(reasons)


_twins: dict[str, Callable] = {}
_attend, _select, _attend_selected, _backward = (cpp(functools.partial(_twins.get, name)) for name in schema.SCHEMAS)


def _operation(
    name: str, public: str, query_at: int, value_at: int, run_cpu: Callable, select_at: int | None = None
) -> Operation:
    def why_not_cpu(*args):
        query, select_query = args[query_at], None if select_at is None else args[select_at]
        fits = query.shape[3] <= CPU_WIDTH and args[value_at].shape[3] <= CPU_WIDTH
        judges = select_query is None or select_query.dtype in CPU_DTYPES
        if fits and judges and query.dtype in CPU_DTYPES and query.is_cpu and _library.loaded:
            return None
        return _why_not_cpu(query, args[value_at], select_query)

    def run(*args):  # the opaque operator, on real tensors
        return choose(operation, args[-1], args[:-1]).run(*args[:-1])

    operation = Operation(
        public,
        Row("reference", lambda *args: None, getattr(reference, name)),
        Row("cpu", why_not_cpu, run_cpu),
        Row("triton", triton.why_not(name), guarded(getattr(triton, name))),
        absent("CUDA C++", public),
    )
    operation.opaque, _twins[name] = schema.define(name, run)
    return operation


TOPK_ATTENTION = _operation("topk_attention", "topk_attention", 0, 2, _attend, select_at=8)
TOPK_SELECT = _operation("topk_select", "topk_select", 0, 0, _select, select_at=7)
SELECTED_ATTENTION = _operation("selected_attention", "selected_attention", 0, 2, _attend_selected)
BACKWARD = _operation("topk_attention_backward", "topk_attention", 2, 4, _backward)

_library.register_flops()
