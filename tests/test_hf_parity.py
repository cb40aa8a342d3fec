"""X.from_hf against Hugging Face: tiny models with random weights, outputs and all gradients, judged in float64."""

import copy

import pytest
import torch
from parity import check_parity, kernels_at_any_size, randomise  # noqa: F401

import hivilt
from hivilt.reference import models as plain_models
from hivilt.reference import modules as plain

transformers = pytest.importorskip("transformers", reason="pip install 'hivilt[hf]'")
from transformers.models.blip_2.modeling_blip_2 import Blip2ForImageTextRetrieval  # noqa: E402
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer  # noqa: E402
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler  # noqa: E402

TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
Q_FORMER = {**TEXT, "encoder_hidden_size": 40, "vocab_size": 30, "max_position_embeddings": 16}
IMAGE = {"image_size": 24, "patch_size": 8, **TEXT}
SWIN = {"image_size": 40, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def made(model):
    """Random, without a zero gate or bias, and with the attention that is written out: the one to be compared with."""
    randomise(model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model.eval()


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.long)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_q_former(queries, masked):
    """Layers with and without cross-attention; queries of one row serve the whole batch."""
    hf = made(transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**Q_FORMER)))
    mask = mask_of([1] * 9, [0] + [1] * 5 + [0] * 3) if masked else None

    def theirs(model, query, image):
        return model(query, encoder_hidden_states=image, encoder_attention_mask=mask).last_hidden_state

    classes = plain_models.QFormer, hivilt.models.QFormer
    inputs = torch.randn(queries, 5, 48), torch.randn(2, 9, 40)
    check_parity(hf, theirs, classes, lambda m, query, image: m(query, image, mask), inputs)


def retrieval():
    config = transformers.Blip2Config(
        vision_config={**IMAGE, "hidden_size": 40}, qformer_config={**Q_FORMER, "use_qformer_text_input": True},
        text_config={"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        num_query_tokens=5, image_text_hidden_size=12,
    )  # fmt: skip
    model = made(Blip2ForImageTextRetrieval(config))
    assert model.qformer.config._attn_implementation == "eager"
    return model


def test_image_text_contrast_and_matching():
    hf = retrieval()
    images, ids = torch.randn(3, 3, 24, 24), torch.randint(1, 30, (3, 6))
    words = mask_of([1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5)
    with torch.no_grad():
        contrast = hf(images, ids, words)
        matching = hf(images, ids, words, use_image_text_matching_head=True)
        tokens = hf.vision_model(images).last_hidden_state
        for cls in (plain_models.QFormer, hivilt.models.QFormer):
            ours = cls.from_hf(hf)
            assert ours.query_tokens is hf.query_tokens and ours.objectives == ("itc", "itm")
            found, text = ours.itc(tokens, ids, words)
            torch.testing.assert_close(found, contrast.image_embeds, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(text, contrast.text_embeds, rtol=1e-5, atol=1e-5)
            best = (found @ text.T).amax(1)
            torch.testing.assert_close(best, contrast.logits_per_image, rtol=1e-5, atol=1e-5)
            logits = ours.itm(tokens, ids, words)
            torch.testing.assert_close(logits.mean(1), matching.logits_per_image, rtol=1e-5, atol=1e-5)
            with pytest.raises(ValueError, match="objective 'itg'"):
                ours.itg(tokens, ids, words)


@pytest.mark.parametrize("size", [40, 32, (27, 50)], ids=str)
def test_swin(size):
    """Grids of 10 (padded to 12, shifted), then 5 (padded to 8, shifted); of 8 and 4 (nothing shifts); and 7 x 13."""
    hf = made(transformers.SwinModel(transformers.SwinConfig(**SWIN)))
    height, width = size if isinstance(size, tuple) else (size, size)
    inputs = (torch.randn(2, 3, height, width),)
    classes = plain_models.SwinTransformer, hivilt.models.SwinTransformer
    check_parity(hf, lambda m, x: m(x).last_hidden_state, classes, lambda m, x: m(x), inputs)


def test_swin_classifier_and_absolute_positions():
    config = transformers.SwinConfig(**SWIN, use_absolute_embeddings=True, num_labels=5, hidden_act="relu")
    hf = made(transformers.SwinForImageClassification(config))
    classes = plain_models.SwinTransformer, hivilt.models.SwinTransformer
    check_parity(hf, lambda m, x: m(x).logits, classes, lambda m, x: m(x), (torch.randn(2, 3, 40, 40),))
    images = torch.randn(1, 3, 48, 56)
    with torch.no_grad():
        expected = hf(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(plain_models.SwinTransformer.from_hf(hf)(images), expected, rtol=1e-5, atol=1e-5)


def test_swin_features():
    hf = made(transformers.SwinBackbone(transformers.SwinConfig(**SWIN, out_features=["stage1", "stage2"]))).swin
    images = torch.randn(1, 3, 40, 40)
    ours = hivilt.models.SwinTransformer.from_hf(hf)
    with torch.no_grad():
        maps = hf(images, output_hidden_states=True, output_hidden_states_before_downsampling=True)
        for own, theirs in zip(ours.features(images), maps.reshaped_hidden_states[1:], strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def test_deit():
    config = transformers.DeiTConfig(**IMAGE, num_labels=7)
    hf = made(transformers.DeiTForImageClassificationWithTeacher(config))
    classes = plain_models.DeiT, hivilt.models.DeiT

    def theirs(model, images):
        out = model(images)
        return torch.stack([out.logits, out.cls_logits, 2 * out.distillation_logits])

    def ours(model, images):
        out = model(images)
        assert list(out) == ["logits", "cls_logits", "distillation_logits"]
        return torch.stack([out["logits"], out["cls_logits"], 2 * out["distillation_logits"]])

    check_parity(hf, theirs, classes, ours, (torch.randn(2, 3, 24, 24),))
    larger = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        expected = hf(larger, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(plain_models.DeiT.from_hf(hf)(larger)["logits"], expected, rtol=1e-5, atol=1e-5)


IDEFICS = {"vocab_size": 20, "additional_vocab_size": 0, "hidden_size": 48, "intermediate_size": 64,
           "num_attention_heads": 4, "num_hidden_layers": 1}  # fmt: skip


def idefics(**options):
    config = transformers.IdeficsConfig(
        **IDEFICS, vision_config={"embed_dim": 32, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
                                  "num_hidden_layers": 1, "intermediate_size": 32}, **options,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("options", [{}, {"qk_layer_norms": True, "alpha_type": "vector"}], ids=["plain", "normed"])
def test_gated_cross_attention(options):
    """Gates are not 0; the third token reads no image, the others one or both."""
    hf = made(IdeficsGatedCrossAttentionLayer(idefics(**options), layer_idx=0))
    assert all(float(p.detach().abs().min()) > 1e-4 for p in (hf.alpha_cross_attn, hf.alpha_dense))
    pairs = torch.zeros(2, 7, 3, dtype=torch.bool)
    pairs[:, 0, :], pairs[0, 1:, 1], pairs[1, 1:, 2], pairs[:, 4, 0] = True, True, True, True
    pairs[:, 2] = False
    bias = torch.where(pairs.repeat_interleave(5, 2), 0.0, torch.finfo(torch.float32).min)[:, None]

    def theirs(model, x, media):
        return model(x, None, media.flatten(1, 2), bias.to(x.dtype), pairs.any(2).to(x.dtype))

    classes = plain.GatedCrossAttentionBlock, hivilt.nn.GatedCrossAttentionBlock
    inputs = torch.randn(2, 7, 48), torch.randn(2, 3, 5, 32)
    check_parity(hf, theirs, classes, lambda m, x, media: m(x, media, attn_mask=pairs), inputs)


@pytest.mark.parametrize("normed", [False, True])
def test_perceiver_resampler(normed):
    config = idefics(perceiver_config={"qk_layer_norms_perceiver": normed})
    hf = made(IdeficsPerceiverResampler(config, 32, 2, 4, 8, 6))
    classes = plain.PerceiverResampler, hivilt.nn.PerceiverResampler
    check_parity(hf, lambda m, x: m(x), classes, lambda m, x: m(x), (torch.randn(2, 11, 32),))


@pytest.mark.parametrize("cls, name", [
    (hivilt.models.QFormer, "Blip2QFormerModel"), (hivilt.models.SwinTransformer, "SwinModel"),
    (hivilt.models.DeiT, "DeiTForImageClassificationWithTeacher"),
    (hivilt.nn.PerceiverResampler, "IdeficsPerceiverResampler"),
    (hivilt.nn.GatedCrossAttentionBlock, "IdeficsGatedCrossAttentionLayer"),
], ids=lambda x: x if isinstance(x, str) else x.__name__)  # fmt: skip
def test_another_module_is_refused(cls, name):
    for other in (torch.nn.Linear(2, 2), None, type(name, (torch.nn.Module,), {})()):
        with pytest.raises(TypeError, match=rf"{cls.__name__}\.from_hf: module: expected a {name}"):
            cls.from_hf(other)


def test_accelerate_says_what_takes_the_place():
    resampler = IdeficsPerceiverResampler(idefics(), 32, 1, 4, 8, 6)
    model = torch.nn.ModuleDict({
        "q_former": transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**Q_FORMER)), "resampler": resampler,
    })  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    report = hivilt.accelerate(model)
    reasons = {entry.path: entry.reason for entry in report.skipped}
    assert report.replaced == [] and list(reasons) == ["q_former", "resampler"]
    assert "hivilt.models.QFormer.from_hf" in reasons["q_former"] and "hf.register()" in reasons["q_former"]
    assert "hivilt.nn.PerceiverResampler.from_hf" in reasons["resampler"] and "register" not in reasons["resampler"]
    assert list(before) == list(model.state_dict())


@pytest.mark.parametrize("registers", [0, 3])
def test_patches_of_dinov2_are_what_follows_class_token_and_registers(registers):
    """Each patch token changes with its own patch alone, when attention is taken out of the way."""
    size = {**TEXT, "image_size": 56, "patch_size": 14, "num_hidden_layers": 0}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**size, num_register_tokens=registers)
        encoder = transformers.Dinov2WithRegistersModel(config)
    else:
        encoder = transformers.Dinov2Model(transformers.Dinov2Config(**size))
    model = hivilt.models.VQAFusionModel(made(encoder), None, hivilt.nn.MultimodalFusion(16, 48, 4, 16), 3)
    images = torch.randn(1, 3, 56, 42)
    changed = images.clone()
    changed[:, :, 14:28, 28:42] += 1.0  # the patch in row 1, column 2 of 4 x 3
    with torch.no_grad():
        assert encoder(images).last_hidden_state.shape[1] == 1 + registers + 12
        one, other = model.encode_images(images), model.encode_images(changed)
    assert one.shape == (1, 12, 48)
    assert ((one - other).abs().amax(-1) > 0)[0].nonzero().flatten().tolist() == [1 * 3 + 2]
