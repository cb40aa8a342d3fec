"""DeiT, Swin and their blocks beside their parity with transformers (test_hf_parity.py): names, gradients, errors."""

import copy

import pytest
import torch
from parity import check_twins, gradients_are_finite, kernels_at_any_size, twins  # noqa: F401

import hivilt
from hivilt.nn import _heads
from hivilt.reference import models as plain_models
from hivilt.reference import modules as plain
from hivilt.reference.modules.vision_block import DropPath

DEIT = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 40, "num_labels": 5}  # fmt: skip
SWIN = {"patch_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (3, 6), "window_size": 4, "num_labels": 5}


def stacked(module, images):
    out = module(images)
    return torch.stack(list(out.values())) if isinstance(out, dict) else out


@pytest.mark.parametrize("name, config, size", [
    ("DeiT", DEIT, (16, 16)), ("DeiT", DEIT, (24, 17)), ("SwinTransformer", SWIN, (20, 19)),
    ("SwinTransformer", {**SWIN, "use_absolute_embeddings": True, "image_size": 8, "num_labels": None}, (20, 12)),
], ids=["deit", "deit-resized", "swin", "swin-absolute"])  # fmt: skip
def test_the_twin_has_the_same_gradients(name, config, size):
    modules = twins(getattr(plain_models, name), getattr(hivilt.models, name), config)
    check_twins(*modules, stacked, [torch.randn(2, 3, *size)])


@pytest.mark.parametrize("name, config", [("DeiT", DEIT), ("SwinTransformer", SWIN)])
def test_a_training_step(name, config):
    """With every dropout on: another result each time, a gradient for each parameter, none in eval mode."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.2}
    module = getattr(hivilt.models, name)(config, **rates)
    images = torch.randn(2, 3, 16, 16)
    first = stacked(module, images)
    first.square().sum().backward()
    assert gradients_are_finite(module) and not torch.equal(first, stacked(module, images))
    module.eval()
    assert torch.equal(stacked(module, images), stacked(module, images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, config", [("DeiT", DEIT), ("SwinTransformer", SWIN)])
def test_half_types_and_autocast(name, config, dtype):
    """As near to float32 as a few roundings of the type; gradients finite."""
    module, images = getattr(hivilt.models, name)(config).eval(), torch.randn(2, 3, 20, 20)
    exact = stacked(module, images).detach()
    half = copy.deepcopy(module).to(dtype)
    with torch.autocast("cpu", dtype):
        mixed = stacked(module, images)
    for out, trained in ((mixed, module), (stacked(half, images.to(dtype)), half)):
        assert (out.float() - exact).norm() < 8 * 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * exact.norm()
        out.float().sum().backward()
        assert gradients_are_finite(trained)


def test_images_are_independent():
    for module in (hivilt.models.DeiT(DEIT).eval(), hivilt.models.SwinTransformer(SWIN).eval()):
        images = torch.randn(3, 3, 16, 16)
        with torch.no_grad():
            alone = torch.cat([stacked(module, x[None]) for x in images], -2)
            torch.testing.assert_close(stacked(module, images), alone, rtol=1e-5, atol=1e-5)


def test_answer_of_deit_is_the_mean_of_both_heads():
    out = hivilt.models.DeiT(DEIT).eval()(torch.randn(2, 3, 16, 16))
    assert list(out) == ["logits", "cls_logits", "distillation_logits"] and out["logits"].shape == (2, 5)
    torch.testing.assert_close(out["logits"], 0.5 * out["cls_logits"] + 0.5 * out["distillation_logits"])
    assert not torch.equal(out["cls_logits"], out["distillation_logits"])


def test_swin_halves_its_grid_and_doubles_its_channels():
    module = hivilt.models.SwinTransformer({**SWIN, "num_labels": None}).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 20, 17)  # grids of 10 x 9 and 5 x 5
        maps, tokens = module.features(images), module(images)
    assert [tuple(x.shape) for x in maps] == [(2, 12, 10, 9), (2, 24, 5, 5)]
    torch.testing.assert_close(tokens, module.norm(maps[1].flatten(2).transpose(1, 2)))


def test_names_are_those_of_the_papers_repositories():
    block = {f"{part}.{x}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for x in ("weight", "bias")}  # fmt: skip
    deit = {f"blocks.{i}.{name}" for i in range(2) for name in block} | {"cls_token", "dist_token", "pos_embed"}
    deit |= {f"{part}.{x}" for part in ("patch_embed.proj", "norm", "head", "head_dist") for x in ("weight", "bias")}
    assert set(hivilt.models.DeiT(DEIT).state_dict()) == deit
    swin = {f"layers.{i}.blocks.{j}.{name}" for i in range(2) for j in range(2)
            for name in (*block, "attn.relative_position_bias_table")}  # fmt: skip
    swin |= {f"{part}.{x}" for part in ("patch_embed.proj", "patch_embed.norm", "norm", "head")
             for x in ("weight", "bias")}  # fmt: skip
    swin |= {"layers.0.downsample.norm.weight", "layers.0.downsample.norm.bias", "layers.0.downsample.reduction.weight"}
    assert set(hivilt.models.SwinTransformer(SWIN).state_dict()) == swin


def test_accelerated_models_hold_twins_and_restore():
    for name, config, inner in (("DeiT", DEIT, "SelfAttention"), ("SwinTransformer", SWIN, "WindowAttention")):
        module = getattr(hivilt.models, name)(config)
        kinds = {type(m) for m in module.modules() if isinstance(m, getattr(plain, inner))}
        assert kinds == {getattr(hivilt.nn, inner)}
        copied = copy.deepcopy(module)
        assert len(hivilt.restore(copied)) in (2, 4)
        assert {type(m) for m in copied.modules() if isinstance(m, getattr(plain, inner))} == {getattr(plain, inner)}


@pytest.mark.parametrize(
    "name, config", [("DeiT", DEIT), ("SwinTransformer", {**SWIN, "depths": (2,), "num_heads": (3,)})]
)
def test_compiles_without_a_break(name, config):
    module, images = getattr(hivilt.models, name)(config).eval(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), module(images), rtol=1e-5, atol=1e-5)


def test_self_attention_is_torchs():
    reference, ours = twins(plain.SelfAttention, hivilt.nn.SelfAttention, 24, 3)
    torchs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    state = {"in_proj_weight": reference.qkv.weight, "in_proj_bias": reference.qkv.bias,
             "out_proj.weight": reference.proj.weight, "out_proj.bias": reference.proj.bias}  # fmt: skip
    torchs.load_state_dict(state)
    x = torch.randn(2, 7, 24)
    for module in (reference, ours):
        torch.testing.assert_close(module(x), torchs(x, x, x, need_weights=False)[0], rtol=1e-5, atol=1e-5)


def test_small_calls_are_torchs_own(monkeypatch):
    """Unless a backend is asked for."""
    monkeypatch.undo()
    seen = []
    kernel = _heads.dense_attention
    monkeypatch.setattr(_heads, "dense_attention", lambda *a, **k: seen.append(a[0].shape[2]) or kernel(*a, **k))
    module = hivilt.nn.SelfAttention(24, 3)
    for tokens in (63, 64, 65):
        module(torch.randn(1, tokens, 24))
    with hivilt.use_backend("reference"):
        module(torch.randn(1, 5, 24))
    assert seen == [64, 65, 5]


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    module, x = DropPath(0.25), torch.ones(4000, 2, 3)
    out = module(x)
    kept = out[:, 0, 0] > 0
    assert torch.equal(out, kept[:, None, None] / 0.75 * x) and 0.70 < kept.double().mean() < 0.80
    assert torch.equal(module.eval()(x), x) and (DropPath(1.0)(x) == 0).all() and torch.equal(DropPath(0.0)(x), x)


@pytest.mark.parametrize("call, name, argument, kind", [
    (lambda: hivilt.models.DeiT(DEIT)(torch.randn(3, 16, 16)), "DeiT", "images", ValueError),
    (lambda: hivilt.models.DeiT(DEIT)(torch.randn(1, 1, 16, 16)), "DeiT", "images", ValueError),
    (lambda: hivilt.models.DeiT(DEIT)(torch.randn(1, 3, 7, 16)), "DeiT", "images", ValueError),
    (lambda: hivilt.models.DeiT(DEIT)("cat"), "DeiT", "images", TypeError),
    (lambda: hivilt.models.DeiT({**DEIT, "depth": 3}), "DeiT", "config", ValueError),
    (lambda: hivilt.models.DeiT(3), "DeiT", "config", TypeError),
    (lambda: hivilt.models.DeiT({**DEIT, "patch_size": 32}), "DeiT", "patch_size", ValueError),
    (lambda: hivilt.models.DeiT({**DEIT, "num_labels": 0}), "DeiT", "num_labels", ValueError),
    (lambda: hivilt.models.DeiT({**DEIT, "hidden_act": "tanh"}), "DeiT", "hidden_act", ValueError),
    (lambda: hivilt.models.DeiT({**DEIT, "drop_path_rate": 2.0}), "DeiT", "drop_path_rate", ValueError),
    (lambda: hivilt.models.DeiT({**DEIT, "drop_path_rate": None}), "DeiT", "drop_path_rate", TypeError),
    (lambda: hivilt.models.DeiT({**DEIT, "layer_norm_eps": "1e-6"}), "DeiT", "layer_norm_eps", TypeError),
    (lambda: hivilt.models.DeiT({**DEIT, "layer_norm_eps": -1e-6}), "DeiT", "layer_norm_eps", ValueError),
    (lambda: hivilt.models.DeiT({**DEIT, "qkv_bias": 1}), "DeiT", "qkv_bias", TypeError),
    (lambda: hivilt.models.DeiT({**DEIT, "num_attention_heads": 7}), "DeiT", "num_attention_heads", ValueError),
    (lambda: hivilt.models.SwinTransformer(mlp_ratio="4"), "SwinTransformer", "mlp_ratio", TypeError),
    (lambda: hivilt.models.SwinTransformer(mlp_ratio=0.0), "SwinTransformer", "mlp_ratio", ValueError),
    (lambda: hivilt.models.SwinTransformer(drop_path_rate=-0.1), "SwinTransformer", "drop_path_rate", ValueError),
    (lambda: hivilt.models.SwinTransformer(hidden_act="tanh"), "SwinTransformer", "hidden_act", ValueError),
    (lambda: hivilt.models.SwinTransformer(qkv_bias="no"), "SwinTransformer", "qkv_bias", TypeError),
    (lambda: hivilt.models.SwinTransformer(use_absolute_embeddings="yes"), "SwinTransformer", "use_absolute_embeddings",
     TypeError),
    (lambda: hivilt.nn.VisionBlock(16, 4, eps=None), "VisionBlock", "eps", TypeError),
    (lambda: hivilt.nn.SelfAttention(16, 4, qkv_bias=0), "SelfAttention", "qkv_bias", TypeError),
    (lambda: hivilt.nn.WindowAttention(16, 4, 7, 0), "WindowAttention", "qkv_bias", TypeError),
    (lambda: hivilt.nn.QFormerLayer(16, 4, eps=-1.0), "QFormerLayer", "eps", ValueError),
    (lambda: hivilt.models.SwinTransformer(SWIN)(torch.randn(3, 16, 16)), "SwinTransformer", "images", ValueError),
    (lambda: hivilt.models.SwinTransformer(SWIN)(torch.randn(1, 3, 0, 16)), "SwinTransformer", "images", ValueError),
    (lambda: hivilt.models.SwinTransformer({**SWIN, "depths": 2}), "SwinTransformer", "depths", TypeError),
    (lambda: hivilt.models.SwinTransformer({**SWIN, "depths": ()}), "SwinTransformer", "depths", ValueError),
    (lambda: hivilt.models.SwinTransformer({**SWIN, "num_heads": (3,)}), "SwinTransformer", "num_heads", ValueError),
    (lambda: hivilt.models.SwinTransformer({**SWIN, "num_heads": (3, 5)}), "SwinBlock", "num_heads", ValueError),
    (lambda: hivilt.models.SwinTransformer({**SWIN, "window_size": 0}), "SwinTransformer", "window_size", ValueError),
    (lambda: hivilt.nn.SelfAttention(24, 3)(torch.randn(2, 7, 23)), "SelfAttention", "x", ValueError),
])  # fmt: skip
def test_bad_arguments(call, name, argument, kind):
    with pytest.raises(kind, match=rf"{name}: {argument}: expected .*; got "):
        call()
