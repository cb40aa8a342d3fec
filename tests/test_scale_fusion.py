"""Scale fusion, every backend against float64: random parity both ways, grids, widths, norms, prefix tokens."""

import itertools
import sys
import warnings

import plain_scale_fusion as plain
import pytest
import torch

import hivilt
import hivilt.testing as t

pytestmark = pytest.mark.operation("scale_fusion")
op = hivilt.ops.scale_fusion
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = 40  # random ones per dtype and backend
MODES = [("linear", False), ("linear", True), ("nearest", False), ("area", False)]


def test_truth_is_what_torch_computes():
    """In float64 the truth of these tests and plain PyTorch differ by rounding alone, output and every gradient."""
    seen = set()
    for seed in range(60):
        x = plain.Case(seed, torch.float64).inputs()
        if x["mode"] == "nearest":
            x["mode"] = "area"  # torch rounds positions to float32 there, and so takes another token now and then
        rival = plain.eager(x)["out"]
        g = plain.numbers(seed, *rival.shape, dtype=torch.float64)
        true = plain.truth(x, g)
        for name, value in plain.eager(x, g).items():
            # Positions are rounded differently: 1e-15 of up to 60 tokens, through norms that divide by small numbers.
            torch.testing.assert_close(value, true.values[name], rtol=1e-9, atol=1e-9)
            seen.add(name)
    assert seen >= {"out", "features[3]", "weight", "bias", "norm_weight", "norm_bias"}


@pytest.mark.parametrize("wrong", ["out", "features", "weight"])
def test_judge_refuses_a_wrong_result(wrong):
    """One of 1440 weights off by 2^-13, or a backward off by 2^-12, is beyond the budget."""
    x = plain.call([(6, 6), (3, 3)], [40, 20], 24)

    def planted(features, weight, *rest, **more):
        if wrong == "out":
            weight = weight + 2.0**-13 * (torch.arange(weight.numel()) == 77).view_as(weight)
        elif wrong == "weight":
            weight = weight.detach() + (weight - weight.detach()) * (1 + 2.0**-12)
        else:
            features = [f.detach() + (f - f.detach()) * (1 + 2.0**-12) for f in features]
        return op(features, weight, *rest, **more)

    plain.judge(op, x, "reference")
    with pytest.raises(AssertionError, match=wrong):
        plain.judge(planted, x, "reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random(where, dtype):
    backend, device = where
    tally = t.Tally(dtype)
    for seed in range(CASES):
        plain.judge(op, plain.Case(seed, dtype).inputs(), backend, device, tally=tally, what=f"case {seed}")
    tally.assert_no_worse()


def test_random_float64():
    for seed in range(CASES):
        plain.judge(op, plain.Case(seed, torch.float64).inputs(), "reference", what=f"case {seed}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_filled_memory_changes_nothing(where, dtype, nan_filled_memory):
    """Whatever fresh memory holds, nothing unwritten is read and nothing unwritten is returned."""
    backend, device = where
    for seed in range(100, 130):
        plain.judge(op, plain.Case(seed, dtype).inputs(), backend, device, what=f"case {seed}")


@pytest.mark.parametrize("mode, align_corners", MODES)
@pytest.mark.parametrize("grid, out_grid", plain.GRIDS, ids=str)
def test_grids(where, grid, out_grid, mode, align_corners):
    """A scale of each shape beside one that is on the output's grid already."""
    backend, device = where
    for dtype, impl in ((torch.float32, "prologue"), (torch.float32, "epilogue"), (torch.bfloat16, "auto")):
        x = plain.call([grid, out_grid], [10, 7], 20, dtype, out_grid=out_grid, mode=mode, align_corners=align_corners)
        plain.judge(op, x | {"impl": impl}, backend, device, what=f"{dtype} {impl}")


@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 24, 31, 33, 40, 63, 64, 65, 96, 100, 129, 192, 256, 300, 513])
def test_every_width(where, width):
    """Of the output and, backwards through the list, of the scales."""
    backend, device = where
    other = {1: 513, 513: 1}.get(width, 100)
    norm = "none" if width == 1 else "layer"
    for dtype in DTYPES:
        x = plain.call([(5, 4), (3, 2), (5, 4)], [other, width, 24], width, dtype, norm=norm)
        plain.judge(op, x, backend, device, what=str(dtype))


@pytest.mark.parametrize("scales", [1, 2, 3, 5, 9])
def test_number_of_scales(where, scales):
    backend, device = where
    grids = [(8 - s % 4, 1 + s) for s in range(scales)]
    plain.judge(op, plain.call(grids, [3 + s for s in range(scales)], 32, out_grid=(6, 5)), backend, device)


# Beyond the tiles and blocks of any kernel, and not a multiple of them.
SIZES = {
    "56x56, narrow": ([(56, 56), (28, 28), (14, 14)], [24, 12, 6], 24, 1),
    "28x28": ([(28, 28), (14, 14), (7, 7)], [96, 48, 24], 96, 2),
    "fine to coarse": ([(40, 40), (20, 20), (10, 10)], [16, 24, 40], 48, 2),
    "finer than the output": ([(10, 10), (40, 40), (20, 21)], [16, 24, 40], 48, 2),
    "long sequence": ([(3001,), (750,), (188,)], [20, 12, 8], 40, 1),
    "video": ([(4, 14, 14), (2, 7, 7), (1, 4, 4)], [20, 12, 8], 40, 2),
    "many images": ([(3, 3), (2, 2)], [8, 8], 16, 200),
    "wide": ([(9, 9), (5, 5)], [300, 700], 640, 1),
}


@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(where, size, impl):
    backend, device = where
    grids, widths, out_width, batch = SIZES[size]
    for dtype in (torch.float32, torch.bfloat16):
        tally = t.Tally(dtype)
        x = plain.call(grids, widths, out_width, dtype, batch, impl=impl)
        plain.judge(op, x, backend, device, tally=tally, what=str(dtype))
        few = [name for name, count in tally.count.items() if count < 2000]
        for name in few:  # the largest error of a few numbers is luck; their budgets hold
            del tally.worst[name]
        tally.assert_no_worse()


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
@pytest.mark.parametrize("norm", ["layer", "affine", "none"])
def test_norms_and_activations(where, norm, activation):
    backend, device = where
    for dtype, wide in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, False)):
        x = plain.call([(6, 5), (3, 3)], [24, 12], 33, dtype, norm=norm, activation=activation, wide_norm=wide)
        plain.judge(op, x, backend, device, what=str(dtype))
        for name in ("bias", *(("norm_weight", "norm_bias") if norm == "layer" else ())):
            plain.judge(op, {n: v for n, v in x.items() if n != name}, backend, device, what=f"{dtype} without {name}")


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
def test_activations_at_large_and_tiny_numbers(where, activation):
    """Both tails, where 1 + erf and exp cancel, overflow or underflow."""
    backend, device = where
    for size in (1e-20, 1e-3, 1.0, 8.0, 60.0, 1e4, 1e20):
        x = plain.call([(16, 16)], [1], 1, norm="none", activation=activation, bias=False)
        x["features"][0] = torch.linspace(-1, 1, 256).mul(size).view(1, 256, 1)
        backward = not (activation == "gelu_tanh" and size > 1e10)  # the cube overflows, as it does in torch
        plain.judge(op, x | {"weight": torch.ones(1, 1)}, backend, device, backward, what=str(size))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
def test_eps(where, eps):
    backend, device = where
    x = plain.call([(4, 4), (2, 2)], [8, 8], 24, eps=eps)
    plain.judge(op, x, backend, device)
    for small in (1e-6, 1e4):  # a variance below eps, and far above it
        plain.judge(
            op, x | {"weight": x["weight"] * small, "bias": x["bias"] * small}, backend, device, what=str(small)
        )


def test_norm_of_rows_far_from_zero(where):
    """A mean 1000 times the deviation: E[y^2] - E[y]^2 would lose every digit."""
    backend, device = where
    x = plain.call([(6, 6), (3, 3)], [24, 12], 40)
    plain.judge(op, x | {"bias": x["bias"] + 1000.0}, backend, device)


def test_constant_rows_of_the_norm(where):
    """Without any variance the norm gives its bias, not NaN."""
    backend, device = where
    x = plain.call([(4, 4)], [8], 24)
    x |= {"weight": torch.zeros(24, 8), "bias": torch.full((24,), 3.0)}
    got = plain.judge(op, x, backend, device, backward=False)
    torch.testing.assert_close(got["out"], torch.nn.functional.gelu(x["norm_bias"]).expand(2, 16, 24))


@pytest.mark.parametrize("mode, align_corners", MODES)
@pytest.mark.parametrize("prefixed", list(itertools.product((True, False), repeat=3)), ids=str)
def test_prefix_tokens(where, prefixed, mode, align_corners):
    """Class tokens pass every interpolation as they are; a scale without them adds nothing there."""
    backend, device = where
    for count in (1, 4):
        settings = {"prefix_tokens": count, "mode": mode, "align_corners": align_corners, "out_grid": (5, 3)}
        x = plain.call([(4, 4), (5, 3), (2, 7)], [9, 8, 12], 20, prefixed=prefixed, **settings)
        got = plain.judge(op, x, backend, device)
        assert got["out"].shape == (2, count + 15, 20)


def test_class_token_sliced_off(where):
    """x[:, 1:] is a view like any other: the same bits as its copy, and no gradient for the token before it."""
    backend, device = where
    for dtype in DTYPES:
        x = plain.call([(6, 6), (3, 3)], [24, 16], 40, dtype)
        whole = [torch.cat([f[:, :1] * torch.nan, f], 1).to(device).requires_grad_() for f in x["features"]]
        rest = {n: v.to(device) for n, v in plain.leaves(x).items() if not n.startswith("features")}
        settings = {"grids": x["grids"], "backend": backend, **rest}
        out = op([f[:, 1:] for f in whole], **settings)
        assert torch.equal(out, op([f[:, 1:].clone() for f in whole], **settings))
        for f, grad in zip(whole, torch.autograd.grad(out.sum(), whole), strict=True):
            assert not grad[:, 0].any() and grad[:, 1:].any() and grad.shape == f.shape


@pytest.mark.parametrize("batch", [0, 1, 2, 5])
def test_batches(where, batch):
    backend, device = where
    for dtype in DTYPES:
        x = plain.call([(6, 6), (3, 3)], [24, 16], 40, dtype, batch)
        got = plain.judge(op, x, backend, device)
        assert got["out"].shape == (batch, 36, 40)
        if not batch:
            assert not any(got[n].any() for n in got)


def test_implementations_agree(where):
    """prologue and epilogue order the same sums differently: they differ by rounding, at most one budget each."""
    backend, device = where
    for seed in range(30):
        x = plain.Case(seed, torch.float32).inputs()
        got = [plain.judge(op, x | {"impl": impl}, backend, device) for impl in ("prologue", "epilogue", "auto")]
        assert all(g.keys() == got[0].keys() for g in got)
    x.pop("impl")
    assert torch.equal(op(**x, impl="reference"), op(**x, backend="reference"))
    op(**x, impl="reference")
    assert hivilt.last_backend() == "reference"


def test_by_hand(where):
    """One channel, two tokens to four: small enough to read."""
    backend, device = where
    fine = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]], device=device)
    coarse = torch.tensor([[[0.0], [8.0]]], device=device)
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.5]], device=device)
    settings = {"grids": [(4,), (2,)], "norm": "none", "activation": "relu", "backend": backend}
    out = op([fine, coarse], weight, torch.tensor([-5.0, 0.0], device=device), **settings)
    assert out.tolist() == [[[0.0, 0.0], [0.0, 1.0], [4.0, 3.0], [7.0, 4.0]]]  # coarse becomes 0, 2, 6, 8
    out = op([fine, coarse], weight, **settings, mode="nearest")
    assert out.tolist() == [[[1.0, 0.0], [2.0, 0.0], [11.0, 4.0], [12.0, 4.0]]]
    out = op([fine, coarse], weight, **settings, out_grid=(2,), mode="area")
    assert out.tolist() == [[[1.5, 0.0], [11.5, 4.0]]]


def test_defaults(where):
    """Squares, the first scale's grid, layer norm without parameters, gelu, no dropout."""
    backend, device = where
    x = plain.call([(6, 6), (3, 3), (2, 2)], [8, 8, 8], 24)
    for name in ("bias", "norm_weight", "norm_bias"):
        del x[name]
    features, weight = [f.to(device) for f in x["features"]], x["weight"].to(device)
    out = op(features, weight, backend=backend)
    t.assert_within(out.cpu(), plain.truth(x).values["out"], plain.truth(x).budget("out", torch.float32))
    explicit = {"grids": x["grids"], "out_grid": (6, 6), "norm": "layer", "eps": 1e-5, "activation": "gelu"}
    explicit |= {"dropout_p": 0.5, "training": False, "mode": "linear", "align_corners": False, "prefix_tokens": 0}
    assert torch.equal(out, op(tuple(features), weight, None, **explicit, impl="auto", backend=backend))


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(sys.modules["hivilt.ops.scale_fusion"], "_warned", set())


def test_squares_that_could_be_wider_are_said_once(unwarned):
    """576 over 144 tokens are 24 x 24 over 12 x 12, or 18 x 32 over 9 x 16."""
    x = plain.call([(24, 24), (12, 12)], [2, 2], 4)
    features, weight = x["features"], x["weight"]
    with pytest.warns(UserWarning, match=r"\(18, 32\), \(9, 16\).*pass grids="):
        op(features, weight, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op(features, weight, backend="reference")
        op(features, weight, grids=[(18, 32), (9, 16)], backend="reference")


@pytest.mark.parametrize("sides", [(14, 7, 3), (56, 28, 14), (12, 12), (16, 8, 4), (7, 7, 7)], ids=str)
def test_squares_that_are_clear_are_taken_silently(unwarned, sides):
    x = plain.call([(n, n) for n in sides], [2] * len(sides), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = op(x["features"], x["weight"], backend="reference")
    assert out.shape == (2, sides[0] ** 2, 4)


def test_result_shares_no_memory(where):
    """Outputs never alias inputs, not even when every step is the identity."""
    backend, device = where
    x = torch.ones(1, 4, 4, device=device)
    out = op([x], torch.eye(4, device=device), norm="none", activation="none", backend=backend)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()
    assert hivilt.ops.interpolate_tokens(x, (2, 2), (2, 2), backend=backend).data_ptr() != x.data_ptr()


@pytest.mark.interpreted
@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny(where, dtype, impl):
    """Every step once, small enough for an interpreter of kernels."""
    backend, device = where
    settings = {"impl": impl, "prefix_tokens": 1, "prefixed": [True, False]}
    plain.judge(op, plain.call([(3, 4), (2, 2)], [5, 3], 10, dtype, 1, **settings), backend, device)
