"""token_pool, every backend against float64: random parity, masks, ties, NaN, layouts, and what torch expects of it."""

import hashlib
import itertools
import math

import plain_token_pool as plain
import pytest
import torch
from guard_pages import survives
from plain_scale_fusion import numbers
from torch._subclasses.fake_tensor import FakeTensorMode

import hivilt
import hivilt.testing as t

pytestmark = pytest.mark.operation("token_pool")
op = hivilt.ops.token_pool
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = 60  # random ones per dtype and backend
ORDERS = [pools for n in (1, 2, 3) for pools in itertools.permutations(plain.POOLS, n)]


def moved(x: dict, device: str) -> tuple[dict, dict]:
    """The call on the device, and its leaves, which need gradients."""
    named = {n: v.detach().clone().to(device).requires_grad_() for n, v in plain.leaves(x).items()}
    return x | named | ({"mask": x["mask"].to(device)} if x.get("mask") is not None else {}), named


def run(x: dict, backend: str, device: str, g: torch.Tensor | None = None) -> dict:
    y, named = moved(x, device)
    out = op(**y, backend=backend)
    g = torch.ones_like(out) if g is None else g.to(device)
    return {"out": out.detach()} | dict(zip(named, torch.autograd.grad(out, list(named.values()), g), strict=True))


def test_truth_is_what_torch_computes():
    """In float64 the truth of these tests and the plain module differ by rounding alone, output and every gradient."""
    seen = set()
    for seed in range(120):
        x = plain.Case(seed, torch.float64).inputs()
        if x["features"].numel() and (x.get("mask") is None or x["mask"].any(1).all()):
            g = numbers(3, *x["features"][:, 0].shape, dtype=torch.float64)
            true = plain.truth(x, g)
            for name, value in plain.eager(x, g).items():
                torch.testing.assert_close(value, true.values[name], rtol=1e-10, atol=1e-12)
                seen.add(name)
    assert seen == {"out", "features", *plain.PARAMETERS}


@pytest.mark.parametrize("wrong", ["out", "features", "proj_weight", "score_weight", "pool_weights"])
def test_judge_refuses_a_wrong_result(wrong):
    """One number in a thousandth off, forward or backward."""
    x = plain.call(2, 40, 24, 16)

    def planted(**y):
        def off(v):
            return v.detach() + (v - v.detach()) * 1.001

        return op(**y) * 1.0001 if wrong == "out" else op(**y | {wrong: off(y[wrong])})

    plain.judge(op, x, "reference")
    with pytest.raises(AssertionError, match=wrong):
        plain.judge(planted, x, "reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random(where, dtype):
    backend, device = where
    tally = t.Tally(dtype)
    for seed in range(CASES):
        plain.judge(op, plain.Case(seed, dtype).inputs(), backend, device, tally, f"case {seed}")
    tally.assert_no_worse()


def test_random_float64():
    for seed in range(CASES):
        plain.judge(op, plain.Case(seed, torch.float64).inputs(), "reference", what=f"case {seed}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_filled_memory_changes_nothing(where, dtype, nan_filled_memory):
    backend, device = where
    for seed in range(300, 330):
        plain.judge(op, plain.Case(seed, dtype).inputs(), backend, device, what=f"case {seed}")


@pytest.mark.parametrize("pools", ORDERS, ids="+".join)
def test_every_subset_and_order(where, pools):
    """Weight p belongs to pools[p]."""
    backend, device = where
    for masked in (False, True):
        x = plain.call(3, 50, 24, 10, pools=pools, masked=masked, seed=4)
        got = plain.judge(op, x, backend, device)
        order = [plain.POOLS.index(p) for p in pools]
        ordered = sorted(range(len(pools)), key=order.__getitem__)
        y = x | {"pools": tuple(pools[i] for i in ordered), "pool_weights": x["pool_weights"][ordered]}
        again = plain.judge(op, y, backend, device)
        # Only the order of at most three terms differs.
        torch.testing.assert_close(got["out"], again["out"], rtol=0, atol=4 * 2**-24 * float(x["features"].abs().max()))
        torch.testing.assert_close(got["pool_weights"][ordered], again["pool_weights"])


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 63, 65, 96, 100, 127, 192, 257, 513])
def test_every_width(where, width):
    """Of the features and, backwards through the list, of the hidden layer."""
    backend, device = where
    for dtype in DTYPES:
        for K in (1, 257 // width + 1, min(width, 100)):
            plain.judge(op, plain.call(2, 37, width, K, dtype, masked=True), backend, device, what=f"{dtype} K={K}")


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 196, 255, 257, 1000, 3136])
def test_every_length(where, tokens):
    backend, device = where
    for dtype in DTYPES:
        for batch in (1, 3):
            plain.judge(op, plain.call(batch, tokens, 20, 6, dtype), backend, device, what=f"{dtype} {batch}")


@pytest.mark.parametrize("B, N", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_to_pool(where, B, N, masked):
    """No token: zeros. No sample: nothing, and zero gradients."""
    backend, device = where
    for dtype in DTYPES:
        got = run(plain.call(B, N, 8, 3, dtype, masked=masked), backend, device)
        assert got["out"].shape == (B, 8) and not any(v.any() for v in got.values())


@pytest.mark.parametrize("pools", [("mean",), ("max",), ("attention",), plain.POOLS], ids="+".join)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_padded_tokens_may_hold_anything(where, pools, bad):
    """They are the same as absent, forward and backward, and get no gradient."""
    backend, device = where
    for dtype in (torch.float32, torch.bfloat16):
        x = plain.call(3, 40, 12, 5, dtype, pools=pools)
        x["mask"] = torch.arange(40) % 3 != torch.arange(3)[:, None] % 3
        x["mask"][2] = torch.arange(40) < 7
        clean = run(x, backend, device)
        filled = torch.where(x["mask"][..., None], x["features"], bad)
        got = run(x | {"features": filled}, backend, device)
        for name, value in clean.items():
            assert torch.equal(got[name], value), name
        assert not got["features"].cpu()[~x["mask"]].any()
        packed = x | {"features": x["features"][2:, :7]} | {"mask": None}
        torch.testing.assert_close(run(packed, backend, device)["out"], clean["out"][2:])


def test_fully_padded_rows(where):
    """Zeros, zero gradient, and no share in the gradients of parameters, whatever they hold."""
    backend, device = where
    for pools in ORDERS:
        x = plain.call(4, 30, 12, 5, pools=pools)
        x["mask"] = torch.ones(4, 30, dtype=torch.bool)
        x["mask"][1], x["mask"][3] = False, False
        x["features"][1], x["features"][3, 4] = math.nan, math.inf
        got = run(x, backend, device)
        assert not got["out"][[1, 3]].any() and not got["features"][[1, 3]].any()
        rest = x | {"features": x["features"][[0, 2]], "mask": None}
        for name, value in run(rest, backend, device).items():
            alike = got[name][[0, 2]] if name in ("out", "features") else got[name]
            torch.testing.assert_close(alike, value, rtol=1e-6, atol=1e-6)
        x["mask"][:] = False
        assert not any(v.any() for v in run(x, backend, device).values())


def test_tied_maxima_send_their_gradient_to_the_lowest_index(where):
    backend, device = where
    for dtype in DTYPES:
        for N in (2, 33, 300):
            x = plain.call(2, N, 40, 1, dtype, pools=("max",))
            x["features"] = x["features"].mul(0.7).round()  # every value many times
            x["features"][0, :, 0] = torch.where(torch.arange(N) % 2 == 0, 0.0, -0.0)  # equal, too
            x["features"][0, :, 1] = -torch.inf
            got = run(x, backend, device)
            top = x["features"] == x["features"].amax(1, keepdim=True)
            first = top.int().argmax(1)
            expected = torch.zeros_like(x["features"]).scatter(1, first[:, None], 1.0)
            assert torch.equal(got["features"].cpu(), expected)
            assert torch.equal(got["out"].cpu(), x["features"].amax(1))
            x["mask"] = torch.arange(N).expand(2, N) >= N // 2
            hidden = run(x, backend, device)["features"].cpu()
            late = (top := x["features"][:, N // 2 :]) == top.amax(1, keepdim=True)
            assert torch.equal(hidden[:, N // 2 :].argmax(1), late.int().argmax(1)) and not hidden[:, : N // 2].any()


def test_nan_spreads_as_in_the_plain_module(where):
    """A NaN among the tokens that take part: its channel of mean and max, the whole sample of attention, and no other
    sample."""
    backend, device = where
    for pools in (("mean",), ("max",), ("attention",), plain.POOLS):
        x = plain.call(3, 40, 12, 5, pools=pools)
        clean = run(x, backend, device)
        x["features"][1, 17, 4] = math.nan
        got = run(x, backend, device)
        lost = plain.eager(x)["out"].isnan()
        assert lost[1, 4] and torch.equal(got["out"].isnan().cpu(), lost)
        for name in ("out", "features"):
            assert torch.equal(got[name][[0, 2]], clean[name][[0, 2]]), name
        if pools == ("max",):  # the gradient of the lost channel goes to the NaN
            assert got["features"][1, 17, 4] != 0 and got["features"].isfinite().all()


def test_scores_far_apart(where):
    """A softmax over huge scores is one-hot, never NaN."""
    backend, device = where
    for size in (1e2, 1e4, 1e30):
        x = plain.call(2, 60, 12, 5, pools=("attention",), bias=False)
        x["score_weight"] = x["score_weight"] * size
        got = run(x, backend, device)
        assert all(v.isfinite().all() for v in got.values())
        if size > 1e3:
            hidden = torch.tanh(x["features"].double() @ x["proj_weight"].double().mT)
            best = (hidden @ x["score_weight"].double().mT).argmax(1)
            torch.testing.assert_close(
                got["out"].cpu(), x["features"].gather(1, best[..., None].expand(-1, -1, 12))[:, 0]
            )


def test_by_hand(where):
    backend, device = where
    f = torch.tensor([[[1.0, 0.0], [3.0, -2.0], [5.0, 8.0]]], device=device)
    mask = torch.tensor([[True, True, False]], device=device)
    zero = torch.zeros(1, 2, device=device), None, torch.ones(1, 1, device=device), None  # equal scores
    even = torch.zeros(3, device=device)
    assert op(f, *zero, even, backend=backend).tolist() == [[pytest.approx(11 / 3), pytest.approx(4.0)]]
    assert op(f, *zero, even, mask=mask, backend=backend).tolist() == [[pytest.approx(7 / 3), pytest.approx(-2 / 3)]]
    only = torch.zeros(1, device=device)
    assert op(f, None, None, None, None, only, pools=("max",), mask=mask, backend=backend).tolist() == [[3.0, 0.0]]
    weights = torch.tensor([0.0, math.log(3.0)], device=device)
    out = op(f, None, None, None, None, weights, pools=("max", "mean"), backend=backend)
    assert out.tolist() == [[pytest.approx(5 / 4 + 9 / 4), pytest.approx(8 / 4 + 3 / 2)]]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny(where, dtype):
    backend, device = where
    plain.judge(op, plain.call(1, 9, 5, 3, dtype, masked=True, seed=1), backend, device)


# Same bits.


def digest(got: dict) -> str:
    raw = b"".join(v.cpu().contiguous().view(torch.uint8).numpy().tobytes() for v in got.values() if v.numel())
    return hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("shape", [(3, 700, 40, 10), (1, 3136, 96, 24), (40, 49, 24, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(where, dtype, shape):
    backend, device = where
    x = plain.call(*shape, dtype, masked=True)
    first = digest(run(x, backend, device))
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        for _ in range(2 if backend == "reference" else 20):
            assert digest(run(x, backend, device)) == first, f"{threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_neighbours(where, dtype):
    """A sample's output and gradient depend neither on how many others there are nor on its place among them."""
    backend, device = where
    for tokens, batch, channels in ((130, 17, 40), (700, 9, 6)):
        x = plain.call(batch, tokens, channels, 10, dtype, masked=True)
        g = numbers(3, batch, channels, dtype=dtype)
        whole = run(x, backend, device, g)
        for pick in (slice(0, 1), slice(3, 4), slice(1, 3), slice(batch - 4, batch)):
            part = x | {"features": x["features"][pick], "mask": x["mask"][pick]}
            got = run(part, backend, device, g[pick])
            assert torch.equal(got["out"], whole["out"][pick]), (tokens, pick)
            assert torch.equal(got["features"], whole["features"][pick]), (tokens, pick)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(where, dtype):
    backend, device = where
    x = plain.call(2, 13, 9, 7, dtype, masked=True, seed=2)
    g = numbers(3, 2, 9, dtype=dtype)

    def results(y: dict, g: torch.Tensor) -> list[torch.Tensor]:
        # Without score_bias, whose gradient is a sum of rounding errors around 0.
        named = {n: y[n].detach().requires_grad_() for n in plain.leaves(x) if n != "score_bias"}
        out = op(**y | named, backend=backend)
        return [out, *torch.autograd.grad(out, list(named.values()), g)]

    y = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    for name in (*plain.leaves(x), "mask", "g"):
        for layout, view in t.layouts(g.to(device) if name == "g" else y[name]):
            copy = view.clone(memory_format=torch.contiguous_format)
            pair = [(y, v) if name == "g" else (y | {name: v}, g.to(device)) for v in (view, copy)]
            for a, b in zip(results(*pair[0]), results(*pair[1]), strict=True):
                assert torch.equal(a, b), f"{name} as {layout}: strides {view.stride()}"


GUARDED = """
import plain_token_pool as plain
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for seed in range(400, 420):
        x = plain.Case(seed, dtype).inputs()
        x = guard(x)
        named = {n: v.requires_grad_() for n, v in plain.leaves(x).items()}
        out = hivilt.ops.token_pool(**x, backend=backend)
        torch.autograd.grad(out, list(named.values()), t.guarded(torch.randn_like(out), at))
        count += 1
"""


@pytest.mark.kernels
@pytest.mark.parametrize("at", ["end", "start"])
def test_nothing_is_read_outside_a_tensor(where, at):
    """Each input ends at (then starts at) a page that faults when touched; 60 cases, forward and backward."""
    survives(GUARDED, 60, where, at)


# Autograd, compilers and transforms.


def test_every_subset_of_gradients(where):
    backend, device = where
    x, named = moved(plain.call(2, 30, 12, 5, masked=True, seed=3), device)
    full = run(x, backend, device)
    for bits in itertools.product((False, True), repeat=len(named)):
        wanted = [n for n, bit in zip(named, bits, strict=True) if bit]
        y = x | {n: v.detach().requires_grad_(n in wanted) for n, v in named.items()}
        out = op(**y, backend=backend)
        assert out.requires_grad == bool(wanted) and torch.equal(out, full["out"])
        if wanted:
            for n, grad in zip(wanted, torch.autograd.grad(out.sum(), [y[n] for n in wanted]), strict=True):
                assert torch.equal(grad, full[n]), (wanted, n)


@pytest.mark.parametrize("pools", ORDERS, ids="+".join)
def test_gradcheck(pools):
    for masked in (False, True):
        x = plain.call(2, 6, 4, 3, torch.float64, pools=pools, masked=masked, seed=1)
        named = {n: v.requires_grad_() for n, v in plain.leaves(x).items()}

        def call(*leaves, x=x, named=named):
            return op(**x | dict(zip(named, leaves, strict=True)), backend="reference")

        assert torch.autograd.gradcheck(call, tuple(named.values()))


def test_double_backward_raises(where):
    backend, device = where
    x, named = moved(plain.call(2, 30, 12, 5), device)
    grads = torch.autograd.grad(op(**x, backend=backend).square().sum(), list(named.values()), create_graph=True)
    assert all(g.requires_grad for g in grads), "a gradient silently dropped its graph"
    for grad in grads:
        with pytest.raises(RuntimeError, match=r"token_pool has no double backward.*hivilt\.reference"):
            torch.autograd.grad(grad.sum(), list(named.values()), retain_graph=True, allow_unused=True)


def test_saved_bytes(where):
    """The inputs and per sample a handful of rows, nothing as long as the hidden layer."""
    backend, device = where
    B, N, C, K = 2, 600, 32, 16
    x, named = moved(plain.call(B, N, C, K, masked=True), device)
    saved = {}

    def pack(v):
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        out = op(**x, backend=backend)
    inputs = sum(v.numel() * 4 for v in named.values()) + B * N
    assert out.requires_grad and sum(saved.values()) <= inputs + 4 * (B * 3 * C + B * C + B * N) + 64


def test_modes(where):
    backend, device = where
    x, named = moved(plain.call(2, 30, 12, 5, masked=True), device)
    out = op(**x, backend=backend)
    with torch.inference_mode():
        assert torch.equal(op(**x, backend=backend), out)
    with torch.no_grad():
        again = op(**x, backend=backend)
    assert torch.equal(again, out) and not again.requires_grad
    assert torch.equal(op(**x | {n: v.detach() for n, v in named.items()}, backend=backend), out)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(where, half):
    """All but the pool weights are cast, as those of a Linear; gradients keep their dtypes."""
    backend, device = where
    x, named = moved(plain.call(2, 30, 12, 5), device)
    with torch.autocast(device, dtype=half):
        out = op(**x, backend=backend)
    assert out.dtype == half
    grads = torch.autograd.grad(out.float().sum(), list(named.values()))
    assert all(g.dtype == torch.float32 for g in grads)
    rounded = {n: v.detach() if n == "pool_weights" else v.detach().to(half) for n, v in named.items()}
    assert torch.equal(out, op(**x | rounded, backend=backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_equals_eager_bit_for_bit(ask, verdicts, dynamic):
    torch._dynamo.reset()
    names = list(plain.leaves(plain.call(2, 30, 12, 5)))

    def call(mask, *leaves):
        return op(**dict(zip(names, leaves, strict=True)), mask=mask).sin()

    fast = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 30, 12, 5), (3, 41, 12, 5)):
        for backend, device in (where for where in verdicts if ask(*where, "token_pool") is None):
            x, named = moved(plain.call(*shape, masked=True), device)
            with hivilt.use_backend(backend):
                a, b = call(x["mask"], *named.values()), fast(x["mask"], *named.values())
                ga, gb = (torch.autograd.grad(r.sum(), list(named.values())) for r in (a, b))
            assert all(torch.equal(p, q) for p, q in zip((a, *ga), (b, *gb), strict=True))


def test_fake_and_meta_tensors_have_the_real_form(where):
    backend, device = where
    for pools in (plain.POOLS, ("max",)):
        x, named = moved(plain.call(2, 30, 12, 5, torch.bfloat16, pools=pools, wide_weights=True), device)
        real = op(**x, backend=backend)
        grads = torch.autograd.grad(real.sum(), list(named.values()))
        detached = {n: v.detach() for n, v in named.items()}
        meta = op(**x | {n: v.to("meta") for n, v in detached.items()})
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
        with FakeTensorMode() as mode:
            fake = {n: mode.from_tensor(v).requires_grad_() for n, v in detached.items()}
            out = op(**x | fake)
            of_fake = torch.autograd.grad(out.sum(), list(fake.values()))
        assert (out.shape, out.dtype, out.stride()) == (real.shape, real.dtype, real.stride())
        for a, b in zip(of_fake, grads, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_vmap_equals_a_loop(where):
    backend, device = where
    x, named = moved(plain.call(2, 30, 12, 5, masked=True), device)
    named = {n: v.detach() for n, v in named.items()}
    many = {n: torch.stack([v, v * 1.5, v - 0.25]) for n, v in named.items()}
    for mapped in (["features"], ["proj_weight", "pool_weights"], list(named)):

        def call(*leaves, mapped=mapped):
            return op(**x | named | dict(zip(mapped, leaves, strict=True)), backend=backend)

        loss = lambda *leaves, call=call: call(*leaves).square().sum()  # noqa: E731
        for f in (call, torch.func.grad(loss)):
            got = torch.vmap(f)(*(many[n] for n in mapped))
            assert torch.equal(got, torch.stack([f(*(many[n][i] for n in mapped)) for i in range(3)]))


def test_backward_runs_where_forward_ran(where):
    backend, device = where
    x, named = moved(plain.call(2, 30, 12, 5), device)
    with hivilt.use_backend(backend):
        out = op(**x)
    op(**x, backend="reference")
    torch.autograd.grad(out.sum(), list(named.values()))
    assert hivilt.last_backend() == backend


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x, _ = moved(plain.call(2, 30, 12, 5), "cpu")
    with FlopCounterMode(display=False) as counter:
        op(**x).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 2 * 30 * 12 * (1 + 5)
