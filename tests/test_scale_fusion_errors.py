"""Malformed calls of the family: ValueError or TypeError naming operation and argument, what was expected and what
came; nothing computed, nothing written."""

import functools
import math

import plain_scale_fusion as plain
import pytest
import torch
from malformed import refusal, said, wrong_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import hivilt

OPS = ("scale_fusion", "interpolate_tokens", "interpolate_add")
pytestmark = pytest.mark.operation("scale_fusion")


def good(op: str) -> dict:
    if op == "scale_fusion":
        x = plain.call([(3, 4), (2, 3)], [5, 7], 6, prefix_tokens=2, out_grid=(3, 4))
        return x | {"norm": "layer", "eps": 1e-5, "activation": "gelu", "dropout_p": 0.1, "training": True,
                    "mode": "linear", "align_corners": False, "impl": "auto"}  # fmt: skip
    x = plain.numbers(0, 2, 14, 5)
    if op == "interpolate_tokens":
        return {"x": x, "grid": (3, 4), "out_grid": (6, 5), "mode": "linear", "align_corners": False,
                "prefix_tokens": 2}  # fmt: skip
    return {"x": plain.numbers(1, 2, 30, 5), "y": x[:, 2:], "scale": torch.tensor(0.5), "grid": (3, 4),
            "out_grid": (6, 5), "segments": None, "mode": "linear", "align_corners": False}  # fmt: skip


GRID = [None, 12, "34", torch.tensor([3, 4]), (), (3,), (3, 4, 1), (4, 4), (3, 4, 1, 1), (-3, -4), (0, 4), (3.0, 4.0)]
GRID += [(3, "4"), (True, 12), (3, None), (12,), {3, 4}, ((3, 4),), (2**40, 4), (2**32, 2**32)]
VALUES = {
    "mode": ["bilinear", "bicubic", "", 0, None, True, ["linear"]],
    "align_corners": [1, None, "no", 0.0, torch.tensor(True)],
    "backend": ["nope", "", 3, True, "CPU"],
    "prefix_tokens": [-1, 2.0, "2", None, True, 1, 3, torch.tensor([2, 2])],
}
OF = {
    "scale_fusion": VALUES | {
        "features": [None, torch.zeros(2, 14, 5), [], "xx", {}, 3, [None, None], (1, 2)],
        "grids": [3, "33", (3, 4), [(3, 4)], [(3, 4)] * 3, [3, 4], [(3, 4), (2, 3, 1)], [(3, 4), 6], torch.ones(2, 2),
                  [(3, 4), (3, 2, 1, 1)], [(3, 4), (0, 6)], [(3, 4), (-2, -3)], [(3, 4), (2.0, 3.0)], [(4, 4), (2, 3)],
                  [(3, 4), (7,)], [(3, 4), ()], [(3, 4), "23"], [(3, 4), (2**40, 3)]],
        "out_grid": [3, "34", (), (3,), (3, 4, 1), (0, 4), (3.0, 4), (-1, 4), torch.tensor([3, 4]), (True, 4),
                     (2**32, 2**32)],
        "norm": ["batch", "", None, 1, True], "activation": ["swish", "GELU", None, 1, ""],
        "eps": [-1e-9, math.nan, math.inf, "1", None, True, 1j, torch.tensor([1.0, 2.0])],
        "dropout_p": [-0.01, 1.01, math.nan, math.inf, "0", None, [0.1], True],
        "training": [None, 1, "yes"], "impl": ["fast", None, 1, True, ""],
        "weight": [None], "norm_weight": [1.0], "norm_bias": [1.0], "bias": [0, True],
    },
    "interpolate_tokens": VALUES | {"grid": GRID, "out_grid": [g for g in GRID if g != (4, 4)],
                                    "x": [None]},
    "interpolate_add": {n: v for n, v in VALUES.items() if n != "prefix_tokens"} | {
        "grid": GRID, "out_grid": GRID, "x": [None], "y": [None],
        "scale": [None, "1", 1j, math.nan, math.inf, True, [1.0], torch.ones(2), torch.tensor(1),
                  torch.tensor(1.0, device="meta"), torch.ones(0), torch.ones(1).to_sparse()],
        "segments": [((3, 4),)],
    },
}  # fmt: skip


@functools.cache
def calls(op: str) -> dict[str, tuple[dict, str, object]]:
    """Name of the call -> (good arguments, name of the wrong one, its value)."""
    x, found = good(op), {}
    alone = op == "interpolate_tokens"  # nothing else that its dtype, device, batch or width could contradict
    for name, value in x.items():
        if isinstance(value, torch.Tensor) and name != "scale":
            for what, wrong in wrong_tensors(value, (0, 2) if alone else ()).items():
                if not alone or what not in ("meta", "float64 alone", "bfloat16 alone"):
                    found[f"{name}: {what}"] = (x, name, wrong)
    if op == "scale_fusion":
        for s in (0, 1):
            for what, wrong in wrong_tensors(x["features"][s]).items():
                features = [wrong if i == s else f for i, f in enumerate(x["features"])]
                found[f"features[{s}]: {what}"] = (x, "features", features)
    for name, values in OF[op].items():
        for i, wrong in enumerate(values):
            found[f"{name}: value {i}"] = (x, name, wrong)
    return found


# Sizes and dtypes that do not match may be reported by either of their arguments.
PARTNERS = {
    "features": r"features|weight|grids|bias|norm_weight",
    "weight": r"weight|bias|norm_weight",
    "prefix_tokens": r"prefix_tokens|features|x",
    "grids": r"grids|features|out_grid",
    "grid": r"grid|x|y|out_grid",
    "out_grid": r"out_grid|grid|x",
    "x": r"x|y|grid|scale",
    "y": r"y|x|grid",
    "segments": r"segments|grid",
}
PAIRS = [(op, name) for op in OPS for name in calls(op)]


def test_there_are_enough_of_them():
    for op in OPS:
        assert sum(o == op for o, _ in PAIRS) >= 55


@pytest.mark.parametrize("op, call", PAIRS, ids=[f"{op}-{name}" for op, name in PAIRS])
def test_malformed(where, op, call):
    backend, device = where
    if device != "cpu":
        pytest.skip("the checks are the same for every device")
    x, name, wrong = calls(op)[call]
    state = torch.get_rng_state()
    text = refusal(op, x | {"backend": backend} | {name: wrong})
    said(op, PARTNERS.get(name, name), text)
    assert torch.equal(torch.get_rng_state(), state), "a seed was drawn before the arguments were checked"


@pytest.mark.parametrize("op", OPS)
def test_good_calls_are_good(where, op):
    backend, device = where

    def move(v):
        if isinstance(v, list):
            return [move(u) for u in v]
        return v.to(device) if isinstance(v, torch.Tensor) else v

    assert getattr(hivilt.ops, op)(**{n: move(v) for n, v in good(op).items()}, backend=backend).isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_are_refused_alike(op):
    """Shapes, dtypes and numbers are checked before any data is needed, so tracing refuses with the same words."""
    checked = 0
    for call, (x, name, wrong) in calls(op).items():
        what = call.split(": ", 1)[1]
        if what.startswith(("dim", "rank", "scalar", "complex", "int", "bool", "value")) and "2^40" not in what:

            def faked(v, mode):
                if isinstance(v, list | tuple):
                    return type(v)(faked(u, mode) for u in v)
                return mode.from_tensor(v) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v

            with FakeTensorMode() as mode:
                text = refusal(op, {n: faked(v, mode) for n, v in (x | {name: wrong}).items()})
            assert text == refusal(op, x | {name: wrong}), call
            checked += 1
    assert checked > 20


# Combinations.


def fusion(**changes):
    return hivilt.ops.scale_fusion(**good("scale_fusion") | changes)


def test_norm_and_its_parameters():
    for name in ("norm_weight", "norm_bias"):
        with pytest.raises(ValueError, match=rf"scale_fusion: {name}: .*norm='affine'"):
            fusion(norm="affine", **{name: None})
        with pytest.raises(ValueError, match=r"scale_fusion: norm_(weight|bias): .*norm='none'"):
            fusion(norm="none")
        fusion(**{name: None})
    with pytest.raises(TypeError, match="scale_fusion: norm_bias"):
        x = {n: v.bfloat16() for n, v in plain.leaves(good("scale_fusion")).items()}
        fusion(**plain.replaced(good("scale_fusion"), x) | {"norm_weight": x["norm_weight"].float()})


@pytest.mark.parametrize("mode", ["nearest", "area"])
@pytest.mark.parametrize("op", OPS)
def test_align_corners_is_for_linear(op, mode):
    with pytest.raises(ValueError, match=f"{op}: align_corners.*{mode}"):
        getattr(hivilt.ops, op)(**good(op) | {"mode": mode, "align_corners": True})


def test_grids_left_out():
    """Only without prefix tokens, and only for square numbers of tokens; the scale is named."""
    with pytest.raises(ValueError, match=r"scale_fusion: grids: .*prefix_tokens"):
        fusion(grids=None)
    f = [torch.ones(1, n, 2) for n in (16, 9)]
    weight = torch.ones(3, 4)
    assert hivilt.ops.scale_fusion(f, weight).shape == (1, 16, 3)
    for n in (15, 2, 0):
        with pytest.raises(ValueError, match=r"scale_fusion: features\[1\]: expected a square number"):
            hivilt.ops.scale_fusion([f[0], torch.ones(1, n, 2)], weight)


def test_impl_against_backend():
    with pytest.raises(ValueError, match="scale_fusion: impl"):
        fusion(impl="reference", backend="cpu")
    fusion(impl="reference", backend="reference")


@pytest.mark.parametrize("grids", [{"grid": (12,)}, {"out_grid": (30,)}])
def test_add_wants_both_grids_or_none(grids):
    x = good("interpolate_add")
    with pytest.raises(ValueError, match=r"interpolate_add: (out_)?grid: expected a grid"):
        hivilt.ops.interpolate_add(x["x"], x["y"], **grids)


@pytest.mark.parametrize(
    "segments",
    [(), 3, "ab", torch.ones(2, 2), (3, 4), ((12, 30), 3), ((12, 30, 1),), ((12,),), ((5, 30),), ((12, 29),),
     ((6, 15), (7, 15)), ((0, 15), (12, 15)), ((-1, 15), (13, 15)), ((12.0, 30.0),), ((True, 30),), ("ab",), None],
    ids=str,
)  # fmt: skip
def test_segments(segments):
    x = good("interpolate_add")
    if segments is None:
        assert hivilt.ops.interpolate_add(x["x"], x["y"], segments=[(5, 20), (7, 10)]).shape == (2, 30, 5)
        return
    with pytest.raises((ValueError, TypeError), match="interpolate_add: segments"):
        hivilt.ops.interpolate_add(x["x"], x["y"], segments=segments)


def test_keyword_only():
    x = good("scale_fusion")
    with pytest.raises(TypeError):
        hivilt.ops.scale_fusion(x["features"], x["weight"], None, x["grids"])
    with pytest.raises(TypeError, match="dropout"):
        fusion(dropout=0.1)


@pytest.mark.parametrize("op", OPS)
def test_backend_refusal_names_backend_operation_and_reason(ask, op):
    for name in ("cpu", "triton", "cuda"):
        if ask(name, "cpu", op) is not None:
            with pytest.raises(hivilt.BackendError, match=name) as caught:
                getattr(hivilt.ops, op)(**good(op), backend=name)
            shared = op.replace("interpolate_add", "interpolate_tokens")  # which has the kernels of both
            assert isinstance(caught.value, RuntimeError) and shared in str(caught.value)


@pytest.mark.parametrize("op", OPS)
def test_explain(capsys, op):
    verdicts = hivilt.explain(op, **good(op))
    assert verdicts["reference"] is None and set(verdicts) == {"cuda", "triton", "cpu", "reference"}
    assert op in capsys.readouterr().out
