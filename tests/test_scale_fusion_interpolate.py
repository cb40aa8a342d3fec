"""interpolate_tokens and interpolate_add: tables bit for bit, torch's own samples, gradients of any order."""

import itertools
import math

import plain_scale_fusion as plain
import pytest
import torch
import torch.nn.functional as F

import hivilt
import hivilt.testing as t

pytestmark = pytest.mark.operation("interpolate_tokens")
op, add = hivilt.ops.interpolate_tokens, hivilt.ops.interpolate_add
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = [("linear", False), ("linear", True), ("nearest", False), ("area", False)]
U32 = t.UNIT[torch.float32]


def read_off(size: int, out_size: int, backend: str, device: str, dtype=torch.float32, **settings) -> torch.Tensor:
    """U [out_size, size]: what an identity matrix turns into, without a rounding."""
    return op(torch.eye(size, dtype=dtype, device=device)[None], (size,), (out_size,), backend=backend, **settings)[0]


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_tables_bit_for_bit(where, mode, align_corners):
    """Every pair of sizes to 23, and the odd ones: the weights of the rule in float32, each operation rounded."""
    backend, device = where
    pairs = [*itertools.product(range(1, 24), repeat=2), (100, 333), (333, 100), (56, 3136), (1, 500), (500, 1)]
    for size, out_size in pairs:
        got = read_off(size, out_size, backend, device, mode=mode, align_corners=align_corners)
        true = plain.axis_matrix(size, out_size, mode, align_corners, torch.float32)
        assert torch.equal(got.cpu().double(), torch.from_numpy(true)), (size, out_size)


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_tables_in_float64(mode, align_corners):
    for size, out_size in [*itertools.product(range(1, 16), repeat=2), (100, 333), (333, 100)]:
        how = {"dtype": torch.float64, "mode": mode, "align_corners": align_corners}
        got = read_off(size, out_size, "reference", "cpu", **how)
        true = plain.axis_matrix(size, out_size, mode, align_corners, torch.float64)
        assert torch.equal(got, torch.from_numpy(true)), (size, out_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode, align_corners", MODES)
def test_tables_are_those_of_torch(mode, align_corners, dtype):
    """Position o of size * o / out_size takes three roundings, of which torch fuses two: that far may weights differ.
    Of nearest, which would jump, the token taken is the same; in float64 torch rounds its positions to float32."""
    for size, out_size in [*itertools.product(range(1, 30), repeat=2), (64, 50), (50, 64), (7, 100), (100, 7)]:
        if (mode, dtype) == ("nearest", torch.float64):
            continue
        eye = torch.eye(size, dtype=dtype)[None]
        torchs = plain.resize(eye, (size,), (out_size,), mode, align_corners)[0]
        ours = torch.from_numpy(plain.axis_matrix(size, out_size, mode, align_corners, dtype))
        allowed = {"linear": 3 * t.UNIT[dtype] * (size + 1), "area": t.UNIT[dtype], "nearest": 0.0}[mode]
        assert (torchs.double() - ours).abs().max() <= allowed, (size, out_size)


def position_slack(x: torch.Tensor, grid, mode: str) -> torch.Tensor:
    """How far results may lie apart whose positions are rounded differently: see the test above."""
    return 3 * U32 * sum(n + 1 for n in grid) * x.double().abs().amax() * (mode == "linear")


def judge(x, grid, out_grid, backend, device, what="", **settings):
    """Output and gradient against the truth, and the output's error against that of F.interpolate."""
    mode, corners = settings.get("mode", "linear"), settings.get("align_corners", False)
    prefix = settings.get("prefix_tokens", 0)
    leaf = x.detach().to(device).requires_grad_()
    out = op(leaf, grid, out_grid, backend=backend, **settings)
    g = plain.numbers(5, *out.shape).to(x.dtype)
    grad = torch.autograd.grad(out, leaf, g.to(device))[0].cpu()
    out = out.detach().cpu()
    true = plain.interpolated(x, grid, out_grid, mode, corners, prefix)
    U = plain.with_prefix(plain.upsampling(grid, out_grid, mode, corners, x.dtype), prefix, prefix)
    true.values["x"], true.spread["x"] = U.mT @ g.double(), len(grid) * (U.mT @ g.double().abs())
    assert out.dtype == grad.dtype == x.dtype and out.is_contiguous()
    t.assert_within(out, true.values["out"], true.budget("out", x.dtype, tight=True), f"{what}: out")
    t.assert_within(grad, true.values["x"], true.budget("x", x.dtype, tight=True), f"{what}: gradient")
    if x.shape[0]:
        rival = plain.resize(x[:, prefix:], grid, out_grid, mode, corners)
        ours, theirs = ((y.double() - true.values["out"][:, prefix:]).abs().max() for y in (out[:, prefix:], rival))
        unit = true.budget("out", x.dtype, 1).max()
        assert ours <= 1.1 * theirs + unit, f"{what}: error {ours:.3g}, torch's {theirs:.3g}, unit {unit:.3g}"
    return out, grad


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode, align_corners", MODES)
@pytest.mark.parametrize("grid, out_grid", plain.GRIDS, ids=str)
def test_grids(where, grid, out_grid, mode, align_corners, dtype):
    backend, device = where
    for batch, width, prefix in ((2, 24, 0), (1, 1, 3), (0, 5, 0), (1, 100, 1)):
        x = plain.numbers(width, batch, prefix + math.prod(grid), width, dtype=dtype)
        settings = {"mode": mode, "align_corners": align_corners, "prefix_tokens": prefix}
        judge(x, grid, out_grid, backend, device, f"C={width}", **settings)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 63, 64, 65, 96, 100, 127, 192, 300])
def test_every_width(where, width):
    backend, device = where
    for dtype in DTYPES:
        x = plain.numbers(width, 2, 35, width, dtype=dtype)
        for out_grid in ((9, 11), (3, 4)):
            judge(x, (5, 7), out_grid, backend, device, f"{dtype} {out_grid}")


@pytest.mark.interpreted
@pytest.mark.parametrize("mode, align_corners", MODES)
def test_tiny(where, mode, align_corners):
    backend, device = where
    x = plain.numbers(0, 1, 13, 5)
    judge(x, (3, 4), (5, 6), backend, device, mode=mode, align_corners=align_corners, prefix_tokens=1)


def test_nearest_and_identity_copy(where):
    """Where nothing is weighed nothing is rounded."""
    backend, device = where
    for dtype in DTYPES:
        x = plain.numbers(0, 2, 12, 9, dtype=dtype).to(device)
        x[0, 0, 0], x[0, 1, 0] = 2.0**-24, 65000.0
        assert torch.equal(op(x, (3, 4), (3, 4), backend=backend), x)
        fine = op(x, (3, 4), (6, 12), mode="nearest", backend=backend).unflatten(1, (6, 12))
        assert torch.equal(fine, x.unflatten(1, (3, 4)).repeat_interleave(2, 1).repeat_interleave(3, 2))


def test_constants_stay_constant(where):
    """The weights of an output sum to one."""
    backend, device = where
    for grid, out_grid in plain.GRIDS:
        for mode, corners in MODES:
            out = op(torch.full((1, math.prod(grid), 3), 3.0, device=device), grid, out_grid, mode=mode,
                     align_corners=corners, backend=backend)  # fmt: skip
            # The rounded weights of an axis sum to one within a unit, and there are up to three axes.
            assert (out.double() - 3.0).abs().max() <= 3.0 * 4 * U32 * len(grid)


# torch's own samples.

SAMPLES = {"linear": 18, "bilinear": 24, "trilinear": 24, "nearest": 23, "area": 22}  # in torch 2.13


def torch_samples(variant: str):
    """(input, out sizes, align_corners) of torch's own samples, without those that scale by other than the sizes."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    found = next(o for o in op_db if (o.name, o.variant_test_name) == ("nn.functional.interpolate", variant))
    for sample in found.sample_inputs("cpu", torch.float32):
        sizes = F.interpolate(sample.input, *sample.args, **sample.kwargs).shape[2:]
        corners = bool(sample.kwargs["align_corners"])
        by_factor = sample.kwargs.get("recompute_scale_factor") is False
        yield sample, tuple(sizes), corners, by_factor and not corners and variant != "area"


@pytest.mark.parametrize("variant", SAMPLES)
def test_samples_of_torch(where, variant):
    backend, device = where
    mode = variant if variant in ("nearest", "area") else "linear"
    taken = skipped = 0
    for sample, sizes, corners, by_factor in torch_samples(variant):
        if by_factor:  # the given factor, not the ratio of the sizes
            skipped += 1
            continue
        taken += 1
        grid = tuple(sample.input.shape[2:])
        image = sample.input.detach().requires_grad_()
        tokens = image.detach().flatten(2).transpose(1, 2).to(device).requires_grad_()
        out = op(tokens, grid, sizes, mode=mode, align_corners=corners, backend=backend)
        theirs = F.interpolate(image, *sample.args, **sample.kwargs)
        slack = float(position_slack(tokens.detach(), grid, mode)) + 8 * U32 * float(image.detach().abs().max())
        close = {"rtol": 0.0, "atol": 0.0 if mode == "nearest" else slack}
        torch.testing.assert_close(out.cpu(), theirs.flatten(2).transpose(1, 2), **close)
        g = torch.rand_like(theirs)
        ours = torch.autograd.grad(out, tokens, g.flatten(2).transpose(1, 2).to(device))[0].cpu()
        theirs = torch.autograd.grad(theirs, image, g)[0].flatten(2).transpose(1, 2)
        # Up to prod(sizes) gradients of at most one meet in a token.
        close = {"rtol": 0.0, "atol": (8 + 3 * sum(grid)) * U32 * math.prod(sizes)}
        torch.testing.assert_close(ours, theirs, **close)
    assert taken >= 12 and taken + skipped >= SAMPLES[variant] - 2


# Transposes and derivatives.


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_transpose_in_float64(mode, align_corners):
    """<U x, y> = <x, U^T y>."""
    for grid, out_grid in plain.GRIDS:
        x = plain.numbers(1, 2, math.prod(grid), 5).double().requires_grad_()
        y = plain.numbers(2, 2, math.prod(out_grid), 5).double()
        out = op(x, grid, out_grid, mode=mode, align_corners=align_corners, backend="reference")
        back = torch.autograd.grad(out, x, y)[0]
        size = float((out.detach().abs() * y.abs()).sum())
        assert abs(float((out.detach() * y).sum() - (x.detach() * back).sum())) <= 1e-13 * size, (grid, out_grid)


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_transpose_is_exact(where, mode, align_corners):
    """Read off an identity matrix, the backward's table is the forward's, weight by weight, bit by bit."""
    backend, device = where
    for size, out_size in (
        (7, 14),
        (3, 14),
        (16, 14),
        (5, 3),
        (10, 17),
        (1, 9),
        (9, 1),
        (4, 22),
        (5, 51),
        (2, 9),
        (6, 6),
    ):
        x = torch.zeros(1, size, out_size, device=device, requires_grad=True)
        out = op(x, (size,), (out_size,), mode=mode, align_corners=align_corners, backend=backend)
        back = torch.autograd.grad(out, x, torch.eye(out_size, device=device)[None])[0][0]
        assert torch.equal(back.mT, read_off(size, out_size, backend, device, mode=mode, align_corners=align_corners))


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_derivatives_of_any_order(mode, align_corners):
    for grid, out_grid in (((3,), (5,)), ((2, 3), (3, 2)), ((2, 1, 2), (1, 2, 3))):
        x = torch.randn(2, 1 + math.prod(grid), 2, dtype=torch.float64, requires_grad=True)
        y = torch.randn(2, math.prod(out_grid), 2, dtype=torch.float64, requires_grad=True)
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        how = {"mode": mode, "align_corners": align_corners, "backend": "reference"}

        def one(x, how=how, grid=grid, out_grid=out_grid):
            return op(x, grid, out_grid, prefix_tokens=1, **how).sin()

        def two(y, x, scale, how=how, grid=grid, out_grid=out_grid):
            return add(y, x[:, 1:], scale, grid=grid, out_grid=out_grid, **how).sin()

        assert torch.autograd.gradcheck(one, x) and torch.autograd.gradgradcheck(one, x)
        assert torch.autograd.gradcheck(two, (y, x, scale)) and torch.autograd.gradgradcheck(two, (y, x, scale))


def test_second_derivatives_on_every_backend(where):
    """d2/dx2 of sum((U x)^2) g is 2 U^T (U g): twice the operator and its transpose."""
    backend, device = where
    x = plain.numbers(0, 1, 12, 5).to(device).requires_grad_()
    grad = torch.autograd.grad(op(x, (3, 4), (5, 6), backend=backend).square().sum(), x, create_graph=True)[0]
    v = plain.numbers(1, 1, 12, 5)
    second = torch.autograd.grad(grad, x, v.to(device))[0].cpu()
    U = plain.upsampling((3, 4), (5, 6))
    true = 2 * (U.mT @ (U @ v.double()))
    t.assert_within(second, true, 16 * U32 * (U.mT @ (U @ v.double().abs())))  # two interpolations of two axes, twice


# interpolate_add


def add_truth(x, y, scale, U, g):
    """Values and sizes of x + scale U y and of its gradients."""
    x64, y64, g64, s = x.double(), y.double(), g.double(), float(scale)
    fine, size = U @ y64, U @ y64.abs()
    values = {"out": x64 + s * fine, "x": g64, "y": s * (U.mT @ g64), "scale": (g64 * fine).sum()}
    spread = {"out": x64.abs() + 3 * abs(s) * size, "x": torch.zeros_like(g64)}
    spread |= {"y": 3 * abs(s) * (U.mT @ g64.abs()), "scale": 3 * (g64.abs() * size).sum()}
    return t.Truth(torch.empty(0), values, spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("mode, align_corners", MODES)
def test_add(where, mode, align_corners, as_tensor, dtype):
    backend, device = where
    for grid, out_grid in ((None, None), ((12,), (30,)), ((3, 4), (6, 5)), ((2, 3, 2), (5, 2, 3))):
        n, N = 12, math.prod(out_grid or (30,))
        for batch, width in ((2, 24), (1, 7), (0, 8), (3, 100)):
            y, x = (plain.numbers(i, batch, tokens, width, dtype=dtype) for i, tokens in enumerate((n, N)))
            g = plain.numbers(3, batch, N, width, dtype=dtype)
            named = {"x": x, "y": y} | ({"scale": torch.tensor([0.7])} if as_tensor else {})
            named = {k: v.clone().to(device).requires_grad_() for k, v in named.items()}
            grids = {} if grid is None else {"grid": grid, "out_grid": out_grid}
            settings = grids | {"mode": mode, "align_corners": align_corners, "backend": backend}
            out = add(*named.values(), **settings) if as_tensor else add(*named.values(), 0.7, **settings)
            grads = torch.autograd.grad(out, list(named.values()), g.to(device))
            U = plain.upsampling(grid or (n,), out_grid or (N,), mode, align_corners, dtype)
            true = add_truth(x, y, torch.tensor(0.7) if as_tensor else 0.7, U, g)
            assert out.dtype == dtype
            for name, got in (("out", out.detach()), *zip(named, grads, strict=True)):
                assert name == "out" or (got.dtype, got.shape) == (named[name].dtype, named[name].shape)
                # The gradient of scale is one float32 sum over everything.
                budget = true.budget(name, torch.float32 if name == "scale" else dtype, tight=name != "scale")
                t.assert_within(got.cpu().reshape(true.values[name].shape), true.values[name], budget, f"{grid} {name}")


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_segments_do_not_mix(where, mode, align_corners):
    """Each part alone; NaN in one part reaches no other."""
    backend, device = where
    segments = ((4, 9), (1, 5), (6, 3), (7, 7))
    y, x = plain.numbers(0, 2, 18, 10).to(device), plain.numbers(1, 2, 24, 10).to(device)
    how = {"mode": mode, "align_corners": align_corners, "backend": backend}
    out = add(x, y, 0.5, segments=segments, **how)
    alone = [add(b, a, 0.5, **how) for a, b in zip(y.split([4, 1, 6, 7], 1), x.split([9, 5, 3, 7], 1), strict=True)]
    assert torch.equal(out, torch.cat(alone, 1))
    y[:, 4] = torch.nan
    again = add(x, y, 0.5, segments=segments, **how)
    assert again[:, 9:14].isnan().all()
    assert torch.equal(torch.cat([again[:, :9], again[:, 14:]], 1), torch.cat([out[:, :9], out[:, 14:]], 1))
    leaf = y.nan_to_num().requires_grad_()
    grad = torch.autograd.grad(add(x, leaf, 0.5, segments=segments, **how)[:, :9].sum(), leaf)[0]
    assert grad[:, :4].any() and not grad[:, 4:].any()


def test_add_by_hand(where):
    backend, device = where
    x, y = torch.zeros(1, 4, 1, device=device), torch.tensor([[[0.0], [8.0]]], device=device)
    assert add(x + 1, y, 2.0, backend=backend).flatten().tolist() == [1.0, 5.0, 13.0, 17.0]
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    out = add(x + 1, y, scale, backend=backend)
    assert torch.autograd.grad(out.sum(), scale)[0].item() == 16.0


def test_scale_zero_and_minus(where):
    """x + 0 U y is x wherever y is finite, and the order of terms does not matter for the sign."""
    backend, device = where
    x, y = plain.numbers(0, 2, 9, 4).to(device), plain.numbers(1, 2, 5, 4).to(device)
    assert torch.equal(add(x, y, 0.0, backend=backend), x)
    t.assert_within(add(torch.zeros_like(x), y, -1.0, backend=backend).cpu().neg(),
                    op(y, (5,), (9,), backend=backend).double().cpu(), torch.zeros(2, 9, 4))  # fmt: skip


def test_add_under_autocast(where):
    """Mixed dtypes widen, as in torch.add."""
    backend, device = where
    x, y = plain.numbers(0, 2, 9, 4).to(device), plain.numbers(1, 2, 5, 4, dtype=torch.bfloat16).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = add(x, y, 0.5, backend=backend)
        assert op(x, (9,), (4,), backend=backend).dtype == torch.float32
    assert out.dtype == torch.float32 and torch.equal(out, add(x, y.float(), 0.5, backend=backend))


# Where NaN goes, layouts, repetition.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("mode, align_corners", MODES)
def test_bad_numbers_stay_where_they_have_weight(where, mode, align_corners, bad):
    """Forward and backward: whoever gives a token no weight keeps every bit."""
    backend, device = where
    for grid, out_grid in (((5, 4), (9, 8)), ((6,), (3,)), ((4,), (22,)), ((5, 5), (5, 9)), ((2, 3, 2), (4, 3, 5))):
        U = plain.upsampling(grid, out_grid, mode, align_corners)
        for token in range(0, math.prod(grid), 3):
            x = plain.numbers(0, 1, math.prod(grid), 6).to(device)
            how = {"mode": mode, "align_corners": align_corners, "backend": backend}
            clean = op(x, grid, out_grid, **how)
            x[0, token, 2] = bad
            out = op(x, grid, out_grid, **how)
            touched = torch.zeros(out.shape, dtype=torch.bool, device=device)
            touched[0, :, 2] = (U[:, token] > 0).to(device)
            assert torch.equal(out[~touched], clean[~touched]) and not out[touched].isfinite().any()
        for token in range(0, math.prod(out_grid), 5):
            leaf = torch.zeros(1, math.prod(grid), 6, device=device, requires_grad=True)
            g = plain.numbers(1, 1, math.prod(out_grid), 6).to(device)
            clean = torch.autograd.grad(op(leaf, grid, out_grid, **how), leaf, g)[0]
            g[0, token, 2] = bad
            grad = torch.autograd.grad(op(leaf, grid, out_grid, **how), leaf, g)[0]
            touched = torch.zeros(grad.shape, dtype=torch.bool, device=device)
            touched[0, :, 2] = (U[token] > 0).to(device)
            assert torch.equal(grad[~touched], clean[~touched]) and not grad[touched].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(where, dtype):
    backend, device = where
    x, y = plain.numbers(0, 2, 13, 9, dtype=dtype).to(device), plain.numbers(1, 2, 31, 9, dtype=dtype).to(device)

    def run(x, y, g):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        one, two = op(x, (3, 4), (6, 5), prefix_tokens=1, backend=backend), add(y, x, 0.5, backend=backend)
        return one, two, *torch.autograd.grad([one, two], [x, y], [g, g])

    args = [x, y, plain.numbers(2, 2, 31, 9, dtype=dtype).to(device)]
    for i, given in enumerate(args):
        for name, view in t.layouts(given):
            changed, copied = list(args), list(args)
            changed[i], copied[i] = view, view.clone(memory_format=torch.contiguous_format)
            for a, b in zip(run(*changed), run(*copied), strict=True):
                assert torch.equal(a, b), f"argument {i} as {name}: strides {view.stride()}"


def test_same_bits_every_time(where):
    """Twice, with one thread or three, alone or beside others in the batch; forward, gradients and that of scale."""
    backend, device = where
    for grid, out_grid, batch, width in (((9, 8), (20, 17), 5, 24), ((500,), (1333,), 2, 40), ((40,), (7,), 3, 3)):
        leaves = [plain.numbers(i, batch, math.prod(s), width).to(device) for i, s in enumerate((grid, out_grid))]
        g = plain.numbers(3, batch, math.prod(out_grid), width).to(device)

        def run(y, x, g, grid=grid, out_grid=out_grid):
            y, x = y.detach().requires_grad_(), x.detach().requires_grad_()
            scale = torch.tensor(0.3, device=device, requires_grad=True)
            out = add(x, y, scale, grid=grid, out_grid=out_grid, backend=backend)
            return out, *torch.autograd.grad(out, [y, x, scale], g)

        whole = run(*leaves, g)
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(run(*leaves, g), whole, strict=True)), threads
        part = run(*(v[1:2] for v in (*leaves, g)))
        assert all(torch.equal(a, b[1:2]) for a, b in zip(part[:3], whole[:3], strict=True))
