"""Every way through the Triton kernels of scale fusion, token interpolation and token pooling, in the interpreter at
small sizes: the limits that decide between kernels are moved so that small calls take the ways of large ones."""

import inspect
import math

import plain_scale_fusion as plain
import plain_token_pool as plain_pool
import pytest
import torch

import hivilt
import hivilt.testing as t

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("the kernels run on the GPU here, at sizes of their own", allow_module_level=True)

launch = pytest.importorskip("hivilt.triton_kernels.launch")
launches = pytest.importorskip("hivilt.triton_kernels.scale_fusion_launch")
pools = pytest.importorskip("hivilt.triton_kernels.token_pool_launch")
interpolation = pytest.importorskip("hivilt.triton_kernels.interpolation")
interpreter = pytest.importorskip("interpreter")

op, pool = hivilt.ops.scale_fusion, hivilt.ops.token_pool
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = [("linear", False), ("linear", True), ("nearest", False), ("area", False)]


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Names of the kernels that calls start, in order."""
    names: list[str] = []
    start = launch.launch

    def noted(kernel, *args, **constants):
        names.append(kernel.__name__)
        return start(kernel, *args, **constants)

    monkeypatch.setattr(launch, "launch", noted)
    return names


@pytest.fixture(params=["rows in one program", "rows in loops"])
def row_way(request, monkeypatch) -> str:
    if request.param == "rows in loops":
        monkeypatch.setattr(launches, "WHOLE_ROW", dict.fromkeys(launches.WHOLE_ROW, 0))
        monkeypatch.setattr(launches, "HELD_ROW", 0)
    return request.param


# Fusion. (grids, widths, out_width, settings)
IMAGE = ([(3, 4), (2, 2), (6, 8)], [24, 12, 8], 40)
CALLS = {
    "plain": (*IMAGE, {}),
    "interpolated first": (*IMAGE, {"impl": "prologue", "activation": "silu"}),
    "projected first": (*IMAGE, {"impl": "epilogue", "activation": "gelu_tanh"}),
    "align corners": (*IMAGE, {"align_corners": True, "out_grid": (5, 3)}),
    "nearest": (*IMAGE, {"mode": "nearest", "impl": "epilogue"}),
    "area": (*IMAGE, {"mode": "area", "out_grid": (2, 3)}),
    "sequence": ([(9,), (4,), (1,)], [16, 33, 5], 24, {"norm": "affine", "activation": "relu", "out_grid": (13,)}),
    "video": ([(2, 3, 2), (1, 2, 3)], [20, 8], 16, {"norm": "none", "activation": "none", "impl": "epilogue"}),
    "prefix": (*IMAGE, {"prefix_tokens": 2, "prefixed": [True, False, True]}),
    "prefix, projected": (*IMAGE, {"prefix_tokens": 1, "prefixed": [False, True, False], "impl": "epilogue"}),
    "two powers of two": ([(3, 4), (2, 2)], [24, 12], 96, {"impl": "epilogue", "wide_norm": True}),
    "two larger ones": ([(3, 4), (2, 2)], [70, 12], 192, {"bias": False}),
    "columns apart": ([(3, 4), (2, 2)], [24, 12], 300, {"norm": "affine", "activation": "relu"}),
    "columns apart, no norm": ([(3, 4), (2, 2)], [24, 12], 150, {"norm": "none", "activation": "gelu"}),
    "five scales": ([(3, 3), (2, 2), (1, 1), (3, 3), (4, 1)], [3, 1, 16, 7, 9], 17, {}),
    "video, axis by axis": ([(5, 5, 5), (1, 1, 1)], [5, 5], 16, {"mode": "area", "out_grid": (1, 1, 1)}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_every_way_within_budget(name, dtype):
    grids, widths, out_width, settings = CALLS[name]
    plain.judge(op, plain.call(grids, widths, out_width, dtype, **settings), "triton", what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "prefix", "two powers of two"])
def test_long_rows(row_way, started, name, dtype):
    grids, widths, out_width, settings = CALLS[name]
    plain.judge(op, plain.call(grids, widths, out_width, dtype, **settings), "triton", what=name)
    looped = {"_finish_kernel", "_row_statistics_kernel"}
    assert looped & set(started) == (looped if row_way == "rows in loops" else set())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(seed, dtype):
    plain.judge(op, plain.Case(200 + seed, dtype).inputs(), "triton")


@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
@pytest.mark.parametrize("norm", ["layer", "affine", "none"])
def test_norms_and_activations(norm, activation):
    x = plain.call([(3, 4), (2, 2)], [10, 7], 24, norm=norm, activation=activation)
    plain.judge(op, x, "triton")


def test_gradients_are_those_of_torch_in_float64():
    """F.interpolate, cat, linear, layer_norm, gelu and their autograd."""
    x = plain.call(*IMAGE)
    wide = plain.replaced(x, {name: v.double() for name, v in plain.leaves(x).items()})
    upstream = plain.numbers(1, 2, 12, 40)
    named = {name: v.requires_grad_() for name, v in plain.leaves(x).items()}
    out = op(**plain.replaced(x, named), backend="triton")
    got = {"out": out.detach()} | dict(
        zip(named, torch.autograd.grad(out, list(named.values()), upstream), strict=True)
    )
    for name, value in plain.eager(wide, upstream.double()).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("impl, products", [("prologue", 0), ("epilogue", 2), ("auto", 0)])
def test_order_of_interpolation_and_projection(started, impl, products):
    """auto interpolates first, up to 128 output channels, and whatever is finer than the output."""
    x = plain.call(*IMAGE)
    op(**x, impl=impl, backend="triton")
    assert started == ["_rows_product_kernel"] * products + ["_scale_fusion_kernel"]
    del started[:]
    op(**plain.call([(3, 4), (2, 2), (6, 8)], [24, 12, 8], 160), impl=impl, backend="triton")
    assert started.count("_rows_product_kernel") == (1 if impl == "auto" else products)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("name", ["plain", "prefix", "two larger ones", "columns apart"])
def test_dropout_is_the_documented_mask(row_way, name, p):
    grids, widths, out_width, settings = CALLS[name]
    x = plain.call(grids, widths, out_width, **settings | {"norm": "layer", "activation": "silu"})
    torch.manual_seed(5)
    seed = int(hivilt.ops._running.draw_seed(x["features"][0]))
    torch.manual_seed(5)
    tokens = x.get("prefix_tokens", 0) + math.prod(grids[0])
    keep = plain.dropout_keep(seed, p, (2, tokens, out_width))
    got = plain.judge(op, x | {"dropout_p": p, "training": True}, "triton", keep=keep)
    assert torch.equal(got["out"] == 0.0, keep == 0.0)


@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
@pytest.mark.parametrize("mode, align_corners", MODES)
def test_bad_tokens_ruin_what_reads_them(mode, align_corners, impl):
    """NaN in a token of each scale: in the output where it has weight, and its gradient nowhere else."""
    settings = {"mode": mode, "align_corners": align_corners, "prefix_tokens": 1}
    grids, out_grid = [(4, 4), (2, 3), (5, 8)], (4, 4)
    x = plain.call(grids, [8, 4, 3], 16, **settings)
    for s, grid in enumerate(grids):
        tokens = [f.clone() for f in x["features"]]
        tokens[s][1, 3] = torch.nan
        out = op(**x | {"features": tokens, "impl": impl}, backend="triton")
        U = plain.with_prefix(plain.upsampling(grid, out_grid, mode, align_corners), 1, 1)
        assert torch.equal(out[1].isnan().any(-1), U[:, 3] != 0) and not out[0].isnan().any()
        upstream = torch.randn(out.shape)
        upstream[1, 6] = torch.nan
        leaf = x["features"][s].clone().requires_grad_()
        fused = op(**x | {"features": [leaf if i == s else f for i, f in enumerate(x["features"])]}, backend="triton")
        grad = torch.autograd.grad(fused, leaf, upstream)[0]
        assert torch.equal(grad[1].isnan().any(-1), U[6] != 0) and not grad[0].isnan().any()


LAYOUTS = [
    "permuted",
    "column_major",
    "step2_row",
    "step2_last",
    "slice_row",
    "expanded_row",
    "expanded_batch",
    "offset3",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(layout):
    grids, widths, out_width, settings = CALLS["prefix, projected"]
    x = plain.call(grids, widths, out_width, torch.bfloat16, **settings)
    views = {n: t.relayout(v, layout) for n, v in plain.leaves(x).items()}
    results = []
    for named in (views, {n: v.clone(memory_format=torch.contiguous_format) for n, v in views.items()}):
        named = {n: v.detach().requires_grad_() for n, v in named.items()}
        out = op(**plain.replaced(x, named), backend="triton")
        upstream = t.relayout(plain.numbers(3, *out.shape, dtype=out.dtype), layout)
        results.append((out, *torch.autograd.grad(out, list(named.values()), upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_same_bits_every_time_and_beside_any_neighbour():
    x = plain.call(*IMAGE, torch.bfloat16, batch=3)
    both = [plain.judge(op, x, "triton") for _ in range(2)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    alone = op(**x | {"features": [f[1:2] for f in x["features"]]}, backend="triton")
    assert torch.equal(alone, both[0]["out"][1:2])


@pytest.mark.parametrize("name", ["plain", "prefix, projected", "columns apart"])
def test_fresh_memory_may_hold_anything(row_way, nan_filled_memory, name):
    grids, widths, out_width, settings = CALLS[name]
    plain.judge(op, plain.call(grids, widths, out_width, **settings), "triton")


@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("name", ["plain", "prefix, projected", "area", "two powers of two"])
def test_nothing_is_read_outside_a_tensor(row_way, name, at):
    """Every input lies against a page that faults."""
    grids, widths, out_width, settings = CALLS[name]
    x = plain.call(grids, widths, out_width, torch.bfloat16, **settings)
    named = {n: t.guarded(v, at).requires_grad_() for n, v in plain.leaves(x).items()}
    out = op(**plain.replaced(x, named), backend="triton")
    torch.autograd.grad(out, list(named.values()), t.guarded(torch.ones_like(out), at))


def far(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, samples 2^31 elements apart, in memory that is never touched."""
    step = 2**31 + 64
    spread = torch.empty((len(x) - 1) * step + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (step, *x.stride()[1:]))
    return spread.copy_(x)


@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
def test_offsets_beyond_int32(impl):
    """An int32 that overflows raises, forward and backward."""
    x = plain.call(*IMAGE, torch.bfloat16, impl=impl, prefix_tokens=1)
    wide = x | {"features": [far(f) for f in x["features"]]}
    results = []
    for call in (x, wide):
        named = {n: v.requires_grad_() for n, v in plain.leaves(call).items()}
        with interpreter.strict():
            torch.manual_seed(0)
            out = op(**plain.replaced(call, named), dropout_p=0.5, training=True, backend="triton")
            results.append((out, *torch.autograd.grad(out.sum(), list(named.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_at_all():
    """No batch, and a scale without channels."""
    x = plain.call([(3, 4), (2, 2)], [8, 0], 16, batch=2)
    plain.judge(op, x, "triton")
    empty = plain.call([(3, 4), (2, 2)], [8, 4], 16, batch=0)
    got = plain.judge(op, empty, "triton")
    assert got["out"].shape == (0, 12, 16) and not got["weight"].any()


def test_some_gradients_alone():
    x = plain.call(*IMAGE)
    whole = plain.judge(op, x, "triton")
    for name in ("features[1]", "weight", "bias", "norm_weight"):
        named = plain.leaves(x)
        leaf = named[name].detach().requires_grad_()
        out = op(**plain.replaced(x, {name: leaf}), backend="triton")
        grad = torch.autograd.grad(out, leaf, plain.numbers(11, *out.shape))[0]
        assert torch.equal(grad, whole[name])


# Interpolation.


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_tables_are_those_of_torch(mode, align_corners):
    """Both directions bit for bit, and the transposed one is the transposed matrix."""
    for size, out_size in (
        (7, 14),
        (3, 14),
        (16, 14),
        (5, 3),
        (1, 9),
        (9, 1),
        (4, 22),
        (5, 51),
        (2, 9),
        (64, 1),
        (8, 8),
    ):
        matrix = torch.from_numpy(plain.axis_matrix(size, out_size, mode, align_corners, torch.float32)).float()
        for transposed in (False, True):
            found = interpolation.axis(size, out_size, mode, align_corners, transposed, "cpu")
            wanted = matrix.mT if transposed else matrix
            if found is None:
                assert size == out_size
                continue
            starts, weights, taps = found
            dense = torch.zeros(wanted.shape[0], wanted.shape[1] + taps)
            dense.scatter_(1, starts.long()[:, None] + torch.arange(taps), weights)
            assert torch.equal(dense[:, : wanted.shape[1]], wanted) and not dense[:, wanted.shape[1] :].any()


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_default_device_is_not_that_of_the_tables(mode, align_corners):
    """As after ``torch.set_default_device("cuda")``; meta tensors are as far from the others as those of a GPU."""
    x = torch.randn(1, 6, 5)
    how = {"mode": mode, "align_corners": align_corners, "backend": "triton"}
    usual = hivilt.ops.interpolate_tokens(x, (2, 3), (5, 3), **how)
    interpolation.axis.cache_clear()
    with torch.device("meta"):
        out = hivilt.ops.interpolate_tokens(x, (2, 3), (5, 3), **how)
    interpolation.axis.cache_clear()
    assert torch.equal(out, usual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode, align_corners", MODES)
def test_interpolation_within_budget(mode, align_corners, dtype):
    for grid, out_grid, prefix in (
        ((5,), (9,), 0),
        ((3, 4), (7, 2), 2),
        ((2, 3, 4), (3, 3, 1), 1),
        ((1, 1), (12, 12), 0),
    ):
        x = plain.numbers(1, 2, prefix + math.prod(grid), 5, dtype=dtype).requires_grad_()
        how = {"mode": mode, "align_corners": align_corners, "prefix_tokens": prefix, "backend": "triton"}
        out = hivilt.ops.interpolate_tokens(x, grid, out_grid, **how)
        true = plain.interpolated(x.detach(), grid, out_grid, mode, align_corners, prefix)
        t.assert_within(out.detach(), true.values["out"], true.budget("out", dtype))
        g = plain.numbers(2, *out.shape, dtype=dtype)
        U = plain.with_prefix(plain.upsampling(grid, out_grid, mode, align_corners), prefix, prefix)
        back = t.Truth(torch.empty(0), {"x": U.mT @ g.double()}, {"x": len(grid) * U.mT @ g.double().abs()})
        t.assert_within(torch.autograd.grad(out, x, g)[0], back.values["x"], back.budget("x", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_in_segments_with_a_learned_scale(dtype):
    segments = ((4, 9), (3, 3), (5, 2))
    x, y = (plain.numbers(s, 2, n, 7, dtype=dtype).requires_grad_() for s, n in ((1, 14), (2, 12)))
    scale = torch.tensor([0.7], requires_grad=True)
    out = hivilt.ops.interpolate_add(x, y, scale, segments=segments, backend="triton")
    U = torch.block_diag(*(plain.upsampling((n,), (N,)) for n, N in segments))
    g = plain.numbers(3, *out.shape, dtype=dtype)
    grads = torch.autograd.grad(out, (x, y, scale), g)
    fine, size = U @ y.detach().double(), U @ y.detach().double().abs()
    s = float(scale.detach())
    values = {
        "out": x.double() + s * fine,
        "x": g.double(),
        "y": s * U.mT @ g.double(),
        "scale": (g * fine).sum()[None],
    }
    spread = {"out": x.double().abs() + 2 * s * size, "x": g.double().abs(), "y": 2 * s * U.mT @ g.double().abs(),
              "scale": (g.abs() * size).sum()[None]}  # fmt: skip
    true = t.Truth(
        torch.empty(0), {n: v.detach() for n, v in values.items()}, {n: v.detach() for n, v in spread.items()}
    )
    for name, value in zip(values, (out.detach(), *grads), strict=True):
        t.assert_within(value, true.values[name], true.budget(name, torch.float32 if name == "scale" else dtype), name)


# Pooling.


@pytest.fixture(params=["tokens in one program", "scores first"])
def pool_way(request, monkeypatch) -> str:
    monkeypatch.setattr(pools, "WHOLE_TOKENS", dict.fromkeys(pools.WHOLE_TOKENS, 256))
    if request.param == "scores first":
        monkeypatch.setattr(pools, "WHOLE_TOKENS", dict.fromkeys(pools.WHOLE_TOKENS, 0))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_within_budget(pool_way, dtype):
    for B, N, C, K, options in (
        (2, 37, 24, 12, {"masked": True}),
        (1, 150, 40, 70, {"pools": ("attention", "max"), "bias": False}),
        (3, 9, 150, 5, {"pools": ("max", "mean", "attention"), "wide_weights": True}),
        (4, 70, 20, 8, {"pools": ("mean",), "masked": True}),
        (2, 1, 7, 3, {}),
    ):
        plain_pool.judge(pool, plain_pool.call(B, N, C, K, dtype, **options), "triton", what=f"{N} {C}")


def test_pools_start_their_kernels(pool_way, started):
    plain_pool.judge(pool, plain_pool.call(2, 37, 24, 12), "triton")
    assert ("_token_scores_kernel" in started) == (pool_way == "scores first")


def test_padded_tokens_may_hold_anything(pool_way, nan_filled_memory):
    """Among them rows without any token that takes part: zeros, and zero gradients."""
    x = plain_pool.call(5, 40, 12, 6, masked=True, seed=3)
    x["mask"][2] = False
    plain_pool.judge(pool, x, "triton")
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(4)
    results = []
    for features in (x["features"], torch.where(x["mask"][..., None], x["features"], bad)):
        named = {n: v.clone().requires_grad_() for n, v in plain_pool.leaves(x | {"features": features}).items()}
        out = pool(**x | named, backend="triton")
        results.append((out, *torch.autograd.grad(out, list(named.values()), plain.numbers(1, *out.shape))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][0][2].any() and not results[0][1][2].any()


def test_largest_tokens(pool_way):
    """The first of equals, -inf included; NaN above all."""
    x = plain_pool.call(1, 150, 4, 2, pools=("max",))
    x["features"] = x["features"].clamp(max=1.0)
    x["features"][..., 1] = -torch.inf
    x["features"][0, [70, 90], 2] = torch.nan
    x["features"][..., 3] = torch.where(torch.arange(150) % 2 == 0, -0.0, 0.0)
    leaf = x["features"].clone().requires_grad_()
    out = pool(**x | {"features": leaf}, backend="triton")
    grad = torch.autograd.grad(out[out == out].sum() + out.nan_to_num(0.0).sum() * 0.0 + out[0, 2], leaf)[0]
    first = grad.ne(0.0).float().argmax(1)[0].tolist()
    assert out[0, 2].isnan() and out[0, 1] == -torch.inf
    assert first == [int((x["features"][0, :, 0] == 1.0).float().argmax()), 0, 70, 0]


@pytest.mark.parametrize("at", ["start", "end"])
def test_pooling_reads_nothing_outside_a_tensor(pool_way, at):
    x = plain_pool.call(2, 37, 24, 12, torch.bfloat16, masked=True)
    named = {n: t.guarded(v, at).requires_grad_() for n, v in plain_pool.leaves(x).items()}
    out = pool(**x | named | {"mask": t.guarded(x["mask"], at)}, backend="triton")
    torch.autograd.grad(out, list(named.values()), t.guarded(torch.ones_like(out), at))


def test_pooling_with_offsets_beyond_int32(pool_way):
    x = plain_pool.call(2, 37, 24, 12, torch.bfloat16, masked=True)
    results = []
    for features in (x["features"], far(x["features"])):
        named = {n: v.requires_grad_() for n, v in plain_pool.leaves(x | {"features": features}).items()}
        with interpreter.strict():
            out = pool(**x | named, backend="triton")
            results.append((out, *torch.autograd.grad(out.sum(), list(named.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# All together.


def test_every_kernel_was_started(started, monkeypatch):
    monkeypatch.setattr(launches, "HELD_ROW", 20)
    monkeypatch.setattr(launches, "WHOLE_ROW", dict.fromkeys(launches.WHOLE_ROW, 20))
    monkeypatch.setattr(pools, "WHOLE_TOKENS", dict.fromkeys(pools.WHOLE_TOKENS, 20))
    for width in (16, 24):
        plain.judge(op, plain.call([(3, 4), (2, 2)], [8, 4], width, impl="epilogue"), "triton")
        plain_pool.judge(pool, plain_pool.call(1, 9, width, 5), "triton")
    scale = torch.ones((), requires_grad=True)
    hivilt.ops.interpolate_add(torch.randn(1, 9, 3), torch.randn(1, 4, 3), scale, backend="triton").sum().backward()
    modules = (interpolation, launches.products, launches.kernels, pools.kernels)
    written = {n for m in modules for n, f in inspect.getmembers(m) if n.startswith("_") and n.endswith("_kernel")}
    assert written == set(started)


@pytest.mark.parametrize("operation", ["scale_fusion", "interpolate_tokens", "token_pool"])
def test_refusals_say_why(operation):
    tokens = {"x": torch.zeros(1, 4, 2).double(), "grid": (4,), "out_grid": (8,)}
    calls = {
        "scale_fusion": (op, plain.call(*IMAGE, torch.float64)),
        "interpolate_tokens": (hivilt.ops.interpolate_tokens, tokens),
        "token_pool": (pool, plain_pool.call(1, 4, 2, 2, torch.float64)),
    }
    function, arguments = calls[operation]
    with pytest.raises(hivilt.BackendError, match="float64: the kernels take float32, bfloat16 and float16"):
        function(**arguments, backend="triton")


@pytest.mark.parametrize("mode", ["nearest", "area"])
def test_axes_of_a_source_hold_tensors_alone(mode):
    """Triton 3.6 loses a number 1 two tuples deep, which is what an axis that reads one token would hold."""
    found = interpolation.axes((4, 4), (8, 8), mode, False, False, torch.device("cpu"))
    assert interpolation.taps_of(found) == 1
    source = launches._source(torch.zeros(1, 16, 3), 0, found, (4, 4))
    axes = [x for x in source if isinstance(x, tuple)]
    assert (
        len(axes) == 2 and all(isinstance(x, torch.Tensor) for axis in axes for x in axis) and source[9:] == (1, 1, 1)
    )
