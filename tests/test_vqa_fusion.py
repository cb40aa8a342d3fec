"""MultimodalFusion and MaskedMeanPool against torch written here: values, masks, padding, gradients, names, calls."""

import math
import re

import pytest
import torch
from torch import nn

import hivilt
from hivilt.reference import modules as plain

B, T, N, C, CV, H = 3, 6, 10, 16, 9, 4
ROOMS = [pytest.param(plain, id="plain"), pytest.param(hivilt.nn, id="hivilt")]
FLAGS = [(False, False), (True, False), (False, True), (True, True)]
LENGTHS = [6, 4, 1]


def fusion(room, image_to_text=True, residual=True):
    torch.manual_seed(1)
    module = room.MultimodalFusion(C, CV, H, 24, image_to_text=image_to_text, residual=residual)
    with torch.no_grad():  # torch starts these at 0 and 1, where a mistake would not show
        for name, p in module.named_parameters():
            if "bias" in name or "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return module


def inputs(dtype=torch.float32):
    words = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    patches = torch.arange(N) < torch.tensor([10, 7, 9])[:, None]
    return torch.randn(B, T, C, dtype=dtype), torch.randn(B, N, CV, dtype=dtype), words, patches


def attend(module, query, tokens):
    """One sample without padding: query [Q, C], tokens [N, C]."""
    w, b = module.in_proj_weight, module.in_proj_bias
    q, k, v = (x @ w[i * C : (i + 1) * C].T + b[i * C : (i + 1) * C] for i, x in enumerate((query, tokens, tokens)))
    heads = []
    for h in range(H):
        at = slice(h * C // H, (h + 1) * C // H)
        heads.append((q[:, at] @ k[:, at].T / math.sqrt(C // H)).softmax(1) @ v[:, at])
    return torch.cat(heads, 1) @ module.out_proj.weight.T + module.out_proj.bias


def truth(module, text, vision):
    """The formula for one sample of words [T, C] and patches [N, CV] that all take part."""
    v = vision @ module.vision_proj.weight.T + module.vision_proj.bias
    if module.image_to_text:
        v = v + attend(module.image_to_text_attention, v, text)
    joined = torch.cat([text, attend(module.text_to_image_attention, text, v)], 1)
    first, _, last = module.mlp
    out = (joined @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    if module.residual:
        x = text + out
        out = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        out = out * module.norm1.weight + module.norm1.bias
    return out, v


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("image_to_text, residual", FLAGS)
def test_padded_batch_is_each_sample_alone_with_nan_as_padding(room, image_to_text, residual):
    module = fusion(room, image_to_text, residual)
    text, vision, words, patches = inputs()
    expected = [truth(module, text[b][words[b]], vision[b][patches[b]]) for b in range(B)]
    text[~words], vision[~patches] = torch.nan, torch.nan
    text.requires_grad_()
    vision.requires_grad_()
    fused, mask, seen = module(text, vision, words.long(), vision_mask=patches, return_patches=True)
    assert torch.equal(mask, words) and fused.shape == (B, T, C) and seen.shape == (B, N, C)
    for b, (words_alone, patches_alone) in enumerate(expected):
        torch.testing.assert_close(fused[b][words[b]], words_alone, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(seen[b][patches[b]], patches_alone, rtol=1e-5, atol=2e-6)
    assert (fused[~words] == 0).all() and (seen[~patches] == 0).all()
    (fused * torch.randn_like(fused)).sum().backward()
    assert (text.grad[~words] == 0).all() and (vision.grad[~patches] == 0).all()
    named = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in named.values())
    assert ("norm1.weight" in named) == residual


@pytest.mark.parametrize("image_to_text", [False, True])
def test_gradients_are_those_of_the_formula(image_to_text):
    module = fusion(hivilt.nn, image_to_text).double()
    text, vision, words, _ = inputs(torch.float64)
    g = torch.randn(B, T, C, dtype=torch.float64)
    expected = torch.autograd.grad(
        sum((truth(module, text[b][words[b]], vision[b])[0] * g[b][words[b]]).sum() for b in range(B)),
        list(module.parameters()),
    )
    found = torch.autograd.grad((module(text, vision, words)[0] * g).sum(), list(module.parameters()))
    for (name, _), x, y in zip(module.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("room", ROOMS)
def test_rows_without_words_or_patches_stay_finite(room):
    module = fusion(room)
    text, vision, words, patches = inputs()
    words[0], patches[1] = False, False
    text.requires_grad_()
    fused, _, seen = module(text, vision, words, vision_mask=patches, return_patches=True)
    assert (fused[0] == 0).all() and (seen[1] == 0).all()
    (fused.square().sum() + seen.square().sum()).backward()
    assert (text.grad[0] == 0).all() and text.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    # without a patch, the words see the bias of the attention's output alone
    bias = module.text_to_image_attention.out_proj.bias.expand(LENGTHS[1], C)
    x = text[1, : LENGTHS[1]]
    expected = module.norm1(x + module.mlp(torch.cat([x, bias], 1)))
    torch.testing.assert_close(fused[1, : LENGTHS[1]], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("batch, words, patches", [(0, T, N), (B, 0, N), (B, T, 0)])
def test_nothing_to_read_under_a_mask(room, batch, words, patches):
    """What sees nothing sees the bias of the attention's output, whether nothing is there or all of it is masked."""
    module = fusion(room)
    text, vision = torch.randn(batch, words, C), torch.randn(batch, patches, CV)
    masks = torch.ones(batch, words, dtype=torch.bool), torch.ones(batch, patches, dtype=torch.bool)
    fused, _, seen = module(text, vision, masks[0], vision_mask=masks[1], return_patches=True)
    masked = [torch.nn.functional.pad(m, (0, 1)) for m in masks]
    text, vision = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (text, vision))
    expected, _, patches_too = module(text, vision, masked[0], vision_mask=masked[1], return_patches=True)
    torch.testing.assert_close(fused, expected[:, :-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen, patches_too[:, :-1], rtol=1e-5, atol=1e-6)


def test_padding_words_would_matter_without_their_mask():
    """The mistake of the text: patches that read padding."""
    module = fusion(plain)
    text, vision, words, _ = inputs()
    text[~words] = 9.0
    masked, free = module(text, vision, words)[0], module(text, vision)[0]
    assert (masked - free)[words].abs().max() > 0.05


def test_both_rooms_agree_and_load_each_other_strictly():
    ours, theirs = fusion(hivilt.nn), fusion(plain)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    text, vision, words, patches = inputs()
    for x, y in zip(ours(text, vision, words, vision_mask=patches), theirs(text, vision, words, vision_mask=patches),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    report = hivilt.accelerate(theirs, topk={"text_to_image_attention": N})
    assert [e.path for e in report.replaced] == ["text_to_image_attention", "image_to_text_attention"]
    torch.testing.assert_close(theirs(text, vision, words)[0], ours(text, vision, words)[0], rtol=1e-5, atol=1e-6)
    theirs.text_to_image_attention.topk = 1
    assert (theirs(text, vision, words)[0] - ours(text, vision, words)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("room", ROOMS)
def test_names_of_the_document(room):
    attention = [f"{{}}.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
    names = ["vision_proj.weight", "vision_proj.bias", "norm1.weight", "norm1.bias"]
    names += [f"mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    names += [form.format("text_to_image_attention") for form in attention]
    assert sorted(room.MultimodalFusion(C, CV, H, 24).state_dict()) == sorted(names)
    names += [form.format("image_to_text_attention") for form in attention]
    assert sorted(room.MultimodalFusion(C, CV, H, 24, image_to_text=True).state_dict()) == sorted(names)


def test_compiles_without_a_break():
    module = fusion(hivilt.nn)
    text, vision, words, patches = inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = compiled(text, vision, words, vision_mask=patches)[0]
    torch.testing.assert_close(out, module(text, vision, words, vision_mask=patches)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mean_is_that_of_the_tokens_that_take_part(room, dtype):
    x, _, words, _ = inputs()
    words[1] = False
    x = x.to(dtype)
    expected = [x[b][words[b]].double().sum(0) / max(int(words[b].sum()), 1) for b in range(B)]
    x[~words] = torch.nan
    x.requires_grad_()
    out = room.MaskedMeanPool()(x, words)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(out.double(), torch.stack(expected), rtol=tolerance, atol=tolerance)
    assert out.dtype == dtype and (out[1] == 0).all()
    out.sum().backward()
    share = torch.where(words, 1 / words.sum(1, keepdim=True).clamp(min=1).double(), 0.0)[..., None].expand_as(x)
    torch.testing.assert_close(x.grad.double(), share, rtol=tolerance, atol=0)
    every = torch.randn(2, 5, 3).to(dtype)
    for autocast in (False, True):  # a mean is no product: autocast leaves it alone
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mean = room.MaskedMeanPool()(every)
        assert mean.dtype == dtype
        torch.testing.assert_close(mean.double(), every.double().mean(1), rtol=tolerance, atol=tolerance)


def test_a_sum_of_many_halves_does_not_overflow():
    assert (plain.MaskedMeanPool()(torch.full((1, 4096, 1), 100.0).half()) == 100).all()


def test_the_pool_is_swapped():
    model = nn.Sequential(plain.MaskedMeanPool())
    assert [e.detail for e in hivilt.accelerate(model).replaced] == ["token_pool"]
    assert type(model[0]) is hivilt.nn.MaskedMeanPool and hivilt.restore(model) == ["0"]


BAD = {
    "hidden": (TypeError, "hidden_dim", lambda r: r.MultimodalFusion(16, 9, 4, 2.5)),
    "width": (ValueError, "vision_embed_dim", lambda r: r.MultimodalFusion(16, 0, 4, 8)),
    "heads": (ValueError, "num_attention_heads", lambda r: r.MultimodalFusion(16, 9, 3, 8)),
    "flag": (TypeError, "residual", lambda r: r.MultimodalFusion(16, 9, 4, 8, residual=1)),
    "text-rank": (ValueError, "text_embeddings", lambda r: call(r, text=torch.zeros(3, 16))),
    "text-list": (TypeError, "text_embeddings", lambda r: call(r, text=[1])),
    "text-width": (ValueError, "text_embeddings", lambda r: call(r, text=torch.zeros(3, 6, 15))),
    "vision-width": (ValueError, "vision_features", lambda r: call(r, vision=torch.zeros(3, 10, 16))),
    "vision-batch": (ValueError, "vision_features", lambda r: call(r, vision=torch.zeros(2, 10, 9))),
    "mask-of-image": (ValueError, "attention_mask", lambda r: call(r, mask=torch.ones(3, 10, dtype=torch.bool))),
    "mask-float": (TypeError, "attention_mask", lambda r: call(r, mask=torch.ones(3, 6))),
    "vision-mask": (ValueError, "vision_mask", lambda r: call(r, vision_mask=torch.ones(3, 6, dtype=torch.bool))),
    "pool-rank": (ValueError, "features", lambda r: r.MaskedMeanPool()(torch.zeros(3, 6))),
    "pool-int": (TypeError, "features", lambda r: r.MaskedMeanPool()(torch.zeros(3, 6, 2, dtype=torch.long))),
    "pool-mask": (ValueError, "mask", lambda r: r.MaskedMeanPool()(torch.zeros(3, 6, 2), torch.ones(3, 5) > 0)),
}


def call(room, text=None, vision=None, mask=None, vision_mask=None):
    t, v, m, _ = inputs()
    t, v, m = (new if new is not None else old for new, old in ((text, t), (vision, v), (mask, m)))
    return fusion(room)(t, v, m, vision_mask=vision_mask)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(room, name):
    kind, argument, bad = BAD[name]
    with pytest.raises(kind, match=rf"(MultimodalFusion|MaskedMeanPool): {re.escape(argument)}: expected .*; got "):
        bad(room)
