"""Attention by name in Hugging Face transformers: tiny random models, "hivilt" against "sdpa", "hivilt_topk" dense."""

import fresh
import pytest
import torch

import hivilt
from hivilt.integrations import hf

try:
    import transformers
except ImportError:
    transformers = None
needs_transformers = pytest.mark.skipif(transformers is None, reason="pip install 'hivilt[hf]'")

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
PIXELS = (2, 3, 32, 32)


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    return transformers.LlamaModel(config), {"input_ids": torch.randint(1, 50, (2, 12))}


def padded_llama():
    model, call = llama()
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[0, :3] = 0
    return model, {**call, "attention_mask": padding}


def clip_image():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE)), {"pixel_values": torch.randn(PIXELS)}


def clip_text():
    model, call = padded_llama()
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**TEXT, "eos_token_id": 49}))
    return model, {**call, "attention_mask": call["attention_mask"].flip(1)}


def deit():
    return transformers.DeiTModel(transformers.DeiTConfig(**IMAGE)), {"pixel_values": torch.randn(PIXELS)}


def bert():
    _, call = padded_llama()
    return transformers.BertModel(transformers.BertConfig(**TEXT)), call


def q_former():
    """Self-attention of learned queries and cross-attention to the patches of an image, some of them padding."""
    config = transformers.Blip2QFormerConfig(**TEXT, encoder_hidden_size=48)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    return transformers.Blip2QFormerModel(config), {
        "query_embeds": torch.randn(1, 6, 64),
        "encoder_hidden_states": torch.randn(2, 20, 48),
        "encoder_attention_mask": mask,
    }


def swin():
    """Windows of 4 x 4 in grids of 10, padded to 12 and shifted: the position bias and the mask come as one."""
    sizes = {"image_size": 40, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
    model = transformers.SwinModel(transformers.SwinConfig(**sizes, window_size=4))
    return model, {"pixel_values": torch.randn(2, 3, 40, 40)}


def dinov2():
    return transformers.Dinov2Model(transformers.Dinov2Config(**IMAGE)), {"pixel_values": torch.randn(PIXELS)}


def dinov2_with_registers():
    config = transformers.Dinov2WithRegistersConfig(**IMAGE, num_register_tokens=3)
    return transformers.Dinov2WithRegistersModel(config), {"pixel_values": torch.randn(PIXELS)}


MODELS = [llama, padded_llama, clip_image, clip_text, deit, bert, q_former, swin, dinov2, dinov2_with_registers]


def build(make):
    """Model and call; nothing zero, where ties and the derivative of a normalised zero would be arbitrary."""
    model, call = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), call


def hidden(model, name, call):
    model.set_attn_implementation(name)
    return model(**call).last_hidden_state


@needs_transformers
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_dense_equals_sdpa(make):
    hf.register(topk=1000)
    model, call = build(make)
    grads = []
    for name in ("sdpa", hf.DENSE, hf.TOPK):
        model.zero_grad()
        out = hidden(model, name, call)
        out.square().mean().backward()
        grads.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert hivilt.last_backend() is not None
    for other in grads[1:]:
        for a, b in zip(other, grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_transformers
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_dense_equals_what_is_written_out(make):
    hf.register(topk=1000)
    model, call = build(make)
    tokens = call.get("attention_mask", torch.ones(1)).bool()
    with torch.no_grad():
        expected, *others = (hidden(model, name, call) for name in ("eager", hf.DENSE, hf.TOPK))
    for other in others:
        # Rows of padding, on the left, see nothing: what is written out gives them the mean of everything.
        a, b = (other[tokens], expected[tokens]) if tokens.dim() == 2 else (other, expected)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_transformers
def test_an_image_without_a_valid_token_gives_no_attention():
    """Written-out attention gives the mean of what is masked there, which is the only case where the two differ."""
    hf.register(topk=1000)
    model, call = build(q_former)
    call["encoder_attention_mask"][0] = 0
    with torch.no_grad():
        out = {name: hidden(model, name, call) for name in ("eager", hf.DENSE, hf.TOPK)}
        for layer in model.encoder.layer:
            if layer.has_cross_attention:
                layer.crossattention.attention.value.weight.zero_()
                layer.crossattention.attention.value.bias.zero_()
        expected = hidden(model, "eager", call)
    for name in (hf.DENSE, hf.TOPK):
        torch.testing.assert_close(out[name][0], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[name][1], out["eager"][1], rtol=1e-4, atol=1e-5)
    assert (out["eager"][0] - expected[0]).abs().max() > 1e-2


@needs_transformers
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_topk_is_a_top_k_attention(make, monkeypatch):
    """The layers' own calls again, in float64, with torch.topk."""
    hf.register(topk=3)
    model, call = build(make)
    seen = []

    def recorded(query, key, value, topk, *, axis, attn_mask, scale, dropout_p):
        out = original(query, key, value, topk, axis=axis, attn_mask=attn_mask, scale=scale, dropout_p=dropout_p)
        seen.append((query, key, value, attn_mask, scale, out))
        return out

    original = hf.topk_attention
    monkeypatch.setattr(hf, "topk_attention", recorded)
    with torch.no_grad():
        hidden(model, hf.TOPK, call)
    assert len(seen) >= 2
    for query, key, value, mask, scale, out in seen:
        groups = query.shape[1] // key.shape[1]
        k, v = (x.double().repeat_interleave(groups, 1) for x in (key, value))
        s = query.double() @ k.mT * scale
        if mask is not None:
            s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
        s = s.masked_fill(s < s.topk(min(3, s.shape[-1]), -1).values[..., -1:], -torch.inf)
        torch.testing.assert_close(out.double(), s.softmax(-1).nan_to_num(0.0) @ v, rtol=1e-4, atol=1e-5)


@needs_transformers
def test_generation_with_a_cache():
    hf.register(topk=4)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(1, 50, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    tokens = []
    for name in ("sdpa", hf.DENSE):
        model.set_attn_implementation(name)
        tokens.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
    assert torch.equal(*tokens)


@needs_transformers
def test_dropout_reaches_the_operator():
    hf.register(topk=4)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, attention_dropout=0.5)
    model, call = transformers.LlamaModel(config), llama()[1]
    for name in (hf.DENSE, hf.TOPK):
        assert not torch.equal(hidden(model.train(), name, call), hidden(model, name, call))
        assert torch.equal(hidden(model.eval(), name, call), hidden(model, name, call))


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("biased", [False, True])
def test_position_bias_and_masks(mask, biased):
    """What T5 and Swin like models pass."""
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16)
    keep = torch.rand(2, 1, 5, 7) < 0.7
    keep[..., 0] = True
    masks = {"none": None, "bool": keep, "float": torch.where(keep, 0.0, torch.finfo(torch.float32).min)}
    bias = torch.randn(1, 4, 5, 7) if biased else None
    module = torch.nn.Module()
    out, weights = hf.attention_forward(None)(
        module, query, key, key, masks[mask], scaling=0.3, is_causal=False, position_bias=bias
    )
    total = torch.zeros(2, 4, 5, 7) if bias is None else bias.expand(2, 4, 5, 7)
    if mask != "none":
        total = total.masked_fill(~keep, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, total, scale=0.3, enable_gqa=True)
    assert weights is None and out.shape == (2, 5, 4, 16) and out.is_contiguous()
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_what_would_change_the_scores_is_refused():
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="softcap: expected None"):
        hf.attention_forward(None)(torch.nn.Module(), x, x, x, None, softcap=30.0)


@pytest.mark.parametrize("topk, kind", [(0, ValueError), (None, TypeError), ("8", TypeError), (1.0, TypeError)])
def test_bad_options_are_refused(topk, kind):
    with pytest.raises(kind, match="topk"):
        hf.register(topk)


def test_without_transformers_the_error_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import hivilt.integrations.hf as hf; hf.register()"
    run = fresh.run(code)
    assert run.returncode == 1 and "ImportError" in run.stderr and "pip install 'hivilt[hf]'" in run.stderr
