"""What torch expects of an operator: gradients of every subset, gradcheck, double backward, compile, vmap, autocast."""

import itertools
import math

import plain_scale_fusion as plain
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hivilt
import hivilt.testing as t

pytestmark = pytest.mark.operation("scale_fusion")
op, tokens, add = hivilt.ops.scale_fusion, hivilt.ops.interpolate_tokens, hivilt.ops.interpolate_add
GRIDS, WIDTHS, OUT = [(5, 4), (3, 2), (5, 4)], [8, 12, 5], 20
CALLS = {
    "layer": {"impl": "prologue"},
    "affine": {"norm": "affine", "activation": "silu", "impl": "epilogue"},
    "none": {"norm": "none", "activation": "gelu_tanh", "mode": "area"},
    "linear": {"norm": "none", "activation": "none", "mode": "nearest"},
    "prefix": {"prefix_tokens": 2, "align_corners": True, "out_grid": (6, 7)},
}


def made(name: str, device="cpu", dtype=torch.float32, batch=2) -> tuple[dict, dict]:
    """The call, and its leaves, which need gradients."""
    x = plain.call(GRIDS, WIDTHS, OUT, dtype, batch, **CALLS[name])
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(x).items()}
    return plain.replaced(x, named), named


@pytest.mark.parametrize("name", CALLS)
def test_every_subset_of_gradients(where, name):
    backend, device = where
    x, named = made(name, device)
    out = op(**x, backend=backend)
    g = plain.numbers(1, *out.shape).to(device)
    full = dict(zip(named, torch.autograd.grad(out, list(named.values()), g), strict=True))
    for bits in itertools.product((False, True), repeat=len(named)):
        wanted = [n for n, bit in zip(named, bits, strict=True) if bit]
        y = plain.replaced(x, {n: v.detach().requires_grad_(n in wanted) for n, v in named.items()})
        out = op(**y, backend=backend)
        assert out.requires_grad == bool(wanted)
        if wanted:
            of = plain.leaves(y)
            for n, grad in zip(wanted, torch.autograd.grad(out, [of[n] for n in wanted], g), strict=True):
                assert torch.equal(grad, full[n]), (wanted, n)


@pytest.mark.parametrize("name", CALLS)
def test_saved_bytes(where, name):
    """The inputs, and one tensor like the output where a norm or an activation needs it: nothing of the finer size."""
    backend, device = where
    x = plain.call([(30, 30), (15, 15), (8, 8)], [16, 16, 16], 24, **CALLS[name] | {"out_grid": (30, 30)})
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(x).items()}
    saved = {}

    def pack(v):
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        out = op(**plain.replaced(x, named), backend=backend)
    kept = 0 if name == "linear" else out.numel() * 4
    inputs = sum(v.numel() * 4 for v in named.values())
    assert inputs - 4 * 3 * 24 <= sum(saved.values()) <= inputs + kept + 64


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    x = plain.call([(3, 2), (2, 1), (4, 5)], [2, 3, 1], 5, torch.float64, 2, **CALLS[name] | {"out_grid": (3, 2)})
    named = {n: v.requires_grad_() for n, v in plain.leaves(x).items()}

    def call(*leaves):
        return op(**plain.replaced(x, dict(zip(named, leaves, strict=True))), backend="reference")

    assert torch.autograd.gradcheck(call, tuple(named.values()))


def test_gradcheck_with_dropout():
    x = plain.call([(3, 2), (2, 1)], [2, 3], 9, torch.float64)
    named = {n: v.requires_grad_() for n, v in plain.leaves(x).items()}

    def call(*leaves):
        torch.manual_seed(3)
        y = plain.replaced(x, dict(zip(named, leaves, strict=True)))
        return op(**y, dropout_p=0.4, training=True, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(named.values()))


@pytest.mark.parametrize("name", CALLS)
def test_double_backward_raises(where, name):
    backend, device = where
    x, named = made(name, device)
    out = op(**x, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), list(named.values()), create_graph=True)
    assert all(g.requires_grad for g in grads), "a gradient silently dropped its graph"
    for grad in grads:
        with pytest.raises(RuntimeError, match=r"scale_fusion has no double backward.*hivilt\.reference"):
            torch.autograd.grad(grad.sum(), list(named.values()), retain_graph=True, allow_unused=True)


def test_changed_input_is_noticed(where):
    """A saved tensor written between forward and backward raises, as with any torch op."""
    backend, device = where
    x, named = made("layer", device)
    for name in ("features[0]", "features[2]", "weight", "norm_weight"):
        moved = named[name] * 1.0
        out = op(**plain.replaced(x, {name: moved}), backend=backend)
        with torch.no_grad():
            moved.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), named[name])


def test_upstream_gradient_is_not_written(where):
    backend, device = where
    for name in CALLS:
        x, named = made(name, device)
        out = op(**x, backend=backend)
        g = plain.numbers(1, *out.shape).to(device)
        copy = g.clone()
        once = torch.autograd.grad(out, list(named.values()), g, retain_graph=True)
        twice = torch.autograd.grad(out, list(named.values()), g)
        assert torch.equal(g, copy) and all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_modes(where):
    """inference_mode, no_grad and needing no gradient give the same bits and no graph."""
    backend, device = where
    for name in CALLS:
        x, named = made(name, device)
        out = op(**x, backend=backend)
        with torch.inference_mode():
            assert torch.equal(op(**x, backend=backend), out)
        with torch.no_grad():
            again = op(**x, backend=backend)
        assert torch.equal(again, out) and not again.requires_grad
        detached = plain.replaced(x, {n: v.detach() for n, v in named.items()})
        assert torch.equal(op(**detached, backend=backend), out)


def test_forward_mode_raises_instead_of_dropping_tangents(where):
    backend, device = where
    x, named = made("layer", device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(named["weight"].detach(), torch.ones_like(named["weight"]))
        with pytest.raises((RuntimeError, NotImplementedError)):
            op(**plain.replaced(x, {"weight": dual}), backend=backend)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(where, half):
    """Features, weight and bias are cast as a Linear's, the norm's parameters stay; gradients keep their dtypes."""
    backend, device = where
    x, named = made("layer", device)
    with torch.autocast(device, dtype=half):
        out = op(**x, backend=backend)
        with torch.autocast(device, enabled=False):
            assert op(**x, backend=backend).dtype == torch.float32
    assert out.dtype == half
    grads = torch.autograd.grad(out.float().sum(), list(named.values()))
    assert all(g.dtype == torch.float32 for g in grads)
    rounded = {n: v.detach() if n.startswith("norm") else v.detach().to(half) for n, v in named.items()}
    assert torch.equal(out, op(**plain.replaced(x, rounded), backend=backend))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_repeats_the_dropout_mask(where, reentrant):
    backend, device = where
    x, named = made("layer", device)

    def call(*leaves):
        y = plain.replaced(x, dict(zip(named, leaves, strict=True)))
        return op(**y, dropout_p=0.4, training=True, backend=backend)

    torch.manual_seed(1)
    plain_grads = torch.autograd.grad(call(*named.values()).sum(), list(named.values()))
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(call, *named.values(), use_reentrant=reentrant)
    for v in named.values():
        v.grad = None
    out.sum().backward()
    assert all(torch.equal(a, v.grad) for a, v in zip(plain_grads, named.values(), strict=True))


# Compilers and transforms.


def everything(x: dict):
    """All public functions of the family in one expression."""
    out, f = op(**x), x["features"]
    fine = tokens(f[1], (3, 2), (5, 4), mode="nearest")
    # A scale that needs a gradient makes its own operator part of the graph.
    mixed = add(f[0][..., :5], f[2], x["bias"][:1] * 0.5)
    return out.sin(), fine * 2, mixed


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_equals_eager_bit_for_bit(ask, verdicts, dynamic):
    """One graph, whatever backend is in force when it runs: a backend is chosen at run time."""
    torch._dynamo.reset()
    names = list(plain.leaves(made("layer")[0]))

    def call(*leaves):
        named = dict(zip(names, leaves, strict=True))
        return everything(plain.replaced({"grids": GRIDS, "features": [None] * 3, "weight": None}, named))

    fast = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        for backend, device in (where for where in verdicts if ask(*where, "scale_fusion") is None):
            _, named = made("layer", device, batch=batch)
            with hivilt.use_backend(backend):
                a, b = call(*named.values()), fast(*named.values())
                assert hivilt.last_backend() == backend
                up = [plain.numbers(i, *v.shape).to(device) for i, v in enumerate(a)]
                ga, gb = (torch.autograd.grad(r, list(named.values()), up) for r in (a, b))
            assert all(torch.equal(p, q) for p, q in zip((*a, *ga), (*b, *gb), strict=True))


def test_inductor():
    """The default compiler once, dropout and all, forward and backward."""
    torch._dynamo.reset()
    x, named = made("layer")

    def call(*leaves):
        y = plain.replaced(x, dict(zip(named, leaves, strict=True)))
        return op(**y, dropout_p=0.3, training=True) * 2

    fast = torch.compile(call, fullgraph=True)
    torch.manual_seed(0)
    out = fast(*named.values())
    dropped = out == 0
    base = 2 * op(**x) * (65536 / (65536 - round(0.3 * 65536)))
    torch.testing.assert_close(out, torch.where(dropped, 0.0, base))
    # 800 draws with a rate of 0.3: five deviations
    assert abs(dropped.double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / dropped.numel())
    grads = torch.autograd.grad(out.sum(), list(named.values()))
    assert all(g.isfinite().all() and g.any() for g in grads)


def test_fake_and_meta_tensors_have_the_real_form(where):
    backend, device = where
    for name in CALLS:
        for dtype in (torch.float32, torch.bfloat16):
            x, named = made(name, device, dtype)
            real = op(**x, backend=backend)
            grads = torch.autograd.grad(real.sum(), list(named.values()))
            meta = op(**plain.replaced(x, {n: v.detach().to("meta") for n, v in named.items()}))
            assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
            detached = {n: v.detach() for n, v in named.items()}
            with FakeTensorMode() as mode:
                fake = {n: mode.from_tensor(v).requires_grad_() for n, v in detached.items()}
                out = op(**plain.replaced(x, fake))
                of_fake = torch.autograd.grad(out.sum(), list(fake.values()))
            assert (out.shape, out.dtype, out.stride()) == (real.shape, real.dtype, real.stride())
            for a, b in zip(of_fake, grads, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    x = torch.ones(2, 13, 5, device="meta")
    assert tokens(x, (3, 4), (6, 5), prefix_tokens=1).shape == (2, 31, 5)
    assert add(x[:, :9], x, 2.0).shape == (2, 9, 5)


def test_vmap_equals_a_loop(where):
    """Over a batch of weights, of features, and of both; the samples run one after the other."""
    backend, device = where
    x, named = made("layer", device)
    named = {n: v.detach() for n, v in named.items()}
    many = {n: torch.stack([v, v * 1.5, v - 0.25]) for n, v in named.items()}
    for mapped in (["weight"], ["features[1]", "bias"], list(named)):

        def call(*leaves, mapped=mapped):
            return op(**plain.replaced(x, named | dict(zip(mapped, leaves, strict=True))), backend=backend)

        got = torch.vmap(call)(*(many[n] for n in mapped))
        want = torch.stack([call(*(many[n][i] for n in mapped)) for i in range(3)])
        assert torch.equal(got, want)
        losses = lambda *leaves, call=call: call(*leaves).square().sum()  # noqa: E731
        got = torch.vmap(torch.func.grad(losses))(*(many[n] for n in mapped))
        want = [torch.func.grad(losses)(*(many[n][i] for n in mapped)) for i in range(3)]
        assert torch.equal(got, torch.stack(want))
    f = torch.stack([named["features[0]"], named["features[0]"] * 2])
    got = torch.vmap(lambda v: tokens(v, (5, 4), (3, 7), backend=backend))(f)
    assert torch.equal(got, torch.stack([tokens(v, (5, 4), (3, 7), backend=backend) for v in f]))
    scales = torch.tensor([0.5, 2.0], device=device)
    got = torch.vmap(lambda v, s: add(v, v[:, :7], s, backend=backend))(f, scales)
    assert torch.equal(got, torch.stack([add(v, v[:, :7], s, backend=backend) for v, s in zip(f, scales, strict=True)]))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_dropout(where, randomness):
    backend, device = where
    x = {"features": [torch.ones(1, 8, 1, device=device)], "weight": torch.ones(64, 1, device=device)}
    settings = {"grids": [(8,)], "norm": "none", "activation": "none", "dropout_p": 0.5, "training": True}
    call = lambda f: op([f], x["weight"], **settings, backend=backend)  # noqa: E731
    out = torch.vmap(call, randomness=randomness)(torch.ones(2, 1, 8, 1, device=device))
    assert torch.equal(out[0], out[1]) == (randomness == "same") and (out == 0).any()


def test_func_grad_equals_backward(where):
    backend, device = where
    for name in CALLS:
        x, named = made(name, device)
        loss = lambda leaves, x=x: op(**plain.replaced(x, leaves), backend=backend).square().sum()  # noqa: E731
        want = torch.autograd.grad(loss(named), list(named.values()))
        got = torch.func.grad(loss)({n: v.detach() for n, v in named.items()})
        assert all(torch.equal(got[n], w) for n, w in zip(named, want, strict=True))


def test_backward_runs_where_forward_ran(where):
    backend, device = where
    x, named = made("layer", device)
    with hivilt.use_backend(backend):
        out = op(**x)
        fine = tokens(x["features"][0], (5, 4), (2, 2))
    op(**{n: v for n, v in made("layer", device)[0].items() if n != "impl"}, impl="reference")
    assert hivilt.last_backend() == "reference"
    torch.autograd.grad(out.sum(), list(named.values()))
    assert hivilt.last_backend() == backend
    op(**x, backend="reference")
    torch.autograd.grad(fine.sum(), named["features[0]"])
    assert hivilt.last_backend() == backend


def test_flops_are_counted():
    """Each scale is projected where it has fewer tokens: 2 B min(N_s, N) C_s O, three times as much with backward."""
    from torch.utils.flop_counter import FlopCounterMode

    x, named = made("layer")
    with FlopCounterMode(display=False) as counter:
        op(**x).sum().backward()
    forward = 2 * 2 * OUT * (20 * 8 + 6 * 12 + 20 * 5)
    assert counter.get_total_flops() == 3 * forward and all(v.grad is not None for v in named.values())


def test_reads_nothing_it_was_not_given(where):
    """t.poison of this family: NaN in prefix tokens reaches prefix rows and no other."""
    backend, device = where
    x, named = made("prefix", device)
    clean = op(**x, backend=backend)
    bad = {n: v.detach().clone() for n, v in named.items()}
    for s in range(3):
        bad[f"features[{s}]"][:, :2] = t.relayout(torch.full((2, 2, WIDTHS[s]), math.nan), "contiguous").to(device)
    got = op(**plain.replaced(x, bad), backend=backend)
    assert got[:, :2].isnan().all() and torch.equal(got[:, 2:], clean[:, 2:])
