"""The halves of the op: topk_select, selected_attention over given indices, return_lse and return_indices."""

import itertools
import math

import pytest
import torch

import hivilt
import hivilt.testing as t

op, select, selected = hivilt.ops.topk_attention, hivilt.ops.topk_select, hivilt.ops.selected_attention
B, H, G, Q, N, D, E = 2, 4, 2, 19, 45, 8, 6
CALLS = [(6, "keys", 0), (3, "queries", 0), (6, "keys", 5), (3, "queries", 5)]


def inputs(device, topk=6, axis="keys", select=0, dtype=torch.float32, **changes) -> dict:
    plain = {"mask": "", "mask_shape": (), "key_mask": False, "query_mask": False, "scale": None, "fill": "normal"}
    case = t.case(13, dtype, shape=(B, H, G, Q, N, D, E), topk=topk, axis=axis, select=select, **plain | changes)
    return case.inputs(device)


def shuffled(indices: torch.Tensor, gaps: int = 2) -> torch.Tensor:
    """The same rows in random order with -1 sprinkled in."""
    indices = torch.nn.functional.pad(indices, (0, gaps), value=-1)
    return indices.gather(-1, torch.rand(indices.shape, device=indices.device).argsort(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("topk, axis, shared", CALLS)
@pytest.mark.parametrize("mask", ["", "bool", "float"])
def test_two_halves_equal_the_whole(where, topk, axis, shared, mask, dtype):
    """topk_select then selected_attention gives what topk_attention gives, gradients included."""
    backend, device = where
    form = (B, 1 if shared else H, Q, N)
    masks = {"mask": mask, "mask_shape": form if mask else (), "key_mask": True, "query_mask": True}
    x = inputs(device, topk, axis, shared, dtype, **masks)
    names = ["query", "key", "value"] + ["attn_mask"] * (mask == "float")
    leaves = [x[n].requires_grad_() for n in names]
    out, lse, indices = op(**x, return_lse=True, return_indices=True, backend=backend)
    assert torch.equal(select(**{n: v for n, v in x.items() if n != "value"}, backend=backend), indices)
    given = {n: x.get(n) for n in ("query", "key", "value", "attn_mask", "axis", "scale")}
    again = selected(**given, indices=indices, return_lse=True, backend=backend)
    g, gl = torch.randn_like(out), torch.randn_like(lse)
    first = (out, lse, *torch.autograd.grad([out, lse], leaves, [g, gl]))
    second = (*again, *torch.autograd.grad(again, leaves, [g, gl]))
    truth = t.oracle(**{n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in given.items()}, indices=indices,
                     grad_out=g, grad_lse=gl)  # fmt: skip
    for name, a, b in zip(("out", "lse", *names), first, second, strict=True):
        t.assert_within(b.detach(), truth.values[name], truth.budget(name, dtype), name)
        t.assert_within(a.detach(), truth.values[name], truth.budget(name, dtype), name)


@pytest.mark.parametrize("topk, axis, shared", CALLS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_unsorted_rows_and_gaps(where, topk, axis, shared, integer):
    """Any order, -1 anywhere, rows of -1 alone: the same pairs, so the same values within budget."""
    backend, device = where
    x = inputs(device, topk, axis, shared)
    indices = shuffled(select(**{n: v for n, v in x.items() if n != "value"}, backend=backend)).to(integer)
    indices[:, :, 3] = -1
    given = {n: x[n] for n in ("query", "key", "value", "axis")}
    leaves = [given[n].requires_grad_() for n in ("query", "key", "value")]
    before = indices.clone()
    out, lse = selected(**given, indices=indices, return_lse=True, backend=backend)
    g, gl = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad([out, lse], leaves, [g, gl])
    assert torch.equal(before, indices)
    given = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    truth = t.oracle(**given, indices=indices, grad_out=g, grad_lse=gl)
    for name, v in zip(("out", "lse", "query", "key", "value"), (out, lse, *grads), strict=True):
        t.assert_within(v.detach(), truth.values[name], truth.budget(name, torch.float32), name)
    if axis == "keys":
        assert not out[:, :, 3].any() and (lse[:, :, 3] == -math.inf).all()


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("width", [0, 1, 4, 45])
def test_indices_from_anywhere(where, axis, heads, width):
    """Random subsets the scores would never choose, of any width, shared or per head."""
    backend, device = where
    C, rows = (N, Q) if axis == "keys" else (Q, N)
    width = min(width, C)
    indices = torch.rand(B, heads, rows, C).argsort(-1)[..., :width].int().to(device)
    indices[torch.rand(indices.shape, device=device) < 0.2] = -1
    for dtype in (torch.float32, torch.bfloat16):
        x = {n: v for n, v in inputs(device, dtype=dtype).items() if n in ("query", "key", "value")}
        leaves = [v.requires_grad_() for v in x.values()]
        out, lse = selected(**x, indices=indices, axis=axis, return_lse=True, backend=backend)
        g, gl = torch.randn_like(out), torch.randn_like(lse)
        grads = torch.autograd.grad([out, lse], leaves, [g, gl])
        x = {n: v.detach() for n, v in x.items()}
        truth = t.oracle(**x, axis=axis, indices=indices, grad_out=g, grad_lse=gl)
        for name, v in zip(("out", "lse", *x), (out, lse, *grads), strict=True):
            t.assert_within(v.detach(), truth.values[name], truth.budget(name, dtype), name)


def test_listed_pairs_that_the_mask_forbids_take_no_part(where):
    backend, device = where
    x = {n: v for n, v in inputs(device).items() if n in ("query", "key", "value")}
    indices = torch.arange(N, dtype=torch.int32, device=device).expand(B, H, Q, N)
    allowed = torch.rand(B, H, Q, N, device=device) < 0.4
    bias = torch.randn(B, H, Q, N, device=device).masked_fill(~allowed, -math.inf)
    allowed[:, :, :, 7] = False  # a key no query may see
    x["key"][:, :, 7] = x["value"][:, :, 7] = math.nan
    out, lse = selected(**x, indices=indices, attn_mask=allowed, return_lse=True, backend=backend)
    truth = t.oracle(**x, attn_mask=allowed)
    t.assert_within(out, truth.values["out"], truth.budget("out", torch.float32))
    t.assert_within(lse, truth.values["lse"], truth.budget("lse", torch.float32))
    x["key"][:, :, 7] = x["value"][:, :, 7] = 0.5
    truth = t.oracle(**x, attn_mask=bias)
    out = selected(**x, indices=indices, attn_mask=bias, backend=backend)
    t.assert_within(out, truth.values["out"], truth.budget("out", torch.float32))


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("bad", ["over", "far over", "under", "int32 edge", "int64 wrap", "twice", "twice apart"])
def test_hostile_indices(where, axis, bad):
    backend, device = where
    C, rows = (N, Q) if axis == "keys" else (Q, N)
    x = {n: v for n, v in inputs(device).items() if n in ("query", "key", "value")}
    good = torch.arange(4, device=device).repeat(B, H, rows, 1)
    value = {"over": C, "far over": 2**30, "under": -2, "int32 edge": 2**31 - 1, "int64 wrap": 2**32, "twice": 2,
             "twice apart": 0}[bad]  # fmt: skip
    for at in ((0, 0, 0), (B - 1, H - 1, rows - 1)):
        indices = good.clone()
        indices[at][3] = value
        for integer in (torch.int64,) if value > 2**31 else (torch.int32, torch.int64):
            with pytest.raises(ValueError, match="indices"):
                selected(**x, indices=indices.to(integer), axis=axis, backend=backend)


def test_selected_attention_with_dropout(where):
    """Dropout is keyed by the pair, so the order of a row does not matter, and equals that of topk_attention."""
    backend, device = where
    for topk, axis, shared in CALLS:
        x = inputs(device, topk, axis, shared)
        indices = select(**{n: v for n, v in x.items() if n != "value"}, backend=backend)
        given = {n: x[n] for n in ("query", "key", "value", "axis")}
        torch.manual_seed(4)
        whole = op(**x, dropout_p=0.5, backend=backend)
        torch.manual_seed(4)
        again = selected(**given, indices=indices, dropout_p=0.5, backend=backend)
        torch.testing.assert_close(whole, again, rtol=1e-5, atol=1e-6)
        mixed = shuffled(indices)
        torch.manual_seed(4)
        mixed = selected(**given, indices=mixed, dropout_p=0.5, backend=backend)
        torch.testing.assert_close(whole, mixed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("shared", [0, 5])
def test_shape_of_indices(where, axis, shared):
    """(B, H or 1, rows, topk) for every topk, also beyond the size; ascending, -1 last."""
    backend, device = where
    C, rows = (N, Q) if axis == "keys" else (Q, N)
    for topk in (1, C - 1, C, C + 1, C + 30):
        x = inputs(device, topk, axis, shared)
        indices = select(**{n: v for n, v in x.items() if n != "value"}, backend=backend)
        assert indices.shape == (B, 1 if shared else H, rows, topk) and indices.dtype == torch.int32
        assert torch.equal(op(**x, return_indices=True, backend=backend)[1], indices)
        if topk >= C:
            everything = torch.arange(topk, device=device)
            assert torch.equal(indices, torch.where(everything < C, everything, -1).int().expand_as(indices))


def test_returns(where):
    backend, device = where
    x = inputs(device)
    out = op(**x, backend=backend)
    assert isinstance(out, torch.Tensor) and out.shape == (B, H, Q, E)
    for lse, indices in itertools.product((False, True), repeat=2):
        got = op(**x, return_lse=lse, return_indices=indices, backend=backend)
        got = got if lse or indices else (got,)
        assert isinstance(got, tuple) and len(got) == 1 + lse + indices and torch.equal(got[0], out)
    assert not got[2].requires_grad
    for topk, axis in ((None, "keys"), (None, "queries")):
        with pytest.raises(ValueError, match="return_indices"):
            op(**x | {"topk": topk, "axis": axis}, return_indices=True, backend=backend)
    leaf = x["query"].requires_grad_()
    got = op(**x, return_lse=True, return_indices=True, backend=backend)
    assert got[0].requires_grad and got[1].requires_grad and not got[2].requires_grad
    assert torch.autograd.grad(got[1].sum(), leaf)[0].any()


def test_lse_alone_is_differentiable(where):
    """Only lse used: no gradient for value, the right one for query, key and bias."""
    backend, device = where
    for topk, axis in ((None, "keys"), (6, "keys"), (3, "queries")):
        x = inputs(device, topk, axis, mask="float", mask_shape=(B, H, Q, N))
        leaves = [x[n].requires_grad_() for n in ("query", "key", "value", "attn_mask")]
        out, lse = op(**x, return_lse=True, backend=backend)
        upstream = torch.randn_like(lse)
        grads = torch.autograd.grad(lse, leaves, upstream, allow_unused=True)
        x = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
        truth = t.oracle(**x, grad_out=torch.zeros_like(out), grad_lse=upstream)
        assert grads[2] is None or not grads[2].any()
        for name, v in (("query", grads[0]), ("key", grads[1]), ("attn_mask", grads[3])):
            t.assert_within(v, truth.values[name], truth.budget(name, torch.float32), name)
