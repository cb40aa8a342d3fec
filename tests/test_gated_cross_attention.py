"""Flamingo's gated cross-attention against a loop over tokens in float64: who reads which image, gates, padding."""

import copy

import pytest
import torch
from multi_scale import as_exact
from parity import check_twins, gradients_are_finite, kernels_at_any_size, results, twins  # noqa: F401
from torch import nn

import hivilt
from hivilt.reference import modules as plain

C, V, D, H = 16, 12, 4, 3
LOCATIONS = torch.tensor(
    [[0, 0, 1, 0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1, 0, 1, 0], [0] * 9]
)  # text before an image; one image; more images in the text than were passed; none


def block(cls=plain.GatedCrossAttentionBlock, **options):
    return cls(C, V, D, H, 2, **options)


def pair(**options):
    classes = plain.GatedCrossAttentionBlock, hivilt.nn.GatedCrossAttentionBlock
    modules = twins(*classes, C, V, D, H, 2, **options)
    assert all(m.attn_gate.item() != 0.0 != m.ff_gate.item() for m in modules)
    return modules


def inputs(batch=4, images=3, tokens=5):
    return torch.randn(batch, 9, C), torch.randn(batch, images, tokens, V)


def by_hand(module, x, media, locations, pairs=None, topk=None):
    """float64, one text token at a time; pairs: bool [B, L, T n]."""
    immediate, attn = module.attn.only_attend_immediate_media, module.attn
    linear = nn.functional.linear
    out = x.clone()
    for b in range(x.shape[0]):
        seen = 0
        for i in range(x.shape[1]):
            seen += int(locations[b, i]) if locations is not None else 0
            allowed = []
            for j in range(media.shape[1] * media.shape[2]):
                t = j // media.shape[2] + 1
                ok = locations is None or (t == seen if immediate else t <= seen)
                if ok and (pairs is None or pairs[b, i, j]):
                    allowed.append(j)
            if not allowed:
                continue
            keys = media[b].flatten(0, 1)[allowed]
            q = linear(nn.functional.layer_norm(x[b, i], (C,), attn.norm.weight, attn.norm.bias), attn.to_q.weight)
            k, v = linear(keys, attn.to_kv.weight).chunk(2, -1)
            heads = []
            for h in range(H):
                part = slice(h * D, (h + 1) * D)
                scores = k[:, part] @ q[part] * D**-0.5
                if topk is not None:
                    scores = scores.masked_fill(scores < scores.topk(min(topk, len(scores))).values[-1], -torch.inf)
                heads.append(scores.softmax(0) @ v[:, part])
            out[b, i] = x[b, i] + module.attn_gate.tanh() * linear(torch.cat(heads), attn.to_out.weight)
    hidden = nn.functional.layer_norm(out, (C,), module.ff[0].weight, module.ff[0].bias)
    hidden = linear(nn.functional.gelu(linear(hidden, module.ff[1].weight)), module.ff[3].weight)
    return out + module.ff_gate.tanh() * hidden


CASES = {
    "immediate": ({}, LOCATIONS, None),
    "all-before": ({"only_attend_immediate_media": False}, LOCATIONS, None),
    "no-locations": ({}, None, None),
    "pairs": ({}, LOCATIONS, "images"),
    "tokens": ({"only_attend_immediate_media": False}, LOCATIONS.bool(), "tokens"),
    "topk": ({"topk": 2}, LOCATIONS, None),
    "topk-pairs": ({"topk": 2}, None, "tokens"),
}


def pairs_of(kind, images=3, tokens=5):
    if kind is None:
        return None, None
    mask = torch.rand(4, 9, images if kind == "images" else images * tokens) < 0.5
    return mask, mask.repeat_interleave(tokens, 2) if kind == "images" else mask


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_tokens(case):
    options, locations, kind = CASES[case]
    reference, ours = pair(**options)
    x, media = inputs()
    mask, every = pairs_of(kind)
    truth = by_hand(reference.double(), x.double(), media.double(), locations, every, options.get("topk"))
    out = reference(x.double(), media.double(), locations, mask)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        as_exact(ours(x, media, locations, mask), reference.float()(x, media, locations, mask), truth)


@pytest.mark.parametrize("case", CASES)
def test_the_twin_has_the_same_gradients(case):
    options, locations, kind = CASES[case]
    mask, _ = pairs_of(kind)
    check_twins(*pair(**options), lambda m, x, media: m(x, media, locations, mask), inputs())


def test_the_packed_call_is_the_one_that_runs(monkeypatch):
    from hivilt.nn import gated_cross_attention as module

    calls = []
    packed = module.topk_attention_varlen
    monkeypatch.setattr(module, "topk_attention_varlen", lambda *a, **k: calls.append(a) or packed(*a, **k))
    _, ours = pair()
    ours(*inputs(), LOCATIONS)
    if hivilt.last_backend() == "reference":
        pytest.skip("no kernel here, so the plain module works")
    (_, _, _, of_text, of_media, *_), *_ = calls
    assert (
        len(calls) == 1
        and of_text.tolist()[:6] == [0, 2, 5, 8, 9, 9]
        and of_media.tolist()[:6] == [0, 0, 5, 10, 15, 15]
    )


def test_text_before_the_first_image_reads_nothing():
    for immediate in (True, False):
        for module in pair(only_attend_immediate_media=immediate):
            x, media = inputs()
            seen = module.attn(x, media, LOCATIONS)
            assert (seen[0, :2] == 0).all() and (seen[3] == 0).all() and (seen[0, 2:] != 0).all()
            beyond = seen[2, 7:]  # behind a fourth image of which there is none
            assert (beyond == 0).all() if immediate else (beyond != 0).all()


@pytest.mark.parametrize("options", [{}, {"only_attend_immediate_media": False}, {"topk": 2}], ids=str)
def test_what_nobody_reads_does_not_matter(options):
    """The third image of a text that shows two, and an image that a mask hides from all, hold NaN."""
    locations = LOCATIONS[:1].repeat(2, 1)
    locations[1, 8] = 0
    hidden = torch.ones(2, 9, 3, dtype=torch.bool)
    hidden[:, :, 0] = False
    for module in pair(**options):
        x, media = inputs(2)
        clean, of_clean = results(module, lambda *a, m=module: m(*a, locations), (x, media))
        masked, of_masked = results(module, lambda *a, m=module: m(*a, locations, hidden), (x, media))
        media[1, 2] = torch.nan
        out, found = results(module, lambda *a, m=module: m(*a, locations), (x, media))
        assert torch.equal(out, clean) and all(torch.equal(found[name], of_clean[name]) for name in of_clean)
        media[:, 0] = torch.nan
        out, found = results(module, lambda *a, m=module: m(*a, locations, hidden), (x, media))
        assert torch.equal(out, masked) and all(torch.equal(found[name], of_masked[name]) for name in of_masked)
        assert gradients_are_finite(module) and (found["input 1"][:, 0] == 0).all()


def test_nothing_to_read_leaves_finite_gradients():
    for module in pair():
        x, media = inputs()
        media[:] = torch.nan
        module.zero_grad()
        out = module(x, media, torch.zeros(4, 9, dtype=torch.long))
        out.sum().backward()
        assert out.isfinite().all() and gradients_are_finite(module)


def test_rows_are_independent():
    for module in pair():
        x, media = inputs()
        with torch.no_grad():
            alone = torch.cat([module(x[b : b + 1], media[b : b + 1], LOCATIONS[b : b + 1]) for b in range(4)])
            torch.testing.assert_close(module(x, media, LOCATIONS), alone, rtol=1e-5, atol=1e-6)


def test_one_image_needs_no_axis():
    for module in pair():
        x, media = inputs(images=1)
        assert torch.equal(module(x, media[:, 0]), module(x, media))
        pairs = torch.rand(4, 9, 5) < 0.5
        assert torch.equal(module(x, media, attn_mask=pairs[:, None]), module(x, media, attn_mask=pairs.long()))


def test_new_blocks_change_nothing_and_open_their_gates():
    for cls in (plain.GatedCrossAttentionBlock, hivilt.nn.GatedCrossAttentionBlock):
        module, (x, media) = block(cls), inputs()
        out = module(x, media, LOCATIONS)
        assert torch.equal(out, x)
        out.square().sum().backward()
        assert float(module.attn_gate.grad.abs()) > 0 and float(module.ff_gate.grad.abs()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_and_autocast(dtype):
    _, module = pair()
    x, media = inputs()
    exact = module(x, media, LOCATIONS).detach()
    half = copy.deepcopy(module).to(dtype)
    with torch.autocast("cpu", dtype):
        mixed = module(x, media, LOCATIONS)
    for out, trained in ((mixed, module), (half(x.to(dtype), media.to(dtype), LOCATIONS), half)):
        assert (out.float() - exact).norm() < 8 * 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * exact.norm()
        out.float().sum().backward()
        assert gradients_are_finite(trained)


def test_names_are_open_flamingos():
    assert sorted(block().state_dict()) == [
        "attn.norm.bias", "attn.norm.weight", "attn.to_kv.weight", "attn.to_out.weight", "attn.to_q.weight",
        "attn_gate", "ff.0.bias", "ff.0.weight", "ff.1.weight", "ff.3.weight", "ff_gate",
    ]  # fmt: skip


def test_accelerate_swaps_the_attention():
    module = block()
    assert [entry.path for entry in hivilt.accelerate(module).replaced] == ["attn"]
    assert type(module.attn) is hivilt.nn.MaskedCrossAttention
    assert type(hivilt.nn.GatedCrossAttentionBlock(C).attn) is hivilt.nn.MaskedCrossAttention
    assert hivilt.restore(module) == ["attn"] and type(module.attn) is plain.MaskedCrossAttention


def test_compiles_without_a_break():
    module, (x, media) = block(hivilt.nn.GatedCrossAttentionBlock).eval(), inputs()
    nn.init.constant_(module.attn_gate, 0.5)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x, media, LOCATIONS), module(x, media, LOCATIONS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change, argument, kind", [
    ({"x": torch.randn(4, 9, C + 1)}, "x", ValueError),
    ({"x": torch.randn(9, C)}, "x", ValueError),
    ({"media": None}, "media", TypeError),
    ({"media": torch.randn(5, V)}, "media", ValueError),
    ({"media": torch.randn(3, 3, 5, V)}, "media", ValueError),
    ({"media": torch.randn(4, 3, 5, C)}, "media", ValueError),
    ({"media_locations": LOCATIONS[:3]}, "media_locations", ValueError),
    ({"media_locations": LOCATIONS.float()}, "media_locations", TypeError),
    ({"attn_mask": torch.ones(4, 9, 4, dtype=torch.bool)}, "attn_mask", ValueError),
    ({"attn_mask": torch.ones(4, 3, 9, 15, dtype=torch.bool)}, "attn_mask", ValueError),
    ({"attn_mask": torch.ones(4, 9, 3)}, "attn_mask", TypeError),
])  # fmt: skip
def test_bad_arguments(change, argument, kind):
    x, media = inputs()
    for cls in (plain.GatedCrossAttentionBlock, hivilt.nn.GatedCrossAttentionBlock):
        with pytest.raises(kind, match=rf"GatedCrossAttentionBlock: {argument}: expected .*; got "):
            block(cls)(**{"x": x, "media": media, **change})


@pytest.mark.parametrize("change, argument, kind", [
    ({"dim": 0}, "dim", ValueError), ({"heads": 2.0}, "heads", TypeError), ({"dim_head": -1}, "dim_head", ValueError),
    ({"dim_visual": "8"}, "dim_visual", TypeError), ({"ff_mult": 0}, "ff_mult", ValueError),
    ({"only_attend_immediate_media": 1}, "only_attend_immediate_media", TypeError), ({"topk": 0}, "topk", ValueError),
    ({"dropout": 1.5}, "dropout", ValueError),
])  # fmt: skip
def test_bad_options(change, argument, kind):
    with pytest.raises(kind, match=rf"\w+: {argument}: expected .*; got "):
        hivilt.nn.GatedCrossAttentionBlock(**{"dim": C, **change})
