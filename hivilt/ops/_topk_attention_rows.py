"""The backends of family A: which rows exist, why a row refuses a call, how each runs one, and the operators on top."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library
from .._backends import VERSION, Operation, Row, choose
from . import _topk_attention_reference as reference
from . import _topk_attention_schema as schema

CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
CPU_WIDTH = 256

_library.load()


def _why_not_cpu(query: Tensor, value: Tensor) -> str | None:
    failure = _library.load_failure()
    width, dtype = max(query.shape[-1], value.shape[-1]), query.dtype
    if failure is None and width <= CPU_WIDTH and dtype in CPU_DTYPES and query.device.type == "cpu":
        return None
    reasons = [failure] if failure else []
    if query.device.type != "cpu":
        reasons.append(f"the tensors are on {query.device}")
    if dtype not in CPU_DTYPES:
        reasons.append(f"dtype {str(dtype)[6:]}: the kernels take float32, bfloat16 and float16")
    if width > CPU_WIDTH:
        reasons.append(f"D = {query.shape[-1]}, E = {value.shape[-1]}: the kernels take up to {CPU_WIDTH}")
    return "; ".join(reasons)


def _call(twin: Callable, *args):
    """Runs C++; a value that only C++ looks at (an offset, an index) comes back as a ValueError."""
    try:
        return twin(*args)
    except RuntimeError as error:
        text = str(error)
        if "hivilt.ValueError: " not in text:
            raise
        raise ValueError("hivilt: " + text.split("hivilt.ValueError: ", 1)[1].split("\n", 1)[0]) from None


def _topk_attention_cpu(*args):
    query, key, value, topk, axis, attn_mask, _, _, select_query = args[:9]
    if select_query is None or select_query.dtype == query.dtype:
        return _call(_twins["topk_attention"], *args)
    if topk < 0:  # dense: there is nothing to select
        return _call(_twins["topk_attention"], *args[:8], None, None, *args[10:])
    lists = _topk_select_cpu(query, key, *args[3:12], args[13])
    out, lse = _call(
        _twins["selected_attention"], query, key, value, lists, axis, attn_mask, *args[10:13], args[13], args[14]
    )
    return out, lse, lists


def _topk_select_cpu(*args):
    """The kernel wants one dtype; a selection source of another is judged as it is, in float32, which is exact."""
    query, key, select_query, select_key = args[0], args[1], args[7], args[8]
    if select_query is not None and select_query.dtype != query.dtype:
        args = (query.float(), key.float(), *args[2:7], select_query.float(), select_key.float(), *args[9:])
    return _call(_twins["topk_select"], *args)


def _selected_attention_cpu(*args):
    return _call(_twins["selected_attention"], *args)


def _topk_attention_backward_cpu(*args):
    return _call(_twins["topk_attention_backward"], *args)


def _no_kernel(kind: str) -> Callable:
    reason = f"hivilt {VERSION} ships no {kind} kernel for topk_attention"
    return lambda *args: reason


def _absent(*args):
    raise AssertionError("a row whose why_not always refuses was run")


def _operation(name: str, public: str, query_at: int, value_at: int, run_cpu: Callable) -> Operation:
    def run(*args):  # the opaque operator, on real tensors
        return choose(operation, args[-1], args[:-1]).run(*args[:-1])

    operation = Operation(
        public,
        Row("reference", lambda *args: None, getattr(reference, name)),
        Row("cpu", lambda *args: _why_not_cpu(args[query_at], args[value_at]), run_cpu),
        Row("triton", _no_kernel("Triton"), _absent),
        Row("cuda", _no_kernel("CUDA C++"), _absent),
    )
    operation.opaque, _twins[name] = schema.define(name, run)
    return operation


_twins: dict[str, Callable] = {}
TOPK_ATTENTION = _operation("topk_attention", "topk_attention", 0, 2, _topk_attention_cpu)
TOPK_SELECT = _operation("topk_select", "topk_select", 0, 0, _topk_select_cpu)
SELECTED_ATTENTION = _operation("selected_attention", "selected_attention", 0, 2, _selected_attention_cpu)
BACKWARD = _operation("topk_attention_backward", "topk_attention", 2, 4, _topk_attention_backward_cpu)
