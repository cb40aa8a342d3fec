"""Q-Former: the layer, who sees whom under the three objectives, masks and padding. Parity: test_hf_parity.py."""

import pytest
import torch
from parity import check_twins, gradients_are_finite, kernels_at_any_size, randomise, results, twins  # noqa: F401
from torch import nn

import hivilt
from hivilt.reference import models as plain_models
from hivilt.reference import modules as plain
from hivilt.reference.models.qformer import attention_pattern

C, H, V, Q, N = 24, 3, 20, 4, 6
SMALL = {"hidden_size": C, "num_attention_heads": H, "intermediate_size": 32, "num_hidden_layers": 2,
         "encoder_hidden_size": V, "num_query_tokens": Q}  # fmt: skip
TEXT = {**SMALL, "vocab_size": 15, "max_position_embeddings": N, "image_text_hidden_size": 8}
WORDS = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
CLASSES = plain_models.QFormer, hivilt.models.QFormer


def models(config, **options):
    return twins(*CLASSES, config, **options)


def image_and_mask(batch=3):
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[1, 4:], mask[1, 0], mask[2:] = False, False, False
    return torch.randn(batch, 7, V), mask


def ids(batch=3):
    return torch.randint(0, 15, (batch, N))


def test_the_twin_has_the_same_gradients():
    image, mask = image_and_mask(2)
    config = {**SMALL, "num_query_tokens": 0}
    check_twins(*models(config), lambda m, q, x: m(q, x, mask), [torch.randn(1, Q, C), image])
    check_twins(*models(config, topk=2), lambda m, q, x: m(q, x, mask), [torch.randn(2, Q, C), image])


def test_every_parameter_learns_from_the_three_objectives():
    image, mask = image_and_mask()
    words = ids()

    def objectives(module, x):
        found, text = module.itc(x, words, WORDS, mask)
        itm, itg = module.itm(x, words, WORDS, mask), module.itg(x, words, WORDS, mask)
        return torch.cat([y.flatten(1) for y in (found, text, itm, itg)], 1)

    check_twins(*models(TEXT), objectives, [image])


def test_own_queries_are_those_one_would_pass():
    image, mask = image_and_mask()
    for module in models(SMALL):
        out = module(None, image, mask)
        assert out.shape == (3, Q, C) and torch.equal(out, module(module.query_tokens, image, mask))
        expanded = module.query_tokens.expand(3, -1, -1)
        torch.testing.assert_close(module(expanded, image, mask), out, rtol=1e-5, atol=1e-5)
        out.sum().backward()
        assert module.query_tokens.grad.abs().sum() > 0


def test_a_padded_batch_equals_its_images_one_by_one():
    image, mask = image_and_mask()
    image[~mask] = torch.nan
    for module in models(SMALL):
        with torch.no_grad():
            out = module(None, image, mask)
            for b in range(2):
                torch.testing.assert_close(
                    out[b : b + 1], module(None, image[b : b + 1, mask[b]]), rtol=1e-5, atol=1e-5
                )


def test_padding_reaches_no_gradient():
    image, mask = image_and_mask()
    for module in models(SMALL):
        _, clean = results(module, lambda x, m=module: m(None, x, mask), [image])
        dirty = torch.where(mask[..., None], image, torch.nan)
        _, found = results(module, lambda x, m=module: m(None, x, mask), [dirty])
        assert gradients_are_finite(module) and (found["input 0"][~mask] == 0).all()
        assert all(torch.equal(found[name], clean[name]) for name in clean)


def test_a_fully_masked_image_gives_no_attention():
    """What is left of a cross-attention is the bias of the layer behind it."""
    for cls in (plain.QFormerLayer, hivilt.nn.QFormerLayer):
        layer = cls(C, H, 32, V).eval()
        randomise(layer)
        x, image = torch.randn(2, Q, C), torch.full((2, 7, V), torch.nan)
        seen = layer.crossattention.attention(x, torch.randn(2, 7, V), None, torch.zeros(2, 7, dtype=torch.bool))
        assert (seen == 0).all()
        out = layer(x, image, torch.zeros(2, 7, dtype=torch.bool))
        out.sum().backward()
        y = layer.attention(x, x, None, None)
        y = layer.crossattention.output.LayerNorm(y + layer.crossattention.output.dense.bias)
        torch.testing.assert_close(out, layer.output_query(layer.intermediate_query(y), y))
        assert gradients_are_finite(layer)


def test_patterns_written_out():
    words = torch.tensor([[True, True, False]])
    expected = {
        "unimodal": ["11000", "11000", "00110", "00110", "00110"],
        "bidirectional": ["11110", "11110", "11110", "11110", "11110"],
        "causal": ["11000", "11000", "11100", "11110", "11110"],
    }
    for name, rows in expected.items():
        found = attention_pattern(name, 2, words)
        assert found.shape == (1, 1, 5, 5) and found.dtype == torch.bool
        assert ["".join(str(int(x)) for x in row) for row in found[0, 0]] == rows, name


def test_unimodal_is_both_alone():
    image, mask = image_and_mask()
    words = ids()
    for module in models(TEXT):
        with torch.no_grad():
            both = module.encode(None, image, words, WORDS, mask, "unimodal")
            torch.testing.assert_close(both[:, :Q], module(None, image, mask), rtol=1e-5, atol=1e-5)
            alone = module.encode_text(words, WORDS)
            kept = WORDS.bool()
            torch.testing.assert_close(both[:, Q:][kept], alone[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern, moves", [("unimodal", []), ("bidirectional", [0, 1, 2, 3]), ("causal", [])])
def test_which_queries_a_word_reaches(pattern, moves):
    """And in the causal pattern no word before it."""
    image, words = torch.randn(1, 7, V), ids(1)
    other = words.clone()
    other[0, 3] = (other[0, 3] + 1) % 15
    for module in models(TEXT):
        with torch.no_grad():
            change = module.encode(None, image, words, pattern=pattern) - module.encode(
                None, image, other, pattern=pattern
            )
        moved = (change[0].abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
        behind = [3, 4, 5] if pattern == "causal" else list(range(N))
        assert moved == moves + [Q + i for i in behind]


def test_words_that_take_no_part_may_be_anything():
    image, mask = image_and_mask()
    words = ids()
    wild = torch.where(WORDS.bool(), words, 10_000)
    for module in models(TEXT):
        with torch.no_grad():
            for name in ("itm", "itc", "itg"):
                a, b = (getattr(module, name)(image, x, WORDS, mask) for x in (words, wild))
                for x, y in zip(a, b, strict=True) if name == "itc" else [(a, b)]:
                    assert torch.equal(x, y) and x.isfinite().all(), name
            short = module.itm(image[1:2], words[1:2, :3], None, mask[1:2])
            torch.testing.assert_close(module.itm(image, words, WORDS, mask)[1:2], short, rtol=1e-5, atol=1e-5)


def test_generation_is_the_language_head_over_causal_words():
    image, words = torch.randn(2, 7, V), ids(2)
    module = models(TEXT)[1]
    with torch.no_grad():
        x = module.encode(None, image, words, pattern="causal")[:, Q:]
        head = module.lm_head
        x = nn.functional.layer_norm(nn.functional.gelu(head.dense(x)), (C,), head.LayerNorm.weight,
                                     head.LayerNorm.bias, 1e-12)  # fmt: skip
        logits = x @ module.embeddings.word_embeddings.weight.T + head.bias
        out = module.itg(image, words)
        assert out.shape == (2, N, 15)
        torch.testing.assert_close(out, logits, rtol=1e-5, atol=1e-5)


def test_names_are_those_of_transformers():
    names = set(plain_models.QFormer(SMALL).state_dict())
    for part in ("query_tokens", "layernorm.weight", "encoder.layer.0.crossattention.attention.key.weight",
                 "encoder.layer.0.crossattention.output.LayerNorm.bias",
                 "encoder.layer.1.attention.output.dense.weight",
                 "encoder.layer.1.attention.attention.query.bias",
                 "encoder.layer.1.intermediate_query.dense.weight",
                 "encoder.layer.1.output_query.LayerNorm.weight"):  # fmt: skip
        assert part in names
    assert not any(
        "layer.1.crossattention" in name or ".intermediate." in name or "embeddings" in name for name in names
    )


def test_accelerate_swaps_the_attentions():
    module = plain_models.QFormer(SMALL)
    report = hivilt.accelerate(module)
    assert [entry.path for entry in report.replaced] == [
        f"encoder.layer.{path}.attention" for path in ("0.attention", "0.crossattention", "1.attention")
    ]
    own = hivilt.models.QFormer(SMALL).encoder.layer[0].crossattention.attention
    assert type(own) is type(module.encoder.layer[0].crossattention.attention) is hivilt.nn.QFormerMultiHeadAttention


def test_compiles_without_a_break():
    module, (image, mask) = hivilt.models.QFormer({**SMALL, "num_hidden_layers": 1}).eval(), image_and_mask()
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(None, image, mask), module(None, image, mask), rtol=1e-5, atol=1e-5)


IMAGE = torch.randn(2, 7, V)


@pytest.mark.parametrize("call, argument, kind", [
    (lambda m: m(None, IMAGE[..., 1:]), "image", ValueError),
    (lambda m: m(None, IMAGE[0]), "image", ValueError),
    (lambda m: m(None, None), "image", TypeError),
    (lambda m: m(torch.randn(3, Q, C), IMAGE), "query", ValueError),
    (lambda m: m(torch.randn(2, Q, C + 1), IMAGE), "query", ValueError),
    (lambda m: m(None, IMAGE, torch.ones(2, 7)), "image_mask", TypeError),
    (lambda m: m(None, IMAGE, torch.ones(7, dtype=torch.bool)), "image_mask", ValueError),
    (lambda m: m.itm(IMAGE, torch.zeros(2, N + 1, dtype=torch.long)), "input_ids", ValueError),
    (lambda m: m.itm(IMAGE, torch.zeros(3, N, dtype=torch.long)), "input_ids", ValueError),
    (lambda m: m.itm(IMAGE, torch.zeros(2, N)), "input_ids", TypeError),
    (lambda m: m.itm(IMAGE, torch.zeros(2, N, dtype=torch.long), torch.ones(2, N)), "attention_mask", TypeError),
    (lambda m: m.itm(IMAGE, torch.full((2, N), 10**6)), "input_ids", ValueError),
    (lambda m: m.encode_text(torch.full((2, N), -1)), "input_ids", ValueError),
    (lambda m: type(m)({**TEXT, "use_qformer_text_input": 3}), "use_qformer_text_input", TypeError),
    (lambda m: m.encode(None, IMAGE, torch.zeros(2, N, dtype=torch.long), pattern="prefix"), "pattern", ValueError),
    (lambda m: type(m)({"hidden": 3}), "config", ValueError),
    (lambda m: type(m)([3]), "config", TypeError),
    (lambda m: type(m)(TEXT, objectives=("itc", "vqa")), "objectives", ValueError),
    (lambda m: type(m)(TEXT, objectives="itc"), "objectives", TypeError),
    (lambda m: type(m)({**TEXT, "num_attention_heads": 5}), "num_heads", ValueError),
    (lambda m: type(m)({**TEXT, "hidden_dropout_prob": -1.0}), "dropout", ValueError),
    (lambda m: type(m)({**SMALL, "num_query_tokens": 0})(None, IMAGE), "query", ValueError),
    (lambda m: type(m)(SMALL).encode_text(torch.zeros(2, N, dtype=torch.long)), "input_ids", ValueError),
    (lambda m: type(m)(SMALL).itc(IMAGE, torch.zeros(2, N, dtype=torch.long)), "itc", ValueError),
    (lambda m: m.encoder.layer[0](torch.randn(2, Q, C)), "image", TypeError),
    (lambda m: m.encoder.layer[0](torch.randn(2, Q, C), IMAGE, num_queries=Q + 1), "num_queries", ValueError),
    (lambda m: m.encoder.layer[0](torch.randn(2, Q, C), IMAGE, None, torch.ones(Q, Q)), "attn_mask", TypeError),
])  # fmt: skip
def test_bad_arguments(call, argument, kind):
    for cls in CLASSES:
        with pytest.raises(kind, match=rf"QFormer\w*: {argument}: expected .*; got "):
            call(cls(TEXT))
