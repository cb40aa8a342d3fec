"""Dropout: the documented counter-based mask, the same in backward, on every backend and for any thread count."""

import math

import plain_scale_fusion as plain
import pytest
import torch

import hivilt
import hivilt.testing as t
from hivilt.reference.scale_fusion import channel_dropout_keep

pytestmark = pytest.mark.operation("scale_fusion")
op = hivilt.ops.scale_fusion
CALLS = {
    "plain": ([(6, 5), (3, 3)], [8, 12], 20, {}),
    "odd": ([(7,), (3,)], [5, 3], 13, {"norm": "affine", "activation": "silu"}),
    "prefix": ([(2, 3), (3, 3)], [8, 12], 33, {"prefix_tokens": 2, "norm": "none"}),
    "one": ([(4, 4)], [3], 1, {"norm": "none", "activation": "none"}),
}


def operands(x: dict, device: str) -> tuple[dict, tuple, tuple]:
    """Leaves, and the arguments of the operator before and after the seed, from a public call."""
    named = {n: v.to(device) for n, v in plain.leaves(x).items()}
    y = plain.replaced(x, named)
    parameters = [y.get(n) for n in ("bias", "norm_weight", "norm_bias")]
    grids, out_grid = [n for grid in x["grids"] for n in grid], list(plain.setting(x, "out_grid"))
    rest = (plain.setting(x, "mode"), plain.setting(x, "align_corners"), plain.setting(x, "prefix_tokens"))
    after = (grids, out_grid, plain.setting(x, "norm"), plain.setting(x, "eps"), plain.setting(x, "activation"))
    return named, (y["features"], y["weight"], *parameters), (after, rest)


def ones(batch: int, tokens: int, width: int, device: str) -> dict:
    """A call whose result is 1 everywhere before dropout."""
    x = {"features": [torch.ones(batch, tokens, 1, device=device)], "weight": torch.ones(width, 1, device=device)}
    return x | {"grids": [(tokens,)], "norm": "none", "activation": "none", "training": True}


@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("p", [2.0**-16, 0.1, 0.5, 0.9])
def test_forward_and_backward_use_the_documented_mask(where, name, p, impl):
    """The operator with an explicit seed against float64 fed with an independent Philox mask."""
    backend, device = where
    grids, widths, out_width, settings = CALLS[name]
    x = plain.call(grids, widths, out_width, **settings)
    named, (features, weight, bias, norm_weight, norm_bias), (how, rest) = operands(x, device)
    for seed in (0, 1, 2**31 - 1, 2**63 - 1, -5):
        number = torch.tensor(seed, device=device)
        last = (number, *how, p, *rest, impl)
        out, linear = torch.ops.hivilt.scale_fusion(
            features, weight, bias, norm_weight, norm_bias, *last, True, backend
        )
        g = plain.numbers(1, *out.shape).to(device)
        grads = torch.ops.hivilt.scale_fusion_backward(
            g, features, weight, norm_weight, norm_bias, linear, *last, True, True, backend
        )
        keep = plain.dropout_keep(seed, p, tuple(out.shape))
        true = plain.truth(x, g.cpu(), keep)
        found = dict(zip(("weight", "bias", "norm_weight", "norm_bias"), grads[1:], strict=True))
        found |= {f"features[{s}]": v for s, v in enumerate(grads[0])} | {"out": out}
        for n in ("out", *named):
            t.assert_within(found[n].cpu(), true.values[n], true.budget(n, torch.float32), f"seed {seed}: {n}")
        assert torch.equal(out.cpu() == 0, keep == 0)


def test_the_reference_states_the_mask():
    """hivilt.reference.scale_fusion.channel_dropout_keep against numpy's Philox."""
    for seed, p in ((0, 0.1), (2**63 - 1, 0.5), (-5, 0.999), (77, 2.0**-16)):
        for shape in ((2, 9, 20), (1, 1, 1), (3, 4, 33), (0, 5, 8)):
            keep = channel_dropout_keep(seed, p, shape)
            assert torch.equal(keep, plain.dropout_keep(seed, p, shape) > 0)


def test_same_mask_on_every_backend(ask):
    able = [name for name in ("reference", "cpu") if ask(name, "cpu", "scale_fusion") is None]
    x = ones(3, 37, 53, "cpu")
    results = []
    for name in able:
        torch.manual_seed(5)
        results.append(op(**x, dropout_p=0.3, backend=name))
    assert all(torch.equal(results[0], other) for other in results) and results[0].min() == 0


@pytest.mark.parametrize("p", [0.05, 0.3, 0.75, 0.999])
def test_keep_rate(where, p):
    """Binomial: within 4.5 deviations of the rate, overall and in each of the 16 positions of a Philox call."""
    backend, device = where
    torch.manual_seed(3)
    out = op(**ones(4, 300, 96, device), dropout_p=p, backend=backend).cpu()
    kept = out != 0
    quantised = 1 - round(p * 65536) / 65536
    for part in (kept, *(kept[..., i::16] for i in range(16)), kept[0], kept[:, ::2]):
        spread = math.sqrt(quantised * (1 - quantised) / part.numel())
        assert abs(part.double().mean() - quantised) < 4.5 * spread
    rows, variance = kept.double().sum(-1), 96 * quantised * (1 - quantised)  # rows are independent: binomial
    assert abs(rows.var() / variance - 1) < 4.5 * math.sqrt((2 + 1 / variance) / rows.numel())
    both = (kept[..., :-1] & kept[..., 1:]).double().mean()  # so are neighbours
    assert abs(both - quantised**2) < 4.5 * math.sqrt(quantised**2 * (1 - quantised**2) / kept.numel()) * 2


@pytest.mark.parametrize("p", [2.0**-16, 0.1, 1 / 3, 0.5, 0.7, 1 - 2.0**-16])
def test_scale_is_exact(where, p):
    """Kept elements are multiplied by the reciprocal of the quantised keep probability, rounded once."""
    backend, device = where
    torch.manual_seed(1)
    out = op(**ones(2, 200, 64, device), dropout_p=p, backend=backend)
    scale = torch.tensor(65536 / (65536 - round(p * 65536)), dtype=torch.float64).float().item()
    values = out.unique()
    assert set(values.tolist()) <= {0.0, scale} and (p > 0.9 or scale in values)


def test_drop_all_none_and_less_than_a_step(where):
    backend, device = where
    x = plain.call(*CALLS["plain"][:3])
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(x).items()}
    y = plain.replaced(x, named) | {"backend": backend}
    base, state = op(**y), torch.get_rng_state()
    for same in ({"dropout_p": 0.0, "training": True}, {"dropout_p": 0.7}, {"dropout_p": 2.0**-18, "training": True}):
        assert torch.equal(op(**y, **same), base)
    assert torch.equal(torch.get_rng_state(), state), "a call without dropout advanced the generator"
    out = op(**y, dropout_p=1.0, training=True)
    assert not out.any() and not any(g.any() for g in torch.autograd.grad(out.sum(), list(named.values())))
    bad = plain.replaced(x, {"features[0]": x["features"][0].to(device) * math.nan}) | {"backend": backend}
    bad = plain.replaced(bad, {n: v.detach() for n, v in named.items() if n != "features[0]"})
    assert not op(**bad, dropout_p=1.0, training=True).any(), "what is dropped is not multiplied in"


def test_public_call_draws_from_the_default_generator(where):
    backend, device = where
    x = ones(2, 30, 24, device) | {"dropout_p": 0.5, "backend": backend}

    def after(seed):
        torch.manual_seed(seed)
        return op(**x), op(**x)

    (a, b), (c, d) = after(1), after(1)
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, b)
    assert not torch.equal(a, after(2)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_pattern_of_gradient_equals_that_of_output(where, dtype):
    """One scale on its own grid, identity weights: the gradient shows the mask of the backward."""
    backend, device = where
    f = torch.ones(3, 31, 24, dtype=dtype, device=device, requires_grad=True)
    weight = torch.eye(24, dtype=dtype, device=device)
    settings = {"grids": [(31,)], "norm": "none", "activation": "none", "dropout_p": 0.4, "training": True}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(9)
        out = op([f], weight, **settings, backend=backend)
        grad = torch.autograd.grad(out.sum(), f)[0]
        assert torch.equal(grad, out.detach()) and (grad == 0).any() and (grad != 0).any()


def test_batch_entries_get_masks_of_their_own(where):
    """The batch index is part of the counter, so a sample's mask depends on its place and on nothing else there."""
    backend, device = where
    torch.manual_seed(4)
    whole = op(**ones(5, 30, 24, device), dropout_p=0.5, backend=backend)
    torch.manual_seed(4)
    first = op(**ones(2, 30, 24, device), dropout_p=0.5, backend=backend)
    assert torch.equal(whole[:2], first) and not torch.equal(whole[0], whole[1])
