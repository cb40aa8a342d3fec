"""Perceiver resampler and simple projection against a few lines of plain torch; masks, padding, names."""

import pytest
import torch
from multi_scale import as_exact
from parity import check_twins, gradients_are_finite, kernels_at_any_size, results, twins  # noqa: F401
from torch import nn

import hivilt
from hivilt.reference import modules as plain

C, D, H, R = 16, 4, 3, 5
CLASSES = plain.PerceiverResampler, hivilt.nn.PerceiverResampler


def pair(**options):
    return twins(*CLASSES, C, 2, D, H, R, 2, **options)


def by_hand(module, context, topk=None):
    """One image [N, C] in float64."""
    latents = module.latents
    norm = lambda x, layer: nn.functional.layer_norm(x, (C,), layer.weight, layer.bias)  # noqa: E731
    for attention, feed in module.layers:
        own = norm(latents, attention.norm_latents)
        keys = torch.cat([norm(context, attention.norm_media), own])
        q = (own @ attention.to_q.weight.T).unflatten(-1, (H, D)).transpose(0, 1)
        k, v = (x.unflatten(-1, (H, D)).transpose(0, 1) for x in (keys @ attention.to_kv.weight.T).chunk(2, -1))
        scores = q @ k.mT / D**0.5
        if topk is not None:
            scores = scores.masked_fill(scores < scores.topk(topk, -1).values[..., -1:], -torch.inf)
        latents = latents + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ attention.to_out.weight.T
        hidden = nn.functional.gelu(norm(latents, feed[0]) @ feed[1].weight.T)
        latents = latents + hidden @ feed[3].weight.T
    return norm(latents, module.norm)


@pytest.mark.parametrize("topk", [None, 3])
def test_a_padded_batch_equals_its_images_one_by_one(topk):
    reference, ours = pair(topk=topk)
    context, mask = torch.randn(3, 7, C), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:], mask[2, :] = False, False
    mask[1, 0] = False
    context[~mask] = torch.nan
    with torch.no_grad():
        truth = torch.stack(
            [by_hand(reference.double(), c[m].double(), topk) for c, m in zip(context, mask, strict=True)]
        )
        torch.testing.assert_close(reference(context.double(), mask), truth, rtol=1e-10, atol=1e-10)
        as_exact(ours(context, mask), reference.float()(context, mask), truth)
        assert torch.equal(ours(context, mask.long()), ours(context, mask))


@pytest.mark.parametrize("options", [{}, {"topk": 3}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_twin_has_the_same_gradients(masked, options):
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3:] = False
    check_twins(*pair(**options), lambda m, x: m(x, mask if masked else None), [torch.randn(2, 7, C)])


def test_padding_reaches_no_gradient():
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3:], mask[1] = False, False
    for module in pair():
        context = torch.randn(2, 7, C)
        _, clean = results(module, lambda x, m=module: m(x, mask), [context])
        context[~mask] = torch.inf
        _, found = results(module, lambda x, m=module: m(x, mask), [context])
        assert gradients_are_finite(module) and (found["input 0"][~mask] == 0).all()
        assert all(torch.equal(found[name], clean[name]) for name in clean)


def test_images_of_a_series_are_resampled_one_by_one():
    for module in pair():
        context, mask = torch.randn(2, 3, 7, C), torch.rand(2, 3, 7) < 0.7
        with torch.no_grad():
            out = module(context, mask)
            each = module(context.flatten(0, 1), mask.flatten(0, 1))
        assert out.shape == (2, 3, R, C) and torch.equal(out.flatten(0, 1), each)


def test_names_are_open_flamingos():
    names = ["latents", "norm.weight", "norm.bias"]
    for part in ("norm_media.weight", "norm_media.bias", "norm_latents.weight", "norm_latents.bias", "to_q.weight",
                 "to_kv.weight", "to_out.weight"):  # fmt: skip
        names.append(f"layers.0.0.{part}")
    names += [f"layers.0.1.{part}" for part in ("0.weight", "0.bias", "1.weight", "3.weight")]
    assert sorted(CLASSES[0](C, depth=1).state_dict()) == sorted(names)


def test_accelerate_swaps_the_attentions():
    module = CLASSES[0](C, 2, D, H, R)
    assert [entry.path for entry in hivilt.accelerate(module).replaced] == ["layers.0.0", "layers.1.0"]
    assert type(module.layers[0][0]) is type(CLASSES[1](C, 2, D, H, R).layers[0][0]) is hivilt.nn.PerceiverAttention
    hivilt.restore(module)
    assert type(module.layers[0][0]) is plain.PerceiverAttention


def test_compiles_without_a_break():
    module, context, mask = CLASSES[1](C, 1, D, H, R).eval(), torch.randn(2, 7, C), torch.rand(2, 7) < 0.7
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(context, mask), module(context, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("args, argument, kind", [
    ((torch.randn(2, 7, C + 1),), "context", ValueError), ((torch.randn(7, C),), "context", ValueError),
    ((None,), "context", TypeError), ((torch.randn(2, 7, C), torch.ones(2, 6)), "mask", TypeError),
    ((torch.randn(2, 7, C), torch.ones(2, 6, dtype=torch.bool)), "mask", ValueError),
])  # fmt: skip
def test_bad_arguments(args, argument, kind):
    for cls in CLASSES:
        with pytest.raises(kind, match=rf"PerceiverResampler: {argument}: expected .*; got "):
            cls(C, 1, D, H, R)(*args)


@pytest.mark.parametrize("name", ["dim", "depth", "dim_head", "heads", "num_latents", "ff_mult", "topk"])
def test_bad_options(name):
    for value, kind in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(kind, match=rf"Perceiver\w+: {name}: expected an int of at least 1; got {value}"):
            hivilt.nn.PerceiverResampler(**{"dim": C, "depth": 1, name: value})


def test_simple_projection():
    module = hivilt.nn.SimpleProjection(5, 7)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(module(x), torch.einsum("bnc,dc->bnd", x, module.proj.weight) + module.proj.bias)
    module(x).square().sum().backward()
    assert gradients_are_finite(module) and list(module.state_dict()) == ["proj.weight", "proj.bias"]
    for args, argument, kind in (((0, 7), "d_in", ValueError), ((5, "7"), "d_out", TypeError)):
        with pytest.raises(kind, match=f"SimpleProjection: {argument}: expected"):
            hivilt.nn.SimpleProjection(*args)
    for bad, kind in ((torch.randn(2, 3, 4), ValueError), ([1.0], TypeError)):
        with pytest.raises(kind, match="SimpleProjection: x: expected"):
            module(bad)
