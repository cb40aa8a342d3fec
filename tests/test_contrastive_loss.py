"""contrastive_loss, every backend against open_clip's formulas in float64: random parity, ties, labels, extremes,
layouts, memory, and what torch expects of an operator."""

import hashlib
import itertools
import math
from pathlib import Path

import fresh
import plain_contrastive_loss as plain
import pytest
import torch
import torch.nn.functional as F
from guard_pages import survives
from torch._subclasses.fake_tensor import FakeTensorMode

import hivilt
import hivilt.testing as t

pytestmark = pytest.mark.operation("contrastive_loss")
op = hivilt.ops.contrastive_loss
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = 40  # random ones per dtype and backend
INF, NAN = float("inf"), float("nan")


def run(x: dict, backend: str, device: str = "cpu") -> dict:
    return plain.gradients(lambda **named: op(**named, backend=backend), x, device=device)


def rounding(backend: str, dtype: torch.dtype) -> float:
    """Of the gradients of logits: tensor cores multiply halves."""
    return 2 * t.UNIT[dtype] if backend == "triton" and dtype != torch.float32 else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random(where, dtype):
    backend, device = where
    tally = plain.Tally(dtype)
    for seed in range(CASES):
        x = plain.Case(seed, dtype).inputs()
        got = run(x, backend, device)
        assert (
            got["loss"].dtype == torch.float32 and got["x"].dtype == dtype and got["logit_scale"].dtype == torch.float32
        )
        plain.close(x, got, f"case {seed}", rounding(backend, dtype))
        tally.add(x, got)
    tally.assert_no_worse()


def test_random_float64():
    for seed in range(CASES):
        x = plain.Case(seed, torch.float64).inputs()
        plain.close(x, run(x, "reference"), f"case {seed}")


def test_close_refuses_a_wrong_result():
    """One gradient, or the loss, off by a hundredth."""
    for name in ("loss", "x", "y", "logit_scale", "logit_bias"):
        x = plain.call(40, 24, bias=True, kind="siglip")
        got = run(x, "reference")
        plain.close(x, got)
        with pytest.raises(AssertionError, match=name):
            plain.close(x, got | {name: got[name] * 1.01})


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny(where, dtype):
    backend, device = where
    for settings in (
        {},
        {"R": 3, "bias": True},
        {"N": 9, "symmetric": False},
        {"kind": "siglip", "bias": True},
        {"C": 0},
    ):
        x = plain.call(**{"B": 5, "C": 6} | settings, dtype=dtype, seed=3)
        plain.close(x, run(x, backend, device), str(settings), rounding(backend, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_filled_memory_changes_nothing(where, dtype, nan_filled_memory):
    backend, device = where
    for seed in range(300, 312):
        x = plain.Case(seed, dtype).inputs()
        plain.close(x, run(x, backend, device), f"case {seed}", rounding(backend, dtype))


@pytest.mark.parametrize("width", [0, 1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 128, 129, 255, 257, 300])
def test_every_width(where, width):
    """Links of dot products, whole panels and their edges; without channels all logits are the bias."""
    backend, device = where
    for dtype in DTYPES:
        x = plain.call(21, width, dtype=dtype, bias=True, seed=width)
        plain.close(x, run(x, backend, device), "", rounding(backend, dtype))


@pytest.mark.parametrize(
    "rows, columns", [(1, 1), (11, 700), (12, 480), (13, 481), (47, 95), (48, 96), (49, 97), (97, 33)]
)
def test_every_edge_of_a_block(where, rows, columns):
    backend, device = where
    for R in (None, 3):
        x = plain.call(rows, 20, R, columns, symmetric=False, seed=rows)
        plain.close(x, run(x, backend, device))
    x = plain.call(columns, 20)
    plain.close(x, run(x, backend, device))


def test_slices_of_columns(where):
    """More columns than the gradients of logits that are in memory at a time."""
    backend, device = where
    x = plain.call(1100, 8, scale=5.0)
    plain.close(x, run(x, backend, device))


# The definition.


@pytest.mark.interpreted
def test_by_hand(where):
    """Two pairs with logits [[2, 0], [0, 0]]."""
    backend, device = where
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device)
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    first, second = torch.tensor(-2.0).exp().log1p().item(), torch.tensor(2.0).log().item()
    assert op(x, y, 2.0, backend=backend).item() == pytest.approx((first + second) / 2)
    labels = torch.tensor([1, 0], device=device)
    one_way = op(x, y, 2.0, symmetric=False, labels=labels, backend=backend)
    assert one_way.item() == pytest.approx((first + 2.0 + second) / 2)
    pairs = op(x, y, 2.0, logit_bias=-1.0, kind="siglip", backend=backend)
    expected = -F.logsigmoid(torch.tensor([1.0, 1.0, 1.0, -1.0])).sum().item() / 2
    assert pairs.item() == pytest.approx(expected)


def test_scale_and_bias_as_numbers(where):
    """A number gives the bits that a tensor gives."""
    backend, device = where
    x = plain.call(30, 20, bias=True, kind="siglip")
    x = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    plainly = x | {n: float(x[n]) for n in ("logit_scale", "logit_bias")}
    reshaped = x | {n: x[n].double().reshape(1, 1) for n in ("logit_scale", "logit_bias")}
    assert op(**x, backend=backend) == op(**plainly, backend=backend) == op(**reshaped, backend=backend)
    scale = torch.tensor([[14.0]], dtype=torch.float16, device=device, requires_grad=True)
    op(**x | {"logit_scale": scale}, backend=backend).backward()
    assert scale.grad.dtype == torch.float16 and scale.grad.shape == (1, 1) and scale.grad.item() != 0


@pytest.mark.interpreted
def test_tied_queries_send_their_gradient_to_the_first(where):
    """Integers, so that ties are exact; and of many queries, more than a block holds."""
    backend, device = where
    for R in (3, 70) if backend != "triton" or device != "cpu" else (3,):
        g = torch.Generator().manual_seed(R)
        x = torch.randint(-1, 2, (4, R, 3), generator=g).float()
        y = torch.randint(-1, 2, (4, 3), generator=g).float()
        call = {"x": x, "y": y, "logit_scale": torch.tensor(1.5), "logit_bias": None, "labels": None, "symmetric": True,
                "kind": "infonce"}  # fmt: skip
        got = run(call, backend, device)
        plain.close(call, got)
        rows = got["x"].abs().sum(-1) > 0
        last = plain.gradients(plain.formula, call | {"x": x.flip(1)}, torch.float64)["x"].flip(1)
        assert rows.any() and not torch.allclose(last, got["x"].double()), "no tie in this test"


def test_one_query_is_no_query(where):
    backend, device = where
    x = plain.call(50, 24)
    many = run(x | {"x": x["x"][:, None]}, backend, device)
    one = run(x, backend, device)
    assert torch.equal(many["loss"], one["loss"]) and torch.equal(many["x"][:, 0], one["x"])


def test_negative_scale_still_takes_the_nearest_query(where):
    backend, device = where
    x = plain.call(9, 8, 4) | {"logit_scale": torch.tensor(-3.0)}
    got, true = run(x, backend, device), plain.truth(x)
    for name, value in true.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-6)


# Extremes.


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e4, 1e8])
def test_huge_and_tiny_logits(where, kind, scale):
    """No overflow where torch has none: the same finite loss, gradients as close as float32 logits allow."""
    backend, device = where
    x = plain.call(40, 16, kind=kind, scale=scale)
    got, true, rival = run(x, backend, device), plain.truth(x), plain.eager(x)
    for name, value in true.items():
        assert got[name].isfinite().all(), name
        error, theirs = (float((v[name].double() - value).abs().max()) for v in (got, rival))
        assert error <= 2 * theirs + 4 * 2**-24 * float(value.abs().max()), name


def test_float64_keeps_its_digits_at_large_logits():
    x = torch.full((2, 1), 5.0, dtype=torch.float64)
    got = op(x, x, 1.0, kind="siglip", backend="reference")  # every logit 25
    assert abs(float(got) - (25.0 + 2.0 * math.log1p(math.exp(-25.0)))) < 4e-15


@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("kind", ["infonce", "siglip"])
@pytest.mark.parametrize("side", ["x", "y"])
def test_special_values_as_torch(where, kind, side, value):
    """The loss is NaN or infinite where cross_entropy's is, and so are gradients of infonce, element by element."""
    backend, device = where
    for R in (None, 3) if kind == "infonce" else (None,):
        x = plain.call(30, 5, R, kind=kind, seed=2)
        x[side] = x[side].clone()
        x[side][7, ..., 2] = value
        got = run(x, backend, device)
        rival = plain.truth(x) if backend == "reference" else plain.eager(x)  # float64 does not overflow so soon
        torch.testing.assert_close(got["loss"], rival["loss"].float(), equal_nan=True, rtol=1e-5, atol=1e-6)
        for name in ("x", "y") if kind == "infonce" and (value != 3e38 or backend != "reference") else ():
            assert torch.equal(got[name].isnan(), rival[name].isnan()), (R, name)


def test_one_way_keeps_a_bad_row_to_itself(where):
    """With labels a NaN in x_3 leaves the gradients of the other rows of x."""
    backend, device = where
    x = plain.call(20, 6, N=30, symmetric=False)
    clean = run(x, backend, device)
    x["x"] = x["x"].clone()
    x["x"][3, 1] = NAN
    got = run(x, backend, device)
    others = torch.arange(20) != 3
    assert got["loss"].isnan() and got["x"][3].isnan().all()
    torch.testing.assert_close(got["x"][others], clean["x"][others], rtol=1e-6, atol=0)


def test_gradient_of_an_infonce_bias_is_zero(where):
    """It is added to every logit, which softmax does not see; not even rounding errors are left."""
    backend, device = where
    got = run(plain.call(100, 30, bias=True), backend, device)
    assert abs(float(got["logit_bias"])) < 1e-9


# Same bits.


def digest(got: dict) -> str:
    raw = b"".join(
        v.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for v in got.values() if v.numel()
    )
    return hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("settings", [{}, {"R": 5}, {"kind": "siglip"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(where, dtype, settings):
    backend, device = where
    x = plain.call(230, 40, dtype=dtype, **settings)
    first = digest(run(x, backend, device))
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        for _ in range(2 if backend == "reference" else 5):
            assert digest(run(x, backend, device)) == first, f"{threads} threads"


def test_mean_of_many_rows_does_not_depend_on_threads():
    from hivilt.ops.contrastive_loss import total

    x = torch.randn(200_000, dtype=torch.float64)
    torch.set_num_threads(1)
    one = total(x)
    torch.set_num_threads(2)
    assert torch.equal(total(x), one)


def test_layouts(where):
    backend, device = where
    for R in (None, 2):
        x = plain.call(13, 9, R, seed=2)
        x = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in x.items()}
        for name in ("x", "y"):
            for layout, view in t.layouts(x[name]):
                copy = view.clone(memory_format=torch.contiguous_format)
                a, b = (run(x | {name: v}, backend, device) for v in (view, copy))
                assert digest(a) == digest(b), f"{name} as {layout}: strides {view.stride()}"


@pytest.mark.interpreted
def test_layouts_of_labels(where):
    backend, device = where
    x = plain.call(6, 5, N=4, symmetric=False)
    for layout in ("step2_last", "expanded_last", "offset1"):
        view = t.relayout(x["labels"], layout)
        got, true = run(x | {"labels": view}, backend, device), plain.truth(x | {"labels": view.clone()})
        for name, value in true.items():
            torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-6, msg=f"{layout}: {name}")


GUARDED = """
import fresh
import plain_contrastive_loss as plain
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for seed in range(400, 407):
        x = guard(plain.Case(seed, dtype).inputs())
        named = {n: v.requires_grad_() for n, v in plain.leaves(x).items()}
        loss = ops.contrastive_loss(**x, backend=backend)
        torch.autograd.grad(loss, list(named.values()))
        count += 1
"""


@pytest.mark.kernels
@pytest.mark.parametrize("at", ["end", "start"])
def test_nothing_is_read_outside_a_tensor(where, at):
    """Each input ends at (then starts at) a page that faults when touched."""
    survives(GUARDED, 21, where, at)


MEMORY = """
import sys, torch, hivilt
from pathlib import Path
B, C, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def status(field):
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1])
def step(n):
    x, y = (torch.nn.functional.normalize(torch.randn(n, C)).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.0, requires_grad=True)
    start = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    hivilt.ops.contrastive_loss(x, y, scale, backend=backend).backward()
    assert x.grad.isfinite().all()
    return status("VmHWM") - start
step(64)
print(step(B) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_grows_with_rows_not_with_pairs(ask):
    """4096 rows of 16 numbers: the pairs alone would be 64 MiB, and plain PyTorch needs five times that."""
    if ask("cpu", "cpu", "contrastive_loss") is not None:
        pytest.skip(ask("cpu", "cpu", "contrastive_loss"))
    done = fresh.run(MEMORY, "4096", "16", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 24, f"{done.stdout} MiB"


def test_saved_bytes(where):
    """The inputs and two numbers per row."""
    backend, device = where
    x = plain.call(200, 32)
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(x).items()}
    saved = {}

    def pack(v):
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        loss = op(**named, backend=backend)
    assert loss.requires_grad and sum(saved.values()) <= 2 * 200 * 32 * 4 + 2 * 200 * 8 + 64


# Autograd, compilers and transforms.


def test_every_subset_of_gradients(where):
    backend, device = where
    x = plain.call(50, 12, bias=True, kind="siglip", seed=3)
    full = run(x, backend, device)
    leaves = {n: v.to(device) for n, v in plain.leaves(x).items()}
    for bits in itertools.product((False, True), repeat=len(leaves)):
        wanted = [n for n, bit in zip(leaves, bits, strict=True) if bit]
        y = {n: v.detach().requires_grad_(n in wanted) for n, v in leaves.items()}
        loss = op(**y, kind="siglip", backend=backend)
        assert loss.requires_grad == bool(wanted) and torch.equal(loss.cpu(), full["loss"])
        if wanted:
            for n, grad in zip(wanted, torch.autograd.grad(loss, [y[n] for n in wanted]), strict=True):
                assert torch.equal(grad.cpu(), full[n]), (wanted, n)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"symmetric": False},
        {"R": 3},
        {"N": 7, "symmetric": False},
        {"kind": "siglip"},
        {"R": 2, "N": 5, "symmetric": False},
    ],
    ids=str,
)
def test_gradcheck(settings):
    x = plain.call(4, 3, dtype=torch.float64, bias=True, scale=2.0, seed=1, **settings)
    named = {n: v.requires_grad_() for n, v in plain.leaves(x).items()}

    def call(*leaves):
        return op(**x | dict(zip(named, leaves, strict=True)), backend="reference")

    def specification(*leaves):
        return hivilt.reference.contrastive_loss(**x | dict(zip(named, leaves, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(named.values()))
    assert torch.autograd.gradcheck(specification, tuple(named.values()))
    torch.testing.assert_close(call(*named.values()), specification(*named.values()), rtol=1e-12, atol=1e-12)


def test_double_backward_raises(where):
    backend, device = where
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(plain.call(9, 5)).items()}
    grads = torch.autograd.grad(op(**named, backend=backend).square(), list(named.values()), create_graph=True)
    assert all(g.requires_grad for g in grads), "a gradient silently dropped its graph"
    with pytest.raises(RuntimeError, match=r"contrastive_loss.* has no double backward.*hivilt\.reference"):
        torch.autograd.grad(grads[0].sum(), list(named.values()), allow_unused=True)


def test_modes(where):
    backend, device = where
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(plain.call(30, 12)).items()}
    loss = op(**named, backend=backend)
    with torch.inference_mode():
        assert torch.equal(op(**named, backend=backend), loss)
    with torch.no_grad():
        again = op(**named, backend=backend)
    assert torch.equal(again, loss) and not again.requires_grad


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(where, half):
    """x and y are cast, as by a matrix product; the scale is not, and the loss stays float32."""
    backend, device = where
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(plain.call(30, 12)).items()}
    with torch.autocast(device, dtype=half):
        loss = op(**named, backend=backend)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, list(named.values())))
    rounded = {n: v.detach().to(half) if n in "xy" else v.detach() for n, v in named.items()}
    assert torch.equal(loss, op(**rounded, backend=backend))


@pytest.mark.parametrize(
    "settings, dynamic", [({}, False), ({"R": 2}, True), ({"kind": "siglip"}, True)], ids=["clip", "queries", "siglip"]
)
def test_fullgraph_equals_eager_bit_for_bit(ask, verdicts, settings, dynamic):
    torch._dynamo.reset()
    kind = settings.get("kind", "infonce")

    def call(x, y, scale):
        return op(x.sin(), y, scale.exp(), kind=kind) * 2

    fast = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for B in (20, 31):
        for backend, device in (where for where in verdicts if ask(*where, "contrastive_loss") is None):
            x = plain.call(B, 12, scale=1.0, **settings)
            named = [v.to(device).requires_grad_() for v in plain.leaves(x).values()]
            with hivilt.use_backend(backend):
                a, b = call(*named), fast(*named)
                ga, gb = (torch.autograd.grad(r, named) for r in (a, b))
            assert all(torch.equal(p, q) for p, q in zip((a, *ga), (b, *gb), strict=True))


def test_fake_and_meta_tensors_have_the_real_form(where):
    backend, device = where
    for settings in ({}, {"R": 2, "dtype": torch.bfloat16}, {"kind": "siglip", "bias": True}):
        x = plain.call(9, 6, **settings)
        named = {n: v.to(device) for n, v in plain.leaves(x).items()}
        kind = x["kind"]
        real = run(x, backend, device)
        meta = op(**{n: v.to("meta") for n, v in named.items()}, kind=kind)
        assert (meta.shape, meta.dtype) == (real["loss"].shape, real["loss"].dtype)
        with FakeTensorMode() as mode:
            fake = {n: mode.from_tensor(v).requires_grad_() for n, v in named.items()}
            grads = torch.autograd.grad(op(**fake, kind=kind), list(fake.values()))
        for n, g in zip(fake, grads, strict=True):
            assert (g.shape, g.dtype, g.stride()) == (real[n].shape, real[n].dtype, real[n].stride()), n


def test_vmap_equals_a_loop(where):
    backend, device = where
    named = {n: v.to(device) for n, v in plain.leaves(plain.call(12, 6)).items()}
    many = {n: torch.stack([v, v * 1.5, v - 0.25]) for n, v in named.items()}
    for mapped in (["x"], ["y", "logit_scale"], list(named)):

        def call(*leaves, mapped=mapped):
            return op(**named | dict(zip(mapped, leaves, strict=True)), backend=backend)

        for f in (call, torch.func.grad(call)):
            got = torch.vmap(f)(*(many[n] for n in mapped))
            assert torch.equal(got, torch.stack([f(*(many[n][i] for n in mapped)) for i in range(3)]))


def test_backward_runs_where_forward_ran(where):
    backend, device = where
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(plain.call(9, 6)).items()}
    with hivilt.use_backend(backend):
        loss = op(**named)
    op(**named, backend="reference")
    torch.autograd.grad(loss, list(named.values()))
    assert hivilt.last_backend() == backend


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    named = {n: v.requires_grad_() for n, v in plain.leaves(plain.call(30, 12)).items()}
    with FlopCounterMode(display=False) as counter:
        op(**named).backward()
    assert counter.get_total_flops() == 4 * 2 * 30 * 30 * 12
