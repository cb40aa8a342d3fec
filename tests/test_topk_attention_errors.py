"""Malformed calls: ValueError or TypeError naming the argument, what was expected and what came; nothing written."""

import functools
import math

import pytest
import torch
from malformed import refusal, said, wrong_dtypes, wrong_kinds, wrong_sizes
from torch._subclasses.fake_tensor import FakeTensorMode

import hivilt

B, H, G, Q, N, D, E, C = 2, 4, 2, 6, 9, 8, 5, 3
OPS = ("topk_attention", "topk_select", "selected_attention")


def good(op: str, shared: bool = False) -> dict:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    x = {"query": draw(B, H, Q, D), "key": draw(B, G, N, D), "value": draw(B, G, N, E)}
    x |= {"attn_mask": draw(B, 1 if shared else H, Q, N), "axis": "keys", "scale": 0.5}
    if op == "selected_attention":
        return x | {"indices": torch.arange(4, dtype=torch.int32).repeat(B, H, Q, 1), "dropout_p": 0.0}
    x |= {"key_mask": draw(B, N) > 0, "query_mask": draw(B, Q) > 0, "topk": 3}
    if shared:
        x |= {"select_query": draw(B, Q, C), "select_key": draw(B, N, C)}
    if op == "topk_select":
        return {n: v for n, v in x.items() if n != "value"}
    return x | {"dropout_p": 0.0}


def wrong_values(name: str, x: torch.Tensor) -> dict[str, object]:
    """What may come where the tensor ``x`` should."""
    any_size = {"indices": (3,), "value": (3,)}.get(name, ())
    sizes = wrong_sizes(x, any_size)
    # Size 1 may broadcast.
    small = [f"dim {dim} - 1" for dim in range(x.dim()) if x.shape[dim] <= 2]
    bad = wrong_kinds(x) | {what: v for what, v in sizes.items() if what not in small}
    if name != "attn_mask":  # a mask broadcasts
        bad |= {"rank - 1": x[0], "scalar": x.flatten()[0]}
    if name in ("query", "key", "value"):
        bad |= wrong_dtypes(x) | {"None": None}
    elif name.endswith("_mask"):
        bad |= {"int": x.int(), "uint8": x.to(torch.uint8)}
        bad |= {} if name == "attn_mask" else {"floats": x.float()}
    elif name.startswith("select"):
        bad |= {"int": x.int(), "bool": x > 0, "None": None}
    elif name == "indices":
        bad |= {"None": None, "floats": x.float(), "bool": x > 0, "uint8": x.to(torch.uint8), "int16": x.short()}
    return bad


NUMBERS = {
    "topk": [0, -1, -(2**40), 2.0, 2.5, "3", True, math.nan, torch.tensor(3.0), torch.tensor([3, 4]), [3]],
    "axis": ["rows", "Keys", "", 0, 1, None, True, ["keys"]],
    "scale": [math.nan, math.inf, -math.inf, "1", [1.0], 1j, True, torch.tensor([1.0, 2.0])],
    "dropout_p": [-0.01, 1.01, math.nan, math.inf, "0", None, [0.1]],
    "backend": ["nope", "", 3, True, "CPU"],
}


@functools.cache
def calls(op: str) -> dict[str, tuple[dict, str, object]]:
    """Name of the call -> (good arguments, name of the wrong one, its value)."""
    found = {}
    for shared in (False, True) if op != "selected_attention" else (False,):
        x = good(op, shared)
        for name, value in x.items():
            if isinstance(value, torch.Tensor) and (not shared or name.startswith("select")):
                for what, wrong in wrong_values(name, value).items():
                    found[f"{name}: {what}"] = (x, name, wrong)
    x = good(op)
    for name, values in NUMBERS.items():
        if name in x or name == "backend":
            for wrong in values:
                found[f"{name}: {wrong!r}"] = (x, name, wrong)
    return found


# An unmatched pair of sizes may be reported by either of its two arguments.
PARTNERS = {
    "query": "query|key|value|attn_mask|query_mask|indices",
    "key": "key|value|attn_mask|key_mask",
    "value": "value|key",
    "select_query": "select_query|select_key",
    "select_key": "select_key|select_query",
}
PAIRS = [(op, name) for op in OPS for name in calls(op)]


def test_there_are_enough_of_them():
    for op in OPS:
        assert sum(o == op for o, _ in PAIRS) >= 80


@pytest.mark.parametrize("op, call", PAIRS, ids=[f"{op}-{name}" for op, name in PAIRS])
def test_malformed(where, op, call):
    backend, device = where
    if device != "cpu":
        pytest.skip("the checks are the same for every device")
    x, name, wrong = calls(op)[call]
    before = {n: v.clone() for n, v in x.items() if isinstance(v, torch.Tensor)}
    text = refusal(op, x | {"backend": backend} | {name: wrong})
    said(op, PARTNERS.get(name, name), text)
    for n, v in before.items():
        assert torch.equal(x[n], v), f"{n} was written"


@pytest.mark.parametrize("op", OPS)
def test_good_calls_are_good(where, op):
    backend, device = where
    for shared in (False, True) if op != "selected_attention" else (False,):
        x = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in good(op, shared).items()}
        getattr(hivilt.ops, op)(**x, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_are_refused_alike(op):
    """Shapes, dtypes and numbers are checked before any data is needed, so tracing refuses with the same words."""
    checked = 0
    for call, (x, name, wrong) in calls(op).items():
        what = call.split(": ", 1)[1]
        if what.startswith(("dim", "rank", "scalar", "complex", "int", "bool", "floats")) and "2^40" not in what:
            with FakeTensorMode() as mode:
                fake = {
                    n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in (x | {name: wrong}).items()
                }
                text = refusal(op, fake)
            assert text == refusal(op, x | {name: wrong}), call
            checked += 1
    assert checked > 20


def test_select_needs_both(where):
    backend, device = where
    x = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in good("topk_attention", True).items()}
    for name in ("select_query", "select_key"):
        with pytest.raises(ValueError, match=r"select_(query|key)"):
            hivilt.ops.topk_attention(**x | {name: None}, backend=backend)


def test_keyword_only():
    x = good("topk_attention")
    with pytest.raises(TypeError):
        hivilt.ops.topk_attention(x["query"], x["key"], x["value"], 3, "keys")
    with pytest.raises(TypeError, match="top_k"):
        hivilt.ops.topk_attention(x["query"], x["key"], x["value"], top_k=3)


def test_backend_refusal_names_backend_op_and_reason(verdicts):
    x = good("topk_attention")
    for (name, device), reason in verdicts.items():
        if device == "cpu" and reason is not None:
            with pytest.raises(hivilt.BackendError, match=name) as caught:
                hivilt.ops.topk_attention(**x, backend=name)
            assert isinstance(caught.value, RuntimeError) and "topk_attention" in str(caught.value)


def test_values_beyond_the_limit_of_a_fast_backend(verdicts):
    """Head widths above 256 and float64: an explicit request raises, auto falls back and is right."""
    if verdicts["cpu", "cpu"] is not None:
        pytest.skip(verdicts["cpu", "cpu"])
    for dtype, width in ((torch.float64, 8), (torch.float32, 300)):
        x = {n: torch.randn(1, 2, 5, width, dtype=dtype) for n in ("query", "key", "value")}
        reference = hivilt.ops.topk_attention(**x, topk=2, backend="reference")
        try:
            out = hivilt.ops.topk_attention(**x, topk=2, backend="cpu")
        except hivilt.BackendError:
            out = hivilt.ops.topk_attention(**x, topk=2)
            assert hivilt.last_backend() == "reference"
        torch.testing.assert_close(out, reference)
