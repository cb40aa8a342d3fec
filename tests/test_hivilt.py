"""HiViLT, plain and accelerated, against torch's own layers and formulas written out in float64, sample by sample and
without padding."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from plain_attention import close
from test_cross_modal_fusion import Kept, attention, global_truth, joined
from torch import nn

import hivilt
from hivilt import models as fast
from hivilt.reference import models as plain

B, SIDE, P, NT, C, H = 4, 12, 4, 5, 16, 2
NV = (SIDE // P) ** 2
ROOMS = pytest.mark.parametrize("room", [plain, fast], ids=["plain", "fast"])
CONFIG = {
    "hidden_dim": C,
    "num_heads": H,
    "num_classes": 3,
    "embed_dim": 8,
    "vision_config": {"image_size": SIDE, "patch_size": P, "hidden_dim": 12, "num_layers": 2, "num_heads": 3},
    "text_config": {"vocab_size": 20, "max_length": 8, "num_layers": 1},
}


def randomised(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.copy_(torch.rand_like(p) + 0.5 if name.endswith("weight") else 0.3 * torch.randn_like(p))
    return model


def build(room, **settings):
    torch.manual_seed(2)
    return randomised(room.HierarchicalViLTransformer(CONFIG, **settings)).eval()


def inputs():
    """(images, text, attention_mask, vision_mask): a whole pair, a padded one, one without text, one without image."""
    torch.manual_seed(4)
    images, text = torch.randn(B, 3, SIDE, SIDE), torch.randint(20, (B, NT))
    patches, words = torch.ones(B, NV, dtype=torch.bool), torch.ones(B, NT, dtype=torch.bool)
    patches[1, 5:], words[1, 3:], words[2], patches[3] = False, False, False, False
    return images, text, words, patches


def spoilt(images, text, words, patches):
    """The same call with NaN and impossible ids in what is masked."""
    pixels = patches.unflatten(1, (SIDE // P, SIDE // P)).repeat_interleave(P, 1).repeat_interleave(P, 2)
    return torch.where(pixels[:, None], images, math.nan), torch.where(words, text, -(10**9)), words, patches


# The truth.


def encoded(encoder, x):
    """Tokens [N, C] in float64 through torch's own layers with the same parameters."""
    for block in encoder.blocks:
        width, heads = block.mlp[0].out_features, block.attn.num_heads
        layer = nn.TransformerEncoderLayer(
            x.shape[1], heads, width, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
        names = {"attn": "self_attn", "mlp.0": "linear1", "mlp.3": "linear2", "norm1": "norm1", "norm2": "norm2"}
        state = {}
        for name, value in block.state_dict().items():
            start = next(n for n in names if name.startswith(n + "."))
            state[names[start] + name[len(start) :]] = value
        layer.load_state_dict(state, strict=True)
        x = layer(x[None])[0] if len(x) else x
    return F.layer_norm(x, x.shape[1:], encoder.norm.weight.double(), encoder.norm.bias.double())


def projected(layer, x):
    return x if isinstance(layer, nn.Identity) else x @ layer.weight.double().T + layer.bias.double()


def truth(model, images, text, words, patches):
    found = []
    for b in range(len(images)):
        embed = model.vision_encoder.patch_embed
        squares = images[b].double().unfold(1, P, P).unfold(2, P, P).permute(1, 2, 0, 3, 4).reshape(NV, -1)
        v = squares @ embed.projection.weight.double().flatten(1).T + embed.projection.bias.double()
        v = F.layer_norm(v, v.shape[1:], embed.norm.weight.double(), embed.norm.bias.double())
        v = encoded(model.vision_encoder, (v + embed.pos_embed[0].double())[patches[b]])
        t = model.text_encoder.token_embedding.weight.double()[text[b]]
        t = encoded(model.text_encoder, (t + model.text_encoder.position_embedding.weight[:NT].double())[words[b]])
        v, t = projected(model.vision_proj, v), projected(model.text_proj, t)
        fusion = model.local_fusion
        local = torch.cat(
            [
                v + joined(fusion, v, attention(fusion.v2t_attn, v, t)),
                t + joined(fusion, t, attention(fusion.t2v_attn, t, v)),
            ]
        )
        all_of = [torch.ones(1, len(x), dtype=torch.bool) for x in (v, t)]
        whole = {k: x[0] for k, x in global_truth(model.global_fusion, local[None], v[None], t[None], *all_of).items()}
        g = whole["fused_features"]
        pooled = sum(
            attention(model.cross_attention[name], g[None], x)[0]
            for name, x in (("text_to_vision", v), ("vision_to_text", t))
        )
        embeds = {}
        for name, head, x in (
            ("vision_embed", model.vision_head, whole["vision_pooled"]),
            ("text_embed", model.text_head, whole["text_pooled"]),
        ):
            y = x @ head.weight.double().T
            embeds[name] = y / y.norm() if y.norm() > 0 else y
        found.append(
            {
                "output": projected(model.output_proj, pooled),
                "vision_features": v.new_zeros(NV, C).masked_scatter(patches[b][:, None], v),
                "text_features": t.new_zeros(NT, C).masked_scatter(words[b][:, None], t),
                "local_fusion": t.new_zeros(NV + NT, C).masked_scatter(
                    torch.cat([patches[b], words[b]])[:, None], local
                ),
                "global_fusion": g,
                **embeds,
                "itm_logits": projected(model.itm_head, g),
                "pooled": pooled,
            }
        )
    return {name: torch.stack([x[name] for x in found]) for name in found[0]}


@ROOMS
def test_equals_its_formula(room):
    model = build(room)
    call = inputs()
    with torch.no_grad():
        expected = truth(model, *call)
        out = model(*spoilt(*call))
    assert list(out) == list(expected)
    for name, value in expected.items():
        close(out[name].double(), value)
    assert (out["text_embed"][2] == 0).all() and (out["vision_embed"][3] == 0).all()
    close(out["vision_embed"][:3].norm(dim=1), torch.ones(3))


@ROOMS
def test_options_reach_the_modules(room):
    settings = {"topk": 2, "axis": "queries", "select": "raw", "product": True, "input_norm": "layernorm"}
    model = build(room, **settings, pool_types=("max",), dropout=0.0)
    fusion = model.local_fusion
    assert (fusion.v2t_attn.topk, fusion.v2t_attn.axis, fusion.t2v_attn.select) == (2, "queries", "raw")
    assert fusion.product and fusion.input_norm == "layernorm"
    assert model.global_fusion.text_pool.pool_types == ("max",)
    assert model(*inputs())["output"].isfinite().all()


def loss_of(out):
    torch.manual_seed(8)
    return sum((out[name].float() * torch.randn_like(out[name].float())).sum() for name in sorted(out))


@ROOMS
def test_every_parameter_learns_whatever_the_padding_holds(room):
    """With pairs that lack text or image, NaN pixels and impossible ids."""
    model = build(room)
    grads = []
    for call in (inputs(), spoilt(*inputs())):
        model.zero_grad()
        loss_of(model(*call)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        no_shift = name.endswith("attn_pool.2.bias")  # a softmax does not know it
        assert grad.isfinite().all() and (no_shift or grad.abs().sum() > 0), name
        assert torch.equal(grad, grads[1][name]), name


@ROOMS
def test_a_padded_batch_is_its_pairs_one_by_one(room):
    """Outputs, and the sum of the gradients."""
    model = build(room)
    images, text, words, _ = inputs()
    weights = {name: torch.randn(1, x.shape[-1]) for name, x in model(images, text, words).items() if x.dim() == 2}

    def gradients(calls):
        model.zero_grad()
        outs = [model(*call) for call in calls]
        sum((out[name] * w).sum() for out in outs for name, w in weights.items()).backward()
        return {name: torch.cat([out[name] for out in outs]) for name in weights}, [p.grad for p in model.parameters()]

    out, grads = gradients([(images, text, words)])
    alone, of_alone = gradients([(images[b : b + 1], text[b : b + 1, words[b]]) for b in range(B)])
    for name in weights:
        close(out[name], alone[name])
    for a, b in zip(grads, of_alone, strict=True):
        close(a, b)


def test_fast_gradients_equal_plain():
    grads = []
    for room in (plain, fast):
        model = build(room)
        loss_of(model(*inputs())).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert list(grads[0]) == list(grads[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(
            grads[1][name], grad, rtol=1e-4, atol=1e-5 * max(1.0, float(grad.abs().max())), msg=name
        )


def test_twins_share_parameters_and_accelerate_makes_one_of_the_other():
    one, two = build(plain), build(fast)
    assert type(two).__mro__[1] is type(one) and list(one.state_dict()) == list(two.state_dict())
    two.load_state_dict(one.state_dict(), strict=True)
    one.load_state_dict(two.state_dict(), strict=True)
    call = inputs()
    expected, ours = one(*call), two(*call)
    kinds = [type(m) for m in one.modules()]
    report = hivilt.accelerate(one)
    assert report.skipped == [] and len(report.replaced) == 14
    assert all(torch.equal(x, ours[name]) for name, x in one(*call).items())
    hivilt.restore(one)
    assert kinds == [type(m) for m in one.modules()]
    assert all(torch.equal(x, expected[name]) for name, x in one(*call).items())


# Retrieval.


@ROOMS
def test_embeddings_have_seen_nothing_of_the_other_side(room):
    model = build(room)
    images, text, words, patches = inputs()
    out = model(images, text, words, patches)
    other = model(images, text.flip(0), words.flip(0), patches)
    assert torch.equal(out["vision_embed"], other["vision_embed"])
    assert not torch.equal(out["global_fusion"], other["global_fusion"])
    close(model.encode_images(images, patches), out["vision_embed"])
    close(model.encode_text(text, words), out["text_embed"])
    cosines = model.similarity(3 * out["vision_embed"], out["text_embed"])
    expected = F.cosine_similarity(out["vision_embed"][:, None], out["text_embed"][None], dim=-1)
    close(cosines, expected)
    assert (cosines[:, 2] == 0).all()


# Encoders of others, and images of other sizes.


class Patches(nn.Module):
    """A class token and patches of width 6, in an object as transformers has it."""

    def __init__(self):
        super().__init__()
        self.conv, self.token = nn.Conv2d(3, 6, P, P), nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, images):
        tokens = self.conv(images).flatten(2).mT
        return type("Output", (), {"last_hidden_state": torch.cat([self.token.expand(len(images), -1, -1), tokens], 1)})


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, C)

    def forward(self, input_ids, attention_mask=None):
        assert attention_mask is None or attention_mask.dtype == torch.int64
        return self.table(input_ids) + torch.where(input_ids == 0, math.nan, 0.0)[..., None]


@ROOMS
def test_encoders_may_be_injected(room):
    torch.manual_seed(1)
    encoders = {"vision_encoder": Patches(), "text_encoder": Words()}
    config = {**CONFIG, "vision_config": {"hidden_dim": 6, "prefix_tokens": 1}, "text_config": {"hidden_dim": C}}
    model = randomised(room.HierarchicalViLTransformer(config, **encoders)).eval()
    images, text, words, patches = inputs()
    text = text.clamp(min=1)  # the encoder gives NaN for padding
    out = model(images, text, words, patches)
    tokens = model.vision_proj(encoders["vision_encoder"](images).last_hidden_state[:, 1:])
    close(out["vision_features"], tokens * patches[..., None])
    close(out["text_features"][words], encoders["text_encoder"].table(text)[words])
    loss_of(out).backward()
    assert all(x.isfinite().all() for x in out.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (encoders["vision_encoder"].token.grad == 0).all()  # dropped in front
    model.prefix_tokens = 99
    with pytest.raises(ValueError, match="output of vision_encoder: expected at least the 99 prefix_tokens"):
        model(images, text)


@ROOMS
def test_other_image_sizes(room):
    """The position table is resized; what does not fill a patch is left out."""
    model = build(room)
    text = inputs()[1]
    images = torch.randn(B, 3, 22, 9)
    out = model(images, text)
    assert out["vision_features"].shape == (B, 10, C)
    assert torch.equal(model(images[..., :20, :8], text)["output"], out["output"])
    mask = torch.ones(B, 10, dtype=torch.bool)
    images[..., 20:, :] = math.nan
    assert torch.equal(model(images, text, vision_mask=mask)["output"], out["output"])


# Recipes.


@ROOMS
def test_checkpointing_gives_the_same_gradients_and_keeps_less(room):
    config = {**CONFIG, "dropout": 0.2}
    for name in ("vision_config", "text_config"):
        config[name] = {**config[name], "dropout": 0.2}
    results = []
    for use in (False, True):
        torch.manual_seed(2)
        model = room.HierarchicalViLTransformer(config, use_checkpointing=use).train()
        torch.manual_seed(9)
        kept = Kept()
        with kept:
            out = model(*inputs())
        loss_of(out).backward()
        results.append((out, [p.grad for p in model.parameters()], kept.numbers))
    (one, plainly, most), (two, again, least) = results
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(plainly, again, strict=True))
    assert least < 0.4 * most, (least, most)


@ROOMS
def test_autocast(room):
    model = build(room)
    call = inputs()
    expected = model(*call)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*call)
    loss_of(out).backward()
    assert out["vision_embed"].dtype == torch.float32 and out["output"].dtype == torch.bfloat16
    for name, value in expected.items():
        scale = float(value.detach().abs().max())
        assert float((out[name].float() - value).detach().abs().max()) < 0.06 * scale, name
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_the_recipe_of_the_documentation_learns():
    """bf16 autocast, checkpointing and clipping, as docs/models.md has it."""
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8").split("## HiViLT")[1]
    names = {}
    exec(text.split("```python")[1].split("```")[0], names)
    assert names["losses"][-1] < 0.8 * names["losses"][0] and all(map(math.isfinite, names["losses"]))


def test_compiles_in_one_graph():
    """In evaluation; training of each module behind is compiled where it is tested."""
    config = {**CONFIG, "vision_config": {**CONFIG["vision_config"], "num_layers": 1}}
    model = randomised(fast.HierarchicalViLTransformer(config)).eval().requires_grad_(False)
    call = inputs()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(*call)
    for name, value in model(*call).items():
        close(out[name], value)


@ROOMS
def test_copies_and_pickles(room):
    model = build(room)
    expected = model(*inputs())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert all(torch.equal(x, expected[name]) for name, x in twin(*inputs()).items())


X, IDS = torch.zeros(2, 3, SIDE, SIDE), torch.zeros(2, 3, dtype=torch.int64)


def changed(name, **more):
    return {**CONFIG, name: {**CONFIG[name], **more}}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_words_of_any_integer_type(dtype):
    encoder = plain.TextEncoder(20, 8, 16, 1, 2).eval()
    assert torch.equal(encoder(IDS.to(dtype)), encoder(IDS))


BAD = {
    "no-hidden_dim": (lambda m: m({"num_heads": 2}), ValueError, "hidden_dim: expected"),
    "unknown": (lambda m: m(CONFIG, num_layer=2), ValueError, "got 'num_layer'"),
    "unknown-vision": (lambda m: m(changed("vision_config", depth=2)), ValueError, "vision_config.*got 'depth'"),
    "unknown-text": (lambda m: m(changed("text_config", depth=2)), ValueError, "text_config.*got 'depth'"),
    "config": (lambda m: m([C]), TypeError, "config: expected a dict"),
    "vision_config": (lambda m: m(CONFIG, vision_config=3), TypeError, "vision_config.*expected a dict"),
    "num_heads": (lambda m: m(CONFIG, num_heads=3), ValueError, "num_heads: expected a divisor"),
    "num_classes": (lambda m: m(CONFIG, num_classes=0), ValueError, "num_classes"),
    "embed_dim": (lambda m: m(CONFIG, embed_dim="8"), TypeError, "embed_dim"),
    "checkpointing": (lambda m: m(CONFIG, use_checkpointing=1), TypeError, "use_checkpointing"),
    "patch": (lambda m: m(changed("vision_config", patch_size=13)), ValueError, "image_size: expected at least"),
    "layers": (lambda m: m(changed("text_config", num_layers=0)), ValueError, "num_layers"),
    "mlp_ratio": (lambda m: m(changed("text_config", mlp_ratio=0)), ValueError, "mlp_ratio"),
    "encoder": (lambda m: m(CONFIG, vision_encoder=print), TypeError, "vision_encoder"),
    "encoder-width": (lambda m: m(CONFIG, text_config=None, text_encoder=Words()), ValueError, "hidden_dim"),
    "encoder-gives": (
        lambda m: m(CONFIG, text_config={"hidden_dim": 8}, text_encoder=Words())(X, IDS),
        ValueError,
        "output of text_encoder: expected 8 channels",
    ),
    "images": (lambda m: m(CONFIG)(X[0], IDS), ValueError, "images: expected 4 dimensions"),
    "images-type": (lambda m: m(CONFIG)(None, IDS), TypeError, "images"),
    "channels": (lambda m: m(CONFIG)(X[:, :2], IDS), ValueError, "3 channels"),
    "text": (lambda m: m(CONFIG)(X, IDS.float()), TypeError, "text: expected a tensor of integers"),
    "text-rank": (lambda m: m(CONFIG)(X, IDS[0]), ValueError, "text"),
    "text-long": (lambda m: m(CONFIG)(X, IDS.repeat(1, 3)), ValueError, "at most max_length = 8"),
    "text-words": (lambda m: m(CONFIG)(X, IDS + 20), ValueError, "input_ids: expected values from 0 to 19"),
    "text-negative": (lambda m: m(CONFIG)(X, -1 - IDS), ValueError, "input_ids: expected values from 0 to 19"),
    "batch": (lambda m: m(CONFIG)(X, IDS[:1]), ValueError, "text: expected the batch of images"),
    "attention_mask": (lambda m: m(CONFIG)(X, IDS, IDS.float()), TypeError, "attention_mask"),
    "attention_mask-shape": (lambda m: m(CONFIG)(X, IDS, IDS[:, 1:]), ValueError, "attention_mask"),
    "vision_mask": (lambda m: m(CONFIG)(X, IDS, None, IDS), ValueError, r"mask: expected shape \(2, 9\)"),
    "similarity": (lambda m: m.similarity(X[0, 0], X[0, 0, :, 1:]), ValueError, "text_embed"),
}


@ROOMS
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(room, case):
    make, kind, text = BAD[case]
    with pytest.raises(kind, match=text) as caught:
        make(room.HierarchicalViLTransformer)
    assert "expected" in str(caught.value) and "got" in str(caught.value)
