"""Masks of every kind and broadcast form, their gradients, rows that keep nothing, sizes of zero."""

import itertools
import math

import pytest
import torch

import hivilt
import hivilt.testing as t

op, select = hivilt.ops.topk_attention, hivilt.ops.topk_select
B, H, G, Q, N, D, E = 2, 4, 2, 9, 21, 8, 6
PLAIN = {"mask": "", "mask_shape": (), "key_mask": False, "query_mask": False, "select": 0, "scale": None}


def inputs(device, dtype=torch.float32, **changes) -> dict:
    shape = changes.pop("shape", (B, H, G, Q, N, D, E))
    return t.case(7, dtype, shape=shape, **PLAIN | {"fill": "normal", "topk": 4, "axis": "keys"} | changes).inputs(
        device
    )


FORMS = [
    tuple(n if bit else 1 for n, bit in zip((B, H, Q, N), bits, strict=True))
    for bits in itertools.product((0, 1), repeat=4)
]
FORMS += [(H, Q, N), (1, Q, N), (H, 1, N), (Q, N), (1, N), (Q, 1), (N,), (1,), ()]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "half"])
def test_every_broadcast_form(where, kind, form):
    backend, device = where
    g = torch.Generator().manual_seed(len(form) + sum(form))
    allowed = torch.rand(form, generator=g) < 0.8
    for topk, axis in ((None, "keys"), (4, "keys"), (2, "queries")):
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        x = inputs(device, dtype, topk=topk, axis=axis)
        bias = torch.where(allowed, torch.randn(form, generator=g), -math.inf).to(dtype)
        for mask in (allowed, allowed.expand(B, H, Q, N)) if kind == "bool" else (bias, bias.float()):
            t.judge(op, x | {"attn_mask": mask.to(device)}, backend=backend, backward=True, what=f"{kind} {form}")


@pytest.mark.parametrize("used", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("shared", [False, True])
def test_masks_together(where, used, axis, shared):
    """attn_mask, key_mask and query_mask: every subset, and what they forbid may be anything at all."""
    backend, device = where
    for topk, mask in itertools.product((None, 3, 40), ("bool", "float")):
        changes = {"mask": mask if used[0] else "", "mask_shape": (B, 1 if shared else H, Q, N) if used[0] else ()}
        x = inputs(device, topk=topk, axis=axis, select=5 * shared, key_mask=used[1], query_mask=used[2], **changes)
        got = t.judge(op, x, backend=backend, backward=True)
        poisoned = t.judge(op, t.poison(x), backend=backend, backward=True)
        for name, value in got.items():
            assert torch.equal(value, poisoned[name]), f"{name} reads masked values"


@pytest.mark.parametrize("kind", ["attn_mask", "float", "key_mask", "query_mask", "everything"])
@pytest.mark.parametrize("topk, axis", [(None, "keys"), (4, "keys"), (2, "queries"), (300, "queries")])
def test_rows_that_keep_nothing(where, kind, topk, axis):
    """out 0, lse -inf, indices -1, gradients 0, though what is masked and the upstream gradient are NaN."""
    backend, device = where
    x = inputs(device, topk=topk, axis=axis)
    dead = torch.zeros(B, Q, dtype=torch.bool, device=device)
    dead[0, 2] = dead[1, :5] = True
    if kind == "key_mask":
        dead[:] = torch.tensor([[True], [False]])
        x["key_mask"] = (~dead[:, :1]).expand(B, N)
    elif kind == "query_mask":
        x["query_mask"] = ~dead
    elif kind == "everything":
        dead[:] = True
        x["attn_mask"] = torch.zeros((), dtype=torch.bool, device=device)
    else:
        x["attn_mask"] = (~dead)[:, None, :, None].expand(B, H, Q, N)
        if kind == "float":
            x["attn_mask"] = torch.zeros(B, H, Q, N, device=device).masked_fill(~x["attn_mask"], -math.inf)
    x = t.poison(x)
    names = ["query", "key", "value"] + ["attn_mask"] * (kind == "float")
    leaves = [x[n].requires_grad_() for n in names]
    out, lse, *indices = op(**x, return_lse=True, return_indices=topk is not None, backend=backend)
    none = (lse == -math.inf).detach()
    assert none[dead[:, None].expand(B, H, Q)].all()
    assert (out[none] == 0).all() and not out.isnan().any()
    if indices and axis == "keys":
        assert (indices[0][none] == -1).all()
    upstream = torch.where(none[..., None], math.nan, torch.ones_like(out))
    grads = torch.autograd.grad([out, lse], leaves, [upstream, torch.where(none, math.nan, 1.0)])
    for name, grad in zip(names, grads, strict=True):
        assert grad.isfinite().all(), f"gradient of {name}"
    assert (grads[0][none] == 0).all()
    if kind == "everything":
        assert not any(grad.any() for grad in grads)


def test_bias_gradient_only_on_kept_pairs(where):
    backend, device = where
    for topk, axis in ((3, "keys"), (2, "queries")):
        x = inputs(device, mask="float", mask_shape=(B, H, Q, N), topk=topk, axis=axis)
        bias = x["attn_mask"].requires_grad_()
        out, indices = op(**x, return_indices=True, backend=backend)
        (grad,) = torch.autograd.grad(out.square().sum(), bias)
        kept = t.pairs_from_indices(indices, Q, N, H, axis)
        assert (grad[~kept] == 0).all() and (grad[kept] != 0).float().mean() > 0.9


def test_minus_infinity_in_the_bias_equals_a_bool_mask(where):
    backend, device = where
    x = inputs(device, mask="bool", mask_shape=(B, H, Q, N))
    for topk, axis in ((None, "keys"), (3, "keys"), (2, "queries")):
        y = x | {"topk": topk, "axis": axis}
        bias = torch.zeros(B, H, Q, N, device=device).masked_fill(~x["attn_mask"], -math.inf)
        for a, b in zip(op(**y, return_lse=True, backend=backend),
                        op(**y | {"attn_mask": bias}, return_lse=True, backend=backend), strict=True):  # fmt: skip
            assert torch.equal(a, b)


@pytest.mark.parametrize("tile", [0, 1, 7, 15, 16, 63, 64, 127, 128])
def test_masked_tiles(where, tile):
    """Long stretches of masked keys before, between and after a few live ones (exp(-inf - -inf) hides there)."""
    backend, device = where
    allowed = torch.zeros(Q, 260, dtype=torch.bool)
    for i in range(Q):
        allowed[i, (tile + 64 * (i % 3)) % 260 : (tile + 64 * (i % 3)) % 260 + i % 4] = True
    for topk, axis in ((None, "keys"), (2, "keys"), (1, "queries")):
        x = inputs(device, shape=(B, H, G, Q, 260, D, E), topk=topk, axis=axis) | {"attn_mask": allowed.to(device)}
        t.judge(op, t.poison(x), backend=backend, backward=True)


@pytest.mark.parametrize("zero", ["B", "H", "Q", "N", "E"])
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_zero_sizes(where, zero, axis):
    backend, device = where
    for topk, mask, shared in itertools.product((None, 1, 5), ("", "bool", "float"), (0, 3)):
        sizes = {"B": B, "H": H, "G": G, "Q": Q, "N": N, "D": D, "E": E} | {zero: 0}
        shape = tuple(sizes.values())
        form = (sizes["B"], 1 if shared else sizes["H"], sizes["Q"], sizes["N"]) if mask else ()
        masks = {"mask": mask, "mask_shape": form, "key_mask": True, "query_mask": True, "select": shared}
        x = inputs(device, shape=shape, topk=topk, axis=axis, **masks)
        if zero == "H":  # no heads of either kind
            x["key"], x["value"] = x["key"][:, :0], x["value"][:, :0]
        out, lse, *rest = op(**x, return_lse=True, return_indices=topk is not None, backend=backend)
        assert out.shape == (*shape[:2], shape[3], shape[6]) and lse.shape == (*shape[:2], shape[3])
        if rest:
            assert rest[0].shape == (
                shape[0],
                1 if shared else shape[1],
                shape[3] if axis == "keys" else shape[4],
                topk,
            )
        if zero == "N":
            assert not out.any() and (lse == -math.inf).all()
        names = ["query", "key", "value"] + ["attn_mask"] * (mask == "float")
        leaves = [x[n].requires_grad_() for n in names]
        out, lse = op(**x, return_lse=True, backend=backend)
        for leaf, grad in zip(leaves, torch.autograd.grad([out.sum(), lse.clamp(-9, 9).sum()], leaves), strict=True):
            assert grad.shape == leaf.shape and grad.isfinite().all()
            if zero in ("Q", "N"):
                assert not grad.any()


def test_shared_selection_refuses_a_mask_per_head(where):
    backend, device = where
    x = inputs(device, select=5)
    for mask in (torch.ones(B, H, Q, N, dtype=torch.bool), torch.zeros(1, H, 1, 1)):
        with pytest.raises(ValueError, match="attn_mask"):
            op(**x | {"attn_mask": mask.to(device)}, backend=backend)


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_logits_below_minus_fifty_thousand(where, axis):
    """No finite "minus infinity": rows whose every logit is very negative are ordinary rows."""
    backend, device = where
    g = torch.Generator().manual_seed(0)
    for topk in (None, 3):
        x = inputs(device, topk=topk, axis=axis)
        for low, spread in ((-1e5, 3e4), (-120.0, 5.0), (-1e30, 0.0)):
            bias = (low + spread * torch.rand(B, H, Q, N, generator=g)).to(device)
            got = t.judge(op, x | {"attn_mask": bias}, backend=backend, backward=True, what=f"bias {low}")
            if axis == "keys":
                assert (got["out"] != 0).any(-1).all()
