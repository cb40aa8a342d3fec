"""Malformed calls: ValueError or TypeError naming operation and argument, what was expected and what came, before
anything is computed or written."""

import functools
import math

import plain_bank as plain
import pytest
import torch
from malformed import refusal, said, wrong_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import hivilt

OPS = ("bank_retrieval", "bank_attention", "bank_push_")
pytestmark = pytest.mark.operation("bank_retrieval")
B, M, C, E = 3, 11, 5, 4


def good(op: str) -> dict:
    x = {"query": plain.numbers(0, B, C), "keys": plain.numbers(1, M, C), "values": plain.numbers(2, M, E)}
    if op == "bank_push_":
        state = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in (("pointer", 1), ("count", ()))}
        own = {"values": x["values"], "rows": plain.numbers(3, B, E), "skipped": torch.zeros(1, dtype=torch.int64)}
        return {"keys": x["keys"], **state, "features": x["query"], **own, "on_nonfinite": "skip"}
    x |= {"scale": torch.tensor(0.5), "count": torch.tensor(9), "mask": plain.numbers(3, B, M) > -1}
    if op == "bank_retrieval":
        x |= {"topk": 4, "exclude": torch.tensor([-1, 0, 10]), "precision": "exact"}
    return x


def wrong_matrices(x: torch.Tensor, any_size: tuple[int, ...] = ()) -> dict[str, object]:
    """Half types may stand beside other types."""
    return {what: wrong for what, wrong in wrong_tensors(x, any_size).items() if what != "bfloat16 alone"}


INT = torch.int64
SCALES = [None, "1", 1j, math.nan, math.inf, -math.inf, True, [1.0], torch.ones(2), torch.ones(0), torch.tensor(1),
          torch.tensor(True), torch.tensor(1.0, device="meta"), 10**400,
          torch.ones(1).to_sparse(), torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)]  # fmt: skip
COUNTS = [1.0, "1", True, [1], torch.tensor(1.0), torch.tensor([1, 2]), torch.ones(0, dtype=INT), torch.tensor(True),
          torch.tensor(1, dtype=torch.int8), torch.tensor(1, device="meta"), torch.ones(1, 1, dtype=INT),
          torch.ones(1, dtype=INT).to_sparse()]  # fmt: skip
MASKS = [True, [True] * M, torch.ones(M), torch.ones(M, dtype=torch.uint8), torch.ones(M - 1) > 0, torch.ones(B) > 0,
         torch.ones(M, B) > 0, torch.ones(1, M) > 0, torch.ones(B, M, 1) > 0, torch.ones((), dtype=torch.bool),
         (torch.ones(B, M) > 0).to("meta"), (torch.ones(B, M) > 0).to_sparse(), torch.ones(B + 1, M) > 0]  # fmt: skip
ONES = [None, 0, [0], 0.0, torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=INT),
        torch.zeros(0, dtype=INT), torch.zeros(1, dtype=INT, device="meta"), torch.zeros(1) > 0,
        torch.zeros(1, dtype=INT).to_sparse()]  # fmt: skip
VALUES = {
    "bank_retrieval": {
        "query": [None], "keys": [None], "scale": SCALES, "count": COUNTS, "mask": MASKS,
        "topk": [None, 0, -1, 2.0, "2", True, [3], torch.tensor(3), 2**31, 2**70],
        "exclude": [1.0, "1", True, [0, 1, 2], torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 1]), torch.tensor(0), -2,
                    M, torch.tensor([0, 1, M]), torch.tensor([-2, 0, 1]), torch.tensor([[0, 1, 2]]), torch.ones(B) > 0,
                    torch.tensor([0, 1, 2], dtype=torch.uint8), torch.tensor([0, 1, 2], device="meta"),
                    torch.tensor([0, 1, 2]).to_sparse()],
        "precision": ["tf32", "", "EXACT", None, 1, True, ["exact"], torch.float32],
        "backend": ["nope", "", 3, True, "CPU"],
    },
    "bank_attention": {
        "query": [None], "keys": [None], "scale": SCALES, "count": COUNTS, "mask": MASKS,
        "backend": ["nope", "", 3, True, "CPU"],
    },
    "bank_push_": {
        "keys": [None], "features": [None], "values": [None], "rows": [None], "pointer": ONES, "count": ONES,
        "skipped": ONES[1:], "on_nonfinite": ["drop", "", None, 1, True, ["skip"]],
    },
}  # fmt: skip
ANY_SIZE = {"values": (1,)}  # any width, as rows of the bank decide


@functools.cache
def calls(op: str) -> dict[str, tuple[str, object]]:
    """Name of the call -> (name of the wrong argument, its value)."""
    x, found = good(op), {}
    for name in ("query", "keys", "values", "features", "rows"):
        if name in x:
            free = ANY_SIZE.get(name, ()) if op != "bank_push_" else (0,) if name == "features" else ()
            for what, wrong in wrong_matrices(x[name], free).items():
                if not (op == "bank_push_" and what == "float64 alone"):  # it rounds to the bank's dtype
                    found[f"{name}: {what}"] = (name, wrong)
    for name, values in VALUES[op].items():
        for i, wrong in enumerate(values):
            found[f"{name}: value {i}"] = (name, wrong)
    return found


# Sizes, dtypes and devices that do not match may be reported by either of their arguments.
PARTNERS = {
    "query": "query|keys|values|scale|count|mask|exclude",
    "keys": "keys|values|features|mask|rows|pointer|count",
    "values": "values|rows",
    "rows": "rows|values",
    "features": "features|rows",
}
PAIRS = [(op, call) for op in ("bank_retrieval", "bank_attention") for call in calls(op)]


def test_there_are_enough_of_them():
    for op in OPS:
        assert len(calls(op)) >= 60


@pytest.mark.parametrize("op, call", PAIRS, ids=[f"{op}-{call}" for op, call in PAIRS])
def test_malformed(where, op, call):
    backend, device = where
    if device != "cpu":
        pytest.skip("the checks are the same for every device")
    name, wrong = calls(op)[call]
    refused(op, good(op) | {"backend": backend}, name, wrong)


@pytest.mark.parametrize("call", calls("bank_push_"))
def test_malformed_push(call):
    refused("bank_push_", good("bank_push_"), *calls("bank_push_")[call])


def refused(op: str, x: dict, name: str, wrong: object) -> None:
    before = {n: v.clone() for n, v in x.items() if isinstance(v, torch.Tensor)}
    said(op, PARTNERS.get(name, name), refusal(op, x | {name: wrong}))
    assert all(torch.equal(x[n], v) for n, v in before.items()), "written before it was checked"


HUGE = {"bank_retrieval": ("count", "exclude"), "bank_attention": ("count",)}


@pytest.mark.parametrize("op, name", [(op, name) for op, names in HUGE.items() for name in names])
@pytest.mark.parametrize("what", ["2^70", "array"])
def test_malformed_numbers_of_other_kinds(op, name, what):
    wrong = 2**70 if what == "2^70" else plain.np.array([1, 2])
    said(op, PARTNERS.get(name, name), refusal(op, good(op) | {name: wrong}))


@pytest.mark.parametrize("op", OPS)
def test_good_calls_are_good(where, op):
    backend, device = where
    x = plain.placed(good(op), device)
    if op == "bank_push_":
        assert hivilt.ops.bank_push_(**x) is x["keys"] and torch.equal(x["keys"][:B], x["features"])
    else:
        assert getattr(hivilt.ops, op)(**x, backend=backend)[0].isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_are_refused_alike(op):
    """Shapes, dtypes and numbers are checked before any data is needed, so tracing refuses with the same words."""
    checked = 0
    for call, (name, wrong) in calls(op).items():
        what = call.split(": ", 1)[1]
        needs_data = name == "exclude" and isinstance(wrong, int | torch.Tensor)
        if (
            what.startswith(("dim", "rank", "scalar", "complex", "int", "bool", "value"))
            and "2^40" not in what
            and not needs_data
        ):
            x = good(op) | {name: wrong}
            with FakeTensorMode() as mode:
                faked = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) and v.device.type == "cpu"
                         and v.layout is torch.strided else v for n, v in x.items()}  # fmt: skip
                text = refusal(op, faked)
            assert text == refusal(op, x), call
            checked += 1
    assert checked > 20


def test_rows_and_values_come_together():
    for missing, other in (("values", "rows"), ("rows", "values")):
        x = good("bank_push_") | {missing: None}
        text = refusal("bank_push_", x)
        assert text.startswith(f"bank_push_: {missing}: ") and other in text


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_bank_that_wants_a_gradient_is_not_written(name):
    x = good("bank_push_")
    before = x[name].clone()
    x[name].requires_grad_()
    assert name in refusal("bank_push_", x) and torch.equal(x[name], before)
    with torch.no_grad():
        hivilt.ops.bank_push_(**x)
    assert not torch.equal(x[name], before)


def test_an_empty_bank_has_no_slot():
    x = good("bank_push_") | {"keys": torch.zeros(0, C), "values": torch.zeros(0, E)}
    assert refusal("bank_push_", x).startswith("bank_push_: keys: ")


def test_float64_goes_with_float64():
    x = {n: v.double() if n in ("query", "keys", "values") else v for n, v in good("bank_retrieval").items()}
    assert hivilt.ops.bank_retrieval(**x, backend="reference")[1].dtype == torch.float64
    for name in ("query", "keys", "values"):
        with pytest.raises(TypeError, match="float64 exactly when query is"):
            hivilt.ops.bank_retrieval(**x | {name: x[name].float()})


@pytest.mark.parametrize("op", OPS)
def test_keyword_only(op):
    x = good(op)
    with pytest.raises(TypeError):
        getattr(hivilt.ops, op)(*x.values())
    with pytest.raises(TypeError, match="extra"):
        getattr(hivilt.ops, op)(**x, extra=1)


def test_backend_refusal_names_backend_operation_and_reason(ask):
    for name in ("cpu", "triton", "cuda"):
        if ask(name, "cpu", "bank_retrieval") is not None:
            with pytest.raises(hivilt.BackendError, match=name) as caught:
                hivilt.ops.bank_retrieval(**good("bank_retrieval"), backend=name)
            assert isinstance(caught.value, RuntimeError) and "bank_retrieval" in str(caught.value)


def test_explain(capsys):
    verdicts = hivilt.explain("bank_retrieval", **good("bank_retrieval"))
    assert verdicts["reference"] is None and set(verdicts) == {"cuda", "triton", "cpu", "reference"}
    assert "bank_retrieval" in capsys.readouterr().out
