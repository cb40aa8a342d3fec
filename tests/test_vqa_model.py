"""VQAFusionModel over Hugging Face encoders with random weights: values, prefixes, padding, what learns, bad calls."""

import re

import pytest
import torch
from torch import nn

import hivilt.models
from hivilt.reference import models as plain
from hivilt.reference.modules import MultimodalFusion

ROOMS = [pytest.param(plain, id="plain"), pytest.param(hivilt.models, id="hivilt")]
B, T, C, ANSWERS = 3, 6, 16, 7
LENGTHS = [6, 3, 1]


def dinov2(registers=0):
    transformers = pytest.importorskip("transformers", reason="pip install 'hivilt[hf]'")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        return transformers.Dinov2WithRegistersModel(config)
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def llama():
    transformers = pytest.importorskip("transformers", reason="pip install 'hivilt[hf]'")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=C, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaModel(config)


def model(room, registers=0, image_to_text=True):
    torch.manual_seed(3)
    fusion = MultimodalFusion(C, 24, 4, 20, image_to_text=image_to_text, residual=True)
    return room.VQAFusionModel(dinov2(registers), llama(), fusion, ANSWERS)


def inputs():
    torch.manual_seed(4)
    words = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    ids = torch.where(words, torch.randint(40, (B, T)), -100)  # what padding holds need not be a word at all
    return torch.randn(B, 3, 56, 42), ids, words


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("registers", [0, 3])
def test_padded_batch_is_the_parts_one_by_one(room, registers):
    vqa, (images, ids, words) = model(room, registers), inputs()
    out = vqa(images, ids, words.long())
    assert out["logits"].shape == (B, ANSWERS) and torch.equal(out["mask"], words)
    for b in range(B):
        with torch.no_grad():
            patches = vqa.vision(images[b : b + 1]).last_hidden_state[
                :, 1 + registers :
            ]  # no class token, no registers
            tokens = vqa.text(ids[b : b + 1, : LENGTHS[b]]).last_hidden_state
        assert patches.shape[1] == 12
        fused, _ = vqa.fusion(tokens, patches)
        torch.testing.assert_close(out["fused"][b, : LENGTHS[b]], fused[0], rtol=1e-4, atol=1e-5)
        logits = fused[0].mean(0) @ vqa.head.weight.T + vqa.head.bias
        torch.testing.assert_close(out["logits"][b], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("room", ROOMS)
def test_encoders_stay_frozen_and_all_the_rest_learns(room):
    vqa, (images, ids, words) = model(room), inputs()
    vqa.train()
    assert vqa.training and not vqa.vision.training and not vqa.text.training
    nn.functional.cross_entropy(vqa(images, ids, words)["logits"], torch.tensor([1, 2, 0])).backward()
    for name, p in vqa.named_parameters():
        frozen = name.startswith(("vision.", "text."))
        assert p.requires_grad != frozen and (p.grad is None) == frozen, name
        assert frozen or (p.grad.isfinite().all() and p.grad.abs().sum() > 0), name


def test_cached_features_give_the_same_bits():
    vqa, (images, ids, words) = model(hivilt.models), inputs()
    expected = vqa(images, ids, words)
    patches, tokens = vqa.encode_images(images), vqa.encode_text(ids, words)
    assert not patches.requires_grad and not tokens.requires_grad
    for cached in (vqa(patches, tokens, words), vqa(patches, ids, words), vqa(images, tokens, words)):
        assert all(torch.equal(cached[key], expected[key]) for key in expected)
    tokens[~words] = torch.nan
    alone = hivilt.models.VQAFusionModel(None, None, vqa.fusion, ANSWERS)
    alone.head = vqa.head
    assert torch.equal(alone(patches, tokens, words)["logits"], expected["logits"])


def test_both_rooms_agree_and_load_each_other_strictly():
    ours, theirs = model(hivilt.models), plain.VQAFusionModel(dinov2(), llama(), MultimodalFusion(
        C, 24, 4, 20, image_to_text=True, residual=True), ANSWERS)  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert type(ours.pool) is hivilt.nn.MaskedMeanPool and type(theirs.pool) is not type(ours.pool)
    images, ids, words = inputs()
    for key, x in ours(images, ids, words).items():
        torch.testing.assert_close(x, theirs(images, ids, words)[key], rtol=1e-5, atol=1e-6)


def test_a_question_without_words_and_a_hopeless_batch_stay_finite():
    vqa, (images, ids, words) = model(hivilt.models), inputs()
    words[1] = False
    out = vqa(images, ids, words)
    assert torch.equal(out["logits"][1], vqa.head.bias) and (out["fused"][1] == 0).all()
    out["logits"].sum().backward()
    assert all(p.grad.isfinite().all() for p in vqa.parameters() if p.requires_grad)


def test_the_number_of_dropped_tokens_can_be_said():
    class Tokens(nn.Module):
        def forward(self, images):
            return torch.arange(5.0)[None, :, None].expand(len(images), 5, 24)

    fusion = MultimodalFusion(C, 24, 4, 20)
    images = torch.zeros(2, 3, 8, 8)
    kept = [hivilt.models.VQAFusionModel(Tokens(), None, fusion, 2, prefix_tokens=n).encode_images(images)
            for n in (None, 0, 2)]  # fmt: skip
    assert [x[0, :, 0].tolist() for x in kept] == [[0, 1, 2, 3, 4]] * 2 + [[2, 3, 4]]


BAD = {
    "vision": (TypeError, "vision", lambda m: m.VQAFusionModel("dinov2", None, fusion(), 3)),
    "fusion": (TypeError, "fusion", lambda m: m.VQAFusionModel(None, None, None, 3)),
    "fusion-width": (TypeError, "fusion.text_embed_dim", lambda m: m.VQAFusionModel(None, None, nn.Linear(2, 2), 3)),
    "answers": (ValueError, "num_answers", lambda m: m.VQAFusionModel(None, None, fusion(), 0)),
    "prefix": (ValueError, "prefix_tokens", lambda m: m.VQAFusionModel(None, None, fusion(), 3, prefix_tokens=-1)),
    "prefix-kind": (TypeError, "prefix_tokens", lambda m: m.VQAFusionModel(None, None, fusion(), 3, prefix_tokens=1.0)),
    "images-rank": (ValueError, "images", lambda m: bare(m)(torch.zeros(2, 9), torch.zeros(2, 5, C))),
    "images-kind": (TypeError, "images", lambda m: bare(m)([1], torch.zeros(2, 5, C))),
    "no-vision": (ValueError, "images", lambda m: bare(m)(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, C))),
    "no-text": (ValueError, "input_ids", lambda m: bare(m)(torch.zeros(2, 9, 24), torch.zeros(2, 5).long())),
    "batch": (ValueError, "input_ids", lambda m: bare(m)(torch.zeros(2, 9, 24), torch.zeros(3, 5, C))),
    "ids-float": (TypeError, "input_ids", lambda m: bare(m, nn.Identity())(torch.zeros(2, 9, 24), torch.zeros(2, 5))),
    "text-width": (ValueError, "text_embeddings", lambda m: bare(m)(torch.zeros(2, 9, 24), torch.zeros(2, 5, C + 1))),
    "mask": (
        ValueError, "attention_mask",
        lambda m: bare(m)(torch.zeros(2, 9, 24), torch.zeros(2, 5, C), torch.ones(2, 9).bool()),
    ),
}  # fmt: skip


def fusion():
    return MultimodalFusion(C, 24, 4, 20)


def bare(room, text=None):
    return room.VQAFusionModel(None, text, fusion(), 3)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(room, name):
    kind, argument, bad = BAD[name]
    with pytest.raises(kind, match=rf"(VQAFusionModel|MultimodalFusion): {re.escape(argument)}: expected .*; got "):
        bad(room)
