"""Dropout: the documented counter-based mask, the same in backward, on every backend and for any thread count."""

import itertools
import math

import pytest
import torch

import hivilt
import hivilt.testing as t

op = hivilt.ops.topk_attention
B, H, G, Q, N, D = 2, 4, 2, 23, 38, 8
CALLS = [(None, "keys", 0), (9, "keys", 0), (5, "queries", 0), (7, "keys", 4)]


def inputs(device, topk, axis, select=0, dtype=torch.float32, **changes) -> dict:
    plain = {"mask": "", "mask_shape": (), "key_mask": False, "query_mask": False, "scale": None, "fill": "normal"}
    case = t.case(9, dtype, shape=(B, H, G, Q, N, D, 6), topk=topk, axis=axis, select=select, **plain | changes)
    return case.inputs(device)


def multiplier(x: dict, p: float, backend: str, seed: int) -> torch.Tensor:
    """The dropout multiplier of the public call after manual_seed, read off a one-hot value."""
    one_hot = torch.eye(N, device=x["value"].device)[None, None].expand(B, G, N, N)
    torch.manual_seed(seed)
    dropped = op(**x | {"value": one_hot}, dropout_p=p, backend=backend)
    weights = op(**x | {"value": one_hot}, backend=backend)
    return torch.where(weights > 0, dropped / weights, math.nan)


@pytest.mark.parametrize("topk, axis, select", CALLS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_forward_and_backward_use_the_documented_mask(where, topk, axis, select, p):
    """The op with an explicit seed against the oracle fed with an independent Philox mask."""
    backend, device = where
    x = inputs(device, topk, axis, select, mask="float", mask_shape=(B, 1, Q, N), key_mask=True)
    for seed in (0, 1, 2**31 - 1, 2**63 - 1, -5):
        keep = t.dropout_keep(seed, p, (B, H, Q, N)).to(device)
        number = torch.tensor(seed, device=device)
        bias = x["attn_mask"].expand(B, 1, Q, N)
        scale = D**-0.5
        C = N if axis == "keys" else Q
        out, lse, indices = torch.ops.hivilt.topk_attention(
            x["query"], x["key"], x["value"], -1 if topk is None or topk >= C else topk, int(axis == "queries"), bias,
            x["key_mask"], None, x.get("select_query"), x.get("select_key"), None, None, number, scale, p, backend,
        )  # fmt: skip
        g, gl = torch.randn_like(out), torch.randn_like(lse)
        grads = torch.ops.hivilt.topk_attention_backward(
            g, gl, x["query"], x["key"], x["value"], out, lse, indices, int(axis == "queries"), bias, x["key_mask"],
            None, None, None, number, scale, p, True, True, backend,
        )  # fmt: skip
        truth = t.oracle(**x, indices=None if topk is None else indices, keep=keep, grad_out=g, grad_lse=gl)
        names = ("out", "lse", "query", "key", "value", "attn_mask")
        for name, got in zip(names, (out, lse, *grads), strict=True):
            t.assert_within(got, truth.values[name], truth.budget(name, torch.float32), f"seed {seed}: {name}")


@pytest.mark.parametrize("topk, axis, select", CALLS)
def test_public_call_draws_from_the_default_generator(where, topk, axis, select):
    backend, device = where
    x = inputs(device, topk, axis, select)
    one = multiplier(x, 0.5, backend, 1)
    assert torch.equal(one.nan_to_num(-1), multiplier(x, 0.5, backend, 1).nan_to_num(-1))
    assert not torch.equal(one.nan_to_num(-1), multiplier(x, 0.5, backend, 2).nan_to_num(-1))
    torch.manual_seed(1)
    first, second = op(**x, dropout_p=0.5, backend=backend), op(**x, dropout_p=0.5, backend=backend)
    assert not torch.equal(first, second)
    values = one[~one.isnan()]
    assert ((values == 0) | ((values - 2).abs() < 1e-5)).all()
    state = torch.get_rng_state()
    op(**x, backend=backend)
    op(**x, dropout_p=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), state), "a call without dropout advanced the generator"


def test_same_mask_on_every_backend(verdicts):
    """One seed drops the same pairs wherever it runs."""
    able = [name for (name, device), reason in verdicts.items() if reason is None and device == "cpu"]
    for topk, axis, select in CALLS:
        x = inputs("cpu", topk, axis, select)
        masks = [multiplier(x, 0.3, name, 77).nan_to_num(-1) > 0 for name in able]
        assert all(torch.equal(masks[0], m) for m in masks)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.75, 0.999])
def test_keep_rate(where, p):
    backend, device = where
    q, k = torch.zeros(4, 8, 64, 4, device=device), torch.zeros(4, 8, 96, 4, device=device)
    v = torch.ones(4, 8, 96, 1, device=device)
    torch.manual_seed(3)
    out = op(q, k, v, dropout_p=p, backend=backend)  # mean of N kept-or-not, each 1 / (1 - p)
    kept, pairs = out.double().sum().item() * 96 * (1 - p), out.numel() * 96
    assert abs(kept / pairs - (1 - p)) < 4.5 * math.sqrt(p * (1 - p) / pairs)
    rows = out.double().flatten() * 96 * (1 - p)  # rows are independent draws: their spread is binomial
    assert 0.8 < rows.var().item() / (96 * p * (1 - p)) < 1.25


def test_drop_all_and_none(where):
    backend, device = where
    for topk, axis, select in CALLS:
        x = inputs(device, topk, axis, select)
        assert torch.equal(op(**x, dropout_p=0.0, backend=backend), op(**x, backend=backend))
        leaves = [x[n].requires_grad_() for n in ("query", "key", "value")]
        out, lse = op(**x, dropout_p=1.0, return_lse=True, backend=backend)
        assert not out.any() and torch.equal(lse, op(**x, return_lse=True, backend=backend)[1])
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), leaves))


def test_lse_is_taken_before_dropout(where):
    backend, device = where
    for topk, axis, select in CALLS:
        x = inputs(device, topk, axis, select)
        plain, dropped = (op(**x, dropout_p=p, return_lse=True, backend=backend)[1] for p in (0.0, 0.6))
        assert torch.equal(plain, dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_pattern_of_gradient_equals_that_of_output(where, dtype):
    """Value one-hot shows the mask of the forward; the gradient of value shows that of the backward."""
    backend, device = where
    for topk, axis, select in CALLS:
        x = inputs(device, topk, axis, select, dtype)
        eye = torch.eye(N, device=device, dtype=dtype)[None, None].repeat(B, G, 1, 1).requires_grad_()
        for b, h, i in itertools.product(range(B), range(H), (0, 7, Q - 1)):
            torch.manual_seed(5)
            out = op(**x | {"value": eye}, dropout_p=0.4, backend=backend)
            (grad,) = torch.autograd.grad(out[b, h, i].sum(), eye)
            assert torch.equal(grad[b, h * G // H].any(-1), out[b, h, i] != 0)


def test_independent_of_threads_and_padding(where):
    backend, device = where
    for topk, axis, select in CALLS:
        x = inputs(device, topk, axis, select)
        torch.manual_seed(8)
        out = op(**x, dropout_p=0.5, backend=backend)
        torch.set_num_threads(1)
        torch.manual_seed(8)
        assert torch.equal(out, op(**x, dropout_p=0.5, backend=backend))
        torch.set_num_threads(2)
        more = {n: torch.nn.functional.pad(x[n], (0, 0, 0, 5)) for n in x if isinstance(x[n], torch.Tensor)}
        more["key_mask"] = torch.arange(N + 5, device=device).expand(B, -1) < N
        more["query_mask"] = torch.arange(Q + 5, device=device).expand(B, -1) < Q
        torch.manual_seed(8)
        assert torch.equal(out, op(**x | more, dropout_p=0.5, backend=backend)[:, :, :Q])


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf, "0.1", None])
def test_bad_probability(where, p):
    backend, device = where
    with pytest.raises((ValueError, TypeError), match="dropout_p"):
        op(**inputs(device, 3, "keys"), dropout_p=p, backend=backend)
