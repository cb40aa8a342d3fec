"""Autograd corners: every subset of inputs that need a gradient, what is saved, double backward, modes."""

import gc
import itertools
import weakref

import pytest
import torch

import hivilt
import hivilt.testing as t

op = hivilt.ops.topk_attention
SIZES = (2, 4, 2, 33, 57, 16, 12)
CALLS = [(None, "keys", 0), (7, "keys", 0), (4, "queries", 0), (7, "keys", 5)]
FLOATS = ("query", "key", "value", "attn_mask")


def inputs(device, topk=7, axis="keys", select=0, dtype=torch.float32, shape=SIZES, **changes) -> dict:
    B, H, _, Q, N, _, _ = shape
    plain = {"mask": "float", "mask_shape": (B, 1 if select else H, Q, N), "key_mask": True, "query_mask": True}
    plain |= {"scale": None, "fill": "normal", "layout": ("contiguous",) * 3} | changes
    return t.case(23, dtype, shape=shape, topk=topk, axis=axis, select=select, **plain).inputs(device)


@pytest.mark.parametrize("topk, axis, select", CALLS)
def test_every_subset_of_gradients(where, topk, axis, select):
    backend, device = where
    x = inputs(device, topk, axis, select)
    leaves = [x[n].requires_grad_() for n in FLOATS]
    out, lse = op(**x, return_lse=True, backend=backend)
    upstream = [torch.randn_like(out), torch.randn_like(lse)]
    full = dict(zip(FLOATS, torch.autograd.grad([out, lse], leaves, upstream), strict=True))
    for bits in itertools.product((False, True), repeat=4):
        names = [n for n, bit in zip(FLOATS, bits, strict=True) if bit]
        y = {n: v.detach().requires_grad_(n in names) if n in FLOATS else v for n, v in x.items()}
        out, lse = op(**y, return_lse=True, backend=backend)
        assert out.requires_grad == bool(names)
        if names:
            got = torch.autograd.grad([out, lse], [y[n] for n in names], upstream)
            for name, grad in zip(names, got, strict=True):
                assert torch.equal(grad, full[name]), (names, name)


@pytest.mark.parametrize("topk, axis, select", CALLS)
@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_of_the_outputs_used(where, topk, axis, select, used):
    backend, device = where
    x = inputs(device, topk, axis, select)
    leaves = [x[n].requires_grad_() for n in FLOATS]
    out, lse = op(**x, return_lse=True, backend=backend)
    gs = torch.randn_like(out), torch.randn_like(lse)
    if used == "out":
        got = torch.autograd.grad(out, leaves, gs[0])
        want = torch.autograd.grad(op(**x, return_lse=True, backend=backend), leaves, [gs[0], torch.zeros_like(lse)])
    else:
        got = torch.autograd.grad(lse, leaves, gs[1], allow_unused=True, materialize_grads=True)
        want = torch.autograd.grad(op(**x, return_lse=True, backend=backend), leaves, [torch.zeros_like(out), gs[1]])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_selection_is_a_constant(where):
    """select_query and select_key get no gradient, and alone they ask for no graph."""
    backend, device = where
    x = inputs(device, select=5)
    sources = [x["select_query"].requires_grad_(), x["select_key"].requires_grad_()]
    out, lse = op(**x, return_lse=True, backend=backend)
    assert not out.requires_grad and not lse.requires_grad
    x["query"].requires_grad_()
    grads = torch.autograd.grad(op(**x, backend=backend).sum(), [x["query"], *sources], allow_unused=True)
    assert grads[0].any() and grads[1] is None and grads[2] is None


@pytest.mark.parametrize("topk, axis, select", CALLS)
def test_saved_bytes(where, topk, axis, select):
    """Inputs, out, lse and the selection: O(Q topk), never Q x N."""
    backend, device = where
    B, H, G, Q, N, D, E = shape = (1, 2, 2, 500, 700, 16, 16)
    x = inputs(device, topk, axis, select, shape=shape, mask="", mask_shape=())
    for n in ("query", "key", "value"):
        x[n].requires_grad_()
    saved = {}

    def pack(v):
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        out = op(**x, backend=backend)
    rows = Q if axis == "keys" else N
    lists = B * (1 if select else H) * rows * (topk or 0) * 4
    allowed = 4 * (B * H * Q * (D + E + 1) + B * G * N * (D + E)) + B * (Q + N) + lists + 1024
    assert sum(saved.values()) <= allowed and out.requires_grad


def test_no_context_outlives_its_output(where):
    backend, device = where
    gc.disable()
    try:
        for kwargs in ({}, {"dropout_p": 0.3}):
            x = inputs(device)
            leaves = [x[n].requires_grad_() for n in FLOATS]
            out, lse = op(**x, return_lse=True, backend=backend, **kwargs)
            torch.autograd.grad([out.sum(), lse.clamp_min(-9).sum()], leaves)
            refs = [weakref.ref(out), weakref.ref(lse), weakref.ref(out.grad_fn)]
            del out, lse
            assert all(ref() is None for ref in refs)
    finally:
        gc.enable()


@pytest.mark.parametrize("topk, axis, select", CALLS)
def test_double_backward_is_right_or_raises(where, topk, axis, select):
    backend, device = where
    x = inputs(device, topk, axis, select, mask="", mask_shape=(), key_mask=False, query_mask=False)
    leaves = [x[n].requires_grad_() for n in ("query", "key", "value")]
    out = op(**x, backend=backend)
    try:
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        if not all(g.requires_grad for g in grads):
            raise AssertionError("the gradient silently dropped its graph")
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    except (RuntimeError, NotImplementedError) as error:
        assert str(error)
        return
    y = {n: v.detach().double() if n in ("query", "key", "value") else v for n, v in x.items()}
    kept = t.oracle(**y).kept
    wide = [y[n].requires_grad_() for n in ("query", "key", "value")]
    k, v = (z.repeat_interleave(2, 1) for z in wide[1:])
    p = (wide[0] @ k.mT / 4).masked_fill(~kept, -1e300).softmax(-1)
    true = torch.autograd.grad((torch.where(kept, p, 0.0) @ v).square().sum(), wide, create_graph=True)
    true = torch.autograd.grad(sum(g.square().sum() for g in true), wide)
    for a, b in zip(second, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_changed_input_is_noticed(where):
    """A saved tensor written between forward and backward raises, as with any torch op."""
    backend, device = where
    x = inputs(device)
    for name in ("query", "key", "value"):
        y = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
        base = y[name].requires_grad_()
        y[name] = base * 1.0
        out = op(**y, backend=backend)
        with torch.no_grad():
            y[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), base)


def test_upstream_gradient_is_not_written(where):
    backend, device = where
    x = inputs(device)
    leaves = [x[n].requires_grad_() for n in FLOATS]
    out, lse = op(**x, return_lse=True, backend=backend)
    upstream = [torch.randn_like(out), torch.randn_like(lse)]
    copies = [u.clone() for u in upstream]
    once = torch.autograd.grad([out, lse], leaves, upstream, retain_graph=True)
    twice = torch.autograd.grad([out, lse], leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(upstream, copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_modes(where):
    """inference_mode, no_grad and needing no gradient give the same bits and no graph."""
    backend, device = where
    for topk, axis, select in CALLS:
        x = inputs(device, topk, axis, select)
        out = op(**x, backend=backend)
        with torch.inference_mode():
            assert torch.equal(op(**x, backend=backend), out)
        for n in FLOATS:
            x[n].requires_grad_()
        with torch.no_grad():
            again = op(**x, backend=backend)
        assert torch.equal(again, out) and not again.requires_grad
        assert torch.equal(op(**x, backend=backend), out)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(where, half):
    """Under autocast float32 inputs are cast as for SDPA; gradients come back in the dtype of the inputs."""
    backend, device = where
    x = inputs(device, mask="", mask_shape=())
    leaves = [x[n].requires_grad_() for n in ("query", "key", "value")]
    with torch.autocast(device, dtype=half):
        out, lse = op(**x, return_lse=True, backend=backend)
        assert out.dtype == half and lse.dtype == torch.float32
        with torch.autocast(device, enabled=False):
            assert op(**x, backend=backend).dtype == torch.float32
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)
    rounded = {n: v.detach().to(half) if n in ("query", "key", "value") else v for n, v in x.items()}
    assert torch.equal(out, op(**rounded, backend=backend))
    assert op(**x, backend=backend).dtype == torch.float32


def test_checkpoint(where):
    backend, device = where
    for kwargs in ({}, {"dropout_p": 0.4}):
        x = inputs(device)
        leaves = [x[n].requires_grad_() for n in FLOATS]

        def call(q, k, v, m, x=x, kwargs=kwargs):
            return op(**x | {"query": q, "key": k, "value": v, "attn_mask": m}, backend=backend, **kwargs)

        torch.manual_seed(1)
        plain = torch.autograd.grad(call(*leaves).sum(), leaves)
        torch.manual_seed(1)
        again = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
        again = torch.autograd.grad(again.sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
