"""HiViT, plain and accelerated, against the whole model written out in torch's functions on its state_dict."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from multi_scale import as_exact, kernels_on_cpu

import hivilt
from hivilt import models as fast
from hivilt.reference import models as plain
from hivilt.reference.models import hivit

BACKENDS = ["reference", "auto", "cpu"] if kernels_on_cpu() else ["reference"]
TINY = {
    "image_size": 32, "patch_size": 4, "hidden_dim": 16, "num_heads": 4, "num_layers": 2, "num_classes": 5,
    "mlp_ratio": 2.0, "bank_size": 12, "bank_topk": 3, "dropout": 0.0, "drop_path_rate": 0.0,
}  # fmt: skip
OPTIONS = {
    "as-it-is": {},
    "one-scale": {"num_scales": 1, "fusion_layers": 1},
    "two-scales-bank": {"num_scales": 2, "use_bank": "residual"},
    "four-scales-mean": {"hidden_dim": 32, "num_scales": 4, "aggregate": "mean", "fusion_layers": 3},
    "attention": {"cross_scale": "attention"},
    "no-positions": {"pos_embed": False, "num_layers": 1},
}
pytestmark = pytest.mark.filterwarnings("ignore:hivilt. .*HiViT. images of:UserWarning")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with hivilt.use_backend(request.param):
        yield request.param


def build(room, name="HiViT", **options):
    torch.manual_seed(3)
    model = getattr(room, name)(TINY, **options)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() < 2 and key != "bank_gain":
                p.copy_(torch.rand_like(p) + 0.5 if key.endswith("weight") else 0.3 * torch.randn_like(p))
    return model.eval()


def images(height=32, width=32, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, dtype=dtype)


def by_hand(w, c, x, mask=None, active=None):
    """logits, features and the tokens of every scale, from a state_dict and a config, by torch's functions alone."""
    C, S, P, heads = c["hidden_dim"], c["num_scales"], c["patch_size"], c["num_heads"]
    active = active or S
    widths = [C >> s for s in range(active)]
    grids = [(x.shape[2] // (P << s), x.shape[3] // (P << s)) for s in range(active)]
    size = c["image_size"] if isinstance(c["image_size"], tuple) else (c["image_size"],) * 2

    def linear(t, name):
        return F.linear(t, w[name + ".weight"], w[name + ".bias"])

    def norm(t, name):
        return F.layer_norm(t, t.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    def maps(t, grid):
        return t.transpose(1, 2).unflatten(2, grid)

    def attend(q, k, v, keep, rows):
        q, k, v = (t.unflatten(-1, (heads, C // heads)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(C // heads)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], -1e300)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out if rows is None else out * rows[..., None]

    masks = None
    if mask is not None:
        fine = mask.unflatten(1, grids[0])
        masks = [F.adaptive_max_pool2d(fine[:, None].double(), g).flatten(1) > 0 for g in grids]
        x = x.clone()
        for b in range(x.shape[0]):
            for i in range(grids[0][0]):
                for j in range(grids[0][1]):
                    if not fine[b, i, j]:
                        x[b, :, i * P : i * P + P, j * P : j * P + P] = 0.0

    def hide(tokens):
        return tokens if masks is None else [t * m[..., None] for t, m in zip(tokens, masks, strict=True)]

    tokens = []
    for s in range(active):
        name, side = f"patch_embeddings.scale_{s}", P << s
        t = F.conv2d(x, w[name + ".projection.weight"], w[name + ".projection.bias"], stride=side).flatten(2).mT
        t = norm(t, name + ".norm")
        if c["pos_embed"]:
            table = maps(w[name + ".pos_embed"], (size[0] // side, size[1] // side))
            t = t + F.interpolate(table, size=grids[s], mode="bilinear", align_corners=False).flatten(2).mT
        tokens.append(t)
    tokens = hide(tokens)
    for layer in range(c["num_layers"]):
        block = f"blocks.{layer}"
        found = []
        for s, t in enumerate(tokens):
            name, keep = f"attention_blocks.{layer}", None if masks is None else masks[s]
            t = hide_one(norm(t, f"{block}.norms1.{s}"), keep)
            q, k, v = linear(t, f"{name}.qkv_projections.{s}").chunk(3, -1)
            found.append(linear(attend(q, k, v, keep, keep), f"{name}.projs.{s}"))
        tokens = hide([t + f for t, f in zip(tokens, found, strict=True)])
        name = f"fusion_layers.{layer}"
        if c["cross_scale"] == "fusion":
            fine = [
                F.interpolate(maps(t, g), size=grids[0], mode="bilinear", align_corners=False).flatten(2).mT
                for t, g in zip(tokens, grids, strict=True)
            ]
            wide = torch.cat(fine, -1)
            weight = w[name + ".fusion.0.weight"][:, : sum(widths)]
            fused = F.gelu(norm(F.linear(wide, weight, w[name + ".fusion.0.bias"]), name + ".fusion.1"))
        elif active == 1:
            fused = tokens[0]
        else:
            normed = [hide_one(t, None if masks is None else masks[s]) for s, t in enumerate(tokens)]
            normed = [norm(t, f"{name}.norms.{s}") for s, t in enumerate(normed)]
            kv = torch.cat([linear(t, f"{name}.kv_projections.{s}") for s, t in enumerate(normed[1:])], 1)
            keep = None if masks is None else torch.cat(masks[1:], 1)
            out = attend(
                linear(normed[0], name + ".q_proj"), *kv.chunk(2, -1), keep, None if masks is None else masks[0]
            )
            fused = tokens[0] + linear(out, name + ".out_proj")
        for deep in range(c["fusion_layers"] - 1):
            name = f"deeper_fusions.{layer}.{deep}.fusion"
            fused = F.gelu(norm(linear(fused, name + ".0"), name + ".1"))
        found = []
        for s, grid in enumerate(grids):
            kept = torch.ones_like(fused[..., :1]) if masks is None else masks[0][..., None].to(fused)
            share = F.adaptive_avg_pool2d(maps(fused * kept, grids[0]), grid)
            share = share / F.adaptive_avg_pool2d(maps(kept, grids[0]), grid).clamp(min=1e-12)
            found.append(linear(share.flatten(2).mT, f"{block}.extraction.projs.{s}"))
        tokens = hide([t + f for t, f in zip(tokens, found, strict=True)])
        found = [
            linear(F.gelu(linear(norm(t, f"{block}.norms2.{s}"), f"{block}.mlps.{s}.0")), f"{block}.mlps.{s}.3")
            for s, t in enumerate(tokens)
        ]
        tokens = hide([t + f for t, f in zip(tokens, found, strict=True)])
    shares = torch.ones(active).to(x) / active
    if c["aggregate"] == "adaptive":
        shares = w["aggregation.scale_weights"][:active].softmax(0)
    pooled = 0.0
    for s, t in enumerate(tokens):
        count = t.shape[1] if masks is None else masks[s].sum(1, keepdim=True).clamp(min=1)
        pooled = pooled + shares[s] * linear(t.sum(1) / count, f"out_projs.{s}")
    features = norm(pooled, "norm")
    if c["use_bank"]:
        rows = w["feature_bank.bank"][: int(w["feature_bank.filled"])]
        best, where = (features @ rows.T).topk(min(c["bank_topk"], len(rows)), 1)
        read = ((best / math.sqrt(C)).softmax(1)[..., None] * rows[where]).sum(1)
        features = features + w["bank_gain"] * read
    return linear(features, "head"), features, tokens


def hide_one(t, keep):
    return t if keep is None else t * keep[..., None]


def everything(logits, features, tokens):
    return torch.cat([logits, features, *(t.flatten(1) for t in tokens)], 1)


def gradients(model, x, weight, mask=None):
    """The results as one tensor, and the gradients of the image and of all parameters."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = everything(*list(model(x, mask).values())[:3])
    (out * weight.to(out.dtype)).sum().backward()
    return out.detach(), {"image": x.grad} | {n: p.grad for n, p in model.named_parameters()}


def root_mean_square(grads, truth):
    """Error of all gradients, each in parts of its largest number; of one alone plain PyTorch may be lucky."""
    parts = [((grads[n].double() - t) / t.abs().max()).flatten() for n, t in truth.items() if t.abs().max() > 1e-6]
    return float(torch.cat(parts).square().mean().sqrt())


def pair(dtype=torch.float32, **options):
    one, two = build(plain, **options), build(fast, **options)
    two.load_state_dict(one.state_dict(), strict=True)
    for model in (one, two):
        torch.manual_seed(7)
        model.feature_bank.update(torch.randn(7, model.hidden_dim))
    return one.to(dtype), two.to(dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["32x32", "40x52-masked"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_model_is_what_is_written_and_the_fast_one_as_exact(backend, name, masked):
    one, two = pair(**OPTIONS[name])
    size = (40, 52) if masked else (32, 32)
    x, mask = images(*size), None
    if masked:
        mask = torch.rand(2, (size[0] // 4) * (size[1] // 4)) < 0.6
        mask[1, mask.shape[1] // 2 :] = False
    state = {k: v.double().requires_grad_() if v.is_floating_point() else v for k, v in one.state_dict().items()}
    leaf = x.double().requires_grad_()
    exact = everything(*by_hand(state, one.config, leaf, mask))
    weight = torch.randn(exact.shape, dtype=torch.float64)
    named = {"image": leaf} | {n: state[n] for n, _ in one.named_parameters()}
    grads = torch.autograd.grad((exact * weight).sum(), named.values(), allow_unused=True)
    truth = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(named.items(), grads, strict=True)}
    exact = exact.detach()
    with hivilt.use_backend("auto"):
        out, found = gradients(copy.deepcopy(one).double(), x.double(), weight, mask)
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)
    for n, g in truth.items():
        assert found[n] is not None and (g.abs().max() > 0 or n == "aggregation.scale_weights"), n
        torch.testing.assert_close(found[n], g, rtol=1e-8, atol=1e-8, msg=lambda m, n=n: f"{n}: {m}")
    out, of_plain = gradients(one, x, weight, mask)
    ours, found = gradients(two, x, weight, mask)
    as_exact(ours, out, exact)
    error = [root_mean_square(grads, truth) for grads in (of_plain, found)]
    assert error[1] <= 2 * error[0] + 2**-24, error


def test_the_seed_configuration_runs_on_14_7_3_and_warns_once():
    config = {"image_size": 224, "patch_size": 16, "hidden_dim": 16, "num_heads": 4, "num_layers": 1, "num_classes": 3,
              "mlp_ratio": 1.0, "dropout": 0.1, "drop_path_rate": 0.1, "bank_size": 8, "fusion_layers": 2}  # fmt: skip
    for room in (plain, fast):
        model = room.HiViT(config)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = model(torch.randn(1, 3, 224, 224))
            model(torch.randn(1, 3, 224, 224))
        assert [x.shape[1:] for x in out["scale_features"]] == [(196, 16), (49, 8), (9, 4)]
        texts = [str(w.message) for w in caught]
        assert len(texts) == 1 and "14x14 / 7x7 / 3x3" in texts[0]
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.HiViT(config | {"image_size": 64})(torch.randn(1, 3, 64, 128))


def test_states_names_and_twins():
    one, two = build(plain), build(fast)
    assert isinstance(two, type(one)) and list(one.state_dict()) == list(two.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    names = set(one.state_dict())
    assert {
        "patch_embeddings.scale_0.projection.weight", "patch_embeddings.scale_2.norm.bias", "norm.weight", "head.bias",
        "attention_blocks.1.qkv_projections.2.weight", "attention_blocks.0.projs.1.bias",
        "fusion_layers.1.fusion.0.weight", "fusion_layers.0.fusion.1.bias", "feature_bank.bank", "feature_bank.ptr",
        "feature_bank.filled", "out_projs.2.weight", "aggregation.scale_weights",
    } <= names  # fmt: skip
    kinds = {type(m).__module__.split(".")[1] for m in two.modules() if type(m).__module__.startswith("hivilt.")}
    assert kinds == {"models", "nn", "reference"}
    for name in ("MultiScaleAttention", "CrossScaleFusion", "ScaleExtraction", "FeatureBank"):
        assert any(type(m) is getattr(hivilt.nn, name) for m in two.modules()), name


@pytest.mark.parametrize("room", [plain, fast], ids=["plain", "fast"])
def test_copies_and_pickles(room):
    model, x = build(room, use_bank="residual"), images()
    expected = model(x)["logits"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin(x)["logits"], expected)


def test_a_batch_is_its_images_one_by_one(backend):
    model, x = build(fast), images(36, 44, 3)
    mask = torch.rand(3, 9 * 11) < 0.7
    for how in (None, mask):
        whole = model(x, how)
        for b in range(3):
            alone = model(x[b : b + 1], None if how is None else how[b : b + 1])
            torch.testing.assert_close(whole["logits"][b : b + 1], alone["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cross_scale", ["fusion", "attention"])
def test_what_masked_patches_hold_does_not_matter(cross_scale):
    model, x = build(fast, cross_scale=cross_scale), images(35, 42, 3)  # the last pixels belong to no patch
    mask = torch.rand(3, 80) < 0.6
    mask[2] = False
    fine = mask.view(3, 1, 8, 10).repeat_interleave(4, 2).repeat_interleave(4, 3)
    fine = F.pad(fine, (0, 2, 0, 3))
    clean, of_clean = gradients(model, x, torch.ones(()), mask)
    dirty = torch.where(fine, x, math.nan)
    out, found = gradients(model, dirty, torch.ones(()), mask)
    assert torch.equal(out, clean) and out.isfinite().all()
    assert all(torch.equal(found[n], of_clean[n]) and found[n].isfinite().all() for n in found)
    assert (found["image"][~fine.expand_as(x)] == 0).all()
    tokens = model(dirty, mask.long())["scale_features"]
    assert (tokens[0][~mask] == 0).all() and all((t[2] == 0).all() for t in tokens)


def test_attention_weights_on_request():
    for room in (plain, fast):
        model, x = build(room, num_layers=3), images(16, 16)
        found = model(x, need_weights=True)
        assert [[tuple(w.shape) for w in layer] for layer in found["attention_weights"]] == [
            [(2, 4, n, n) for n in (16, 4, 1)]
        ] * 3
        torch.testing.assert_close(found["attention_weights"][2][0].sum(-1), torch.ones(2, 4, 16))
        torch.testing.assert_close(found["logits"], model(x)["logits"], rtol=1e-5, atol=1e-5)
        assert list(model(x)) == ["logits", "features", "scale_features"]


# The bank.


@pytest.mark.parametrize("room", [plain, fast], ids=["plain", "fast"])
def test_the_bank_is_read_before_it_is_written_and_only_in_training(backend, room):
    model, x = build(room, use_bank="residual").train(), images()
    first = model(x, return_retrieved=True)
    assert (first["retrieved"] == 0).all() and int(model.feature_bank.filled) == 2
    torch.testing.assert_close(model.feature_bank.bank[:2], first["features"].detach())
    assert not model.feature_bank.bank.requires_grad
    second = model(x, return_retrieved=True)
    assert second["retrieved"].abs().max() > 0 and int(model.feature_bank.filled) == 4
    pushed = (second["features"] - model.bank_gain * second["retrieved"]).detach()
    torch.testing.assert_close(model.feature_bank.bank[2:4], pushed, rtol=1e-5, atol=1e-5)
    state = model.feature_bank.bank.clone()
    second["logits"].sum().backward()  # the update that came between changes nothing
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.bank_gain.grad.abs() > 0 and torch.equal(model.feature_bank.bank, state)
    model.eval()(x)
    model.train()(x, update_bank=False)
    assert int(model.feature_bank.filled) == 4
    model.eval()(x, update_bank=True)
    assert int(model.feature_bank.filled) == 6


def test_gradients_are_those_before_the_update(backend):
    """Two forwards of one batch, of which only one writes the bank, have the same gradients."""
    one, two = pair(use_bank="residual")
    for model in (one, two):
        found = []
        for update in (False, True):
            model.zero_grad()
            model(images(batch=2) * 0 + 1.0, update_bank=update)["logits"].sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_residual_the_bank_is_written_and_changes_nothing():
    model, x = build(fast).train(), images()
    a = model(x)
    assert int(model.feature_bank.filled) == 2 and model.bank_gain is None
    b = model(x, return_retrieved=True)
    assert torch.equal(a["logits"], b["logits"]) and b["retrieved"].abs().max() > 0


# Training.


def test_it_learns():
    torch.manual_seed(0)
    model = fast.HiViT(TINY, num_layers=1, use_bank="residual", dropout=0.1, drop_path_rate=0.1)
    x, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 5
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(40):
        loss = F.cross_entropy(model(x)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    block = hivit.HiViTBlock(8, 1, 1.0, 0.0, 0.25).train()
    x, branch = torch.zeros(4000, 3, 8), torch.ones(4000, 3, 8)
    out = block.add(x, branch)
    each = out.flatten(1)
    assert ((each == 0).all(1) | torch.isclose(each, torch.tensor(4 / 3)).all(1)).all()
    assert 0.72 < float((each[:, 0] > 0).float().mean()) < 0.78 and 0.96 < float(out.mean()) < 1.04
    assert torch.equal(block.eval().add(x, branch), branch)
    rates = [b.drop_path for b in build(plain, drop_path_rate=0.3, num_layers=4).blocks]
    torch.testing.assert_close(rates, [0.0, 0.1, 0.2, 0.3])
    assert [b.drop_path for b in build(plain, drop_path_rate=0.3, num_layers=1).blocks] == [0.0]


def test_dropout_reaches_attention_fusion_and_mlps():
    model = fast.HiViT(TINY, dropout=0.5)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    x = images()
    assert not torch.equal(model(x)["logits"], model(x)["logits"])
    assert torch.equal(model.eval()(x)["logits"], model(x)["logits"])


@pytest.mark.parametrize("cross_scale", ["fusion", "attention"])
@pytest.mark.parametrize("active", [1, 2, 3])
def test_inactive_scales_are_terms_of_zero(backend, active, cross_scale):
    one, two = (build(room, "ProgressiveHiViT", cross_scale=cross_scale) for room in (plain, fast))
    x = images(40, 36)
    exact = everything(
        *by_hand({k: v.double() for k, v in one.state_dict().items()}, one.config, x.double(), None, active)
    )
    weight, used = torch.randn(exact.shape, dtype=torch.float64), None
    for model in (one, two):
        assert model.current_scales == 1
        model.current_scales = active
        out, grads = gradients(model, x, weight)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
        with_gradient = {n for n, g in grads.items() if g is not None}
        used = with_gradient if used is None else used
        assert with_gradient == used and (active < 3 or used == set(grads))
        assert not any(f"projections.{active}." in n or f"mlps.{active}." in n for n in used if cross_scale == "fusion")


def test_curriculum_steps_after_epoch_0():
    model = build(plain, "ProgressiveHiViT", num_scales=4)
    steps = [model.step_curriculum(epoch, 3) for epoch in range(13)]
    assert steps == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    for epoch, kind in ((-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="epoch: expected an int"):
            model.step_curriculum(epoch)
    with pytest.raises(ValueError, match="warmup_epochs"):
        model.step_curriculum(1, 0)
    model.current_scales = 5
    with pytest.raises(ValueError, match="current_scales: expected at most 4"):
        model(images())


@pytest.mark.parametrize("cross_scale", ["fusion", "attention"])
def test_fullgraph_compile_in_training(cross_scale):
    options = {"num_layers": 1, "fusion_layers": 1, "num_scales": 2, "cross_scale": cross_scale}
    model = build(fast, use_bank="residual", **options).train()
    twin, x = copy.deepcopy(model), images(40, 36)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        out, expected = compiled(x), twin(x)
        torch.testing.assert_close(out["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
        out["logits"].sum().backward()
    assert int(model.feature_bank.filled) == 4
    torch.testing.assert_close(model.feature_bank.bank, twin.feature_bank.bank, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_half_types_autocast_and_no_images(name):
    model, x = build(fast, **OPTIONS[name]), images(40, 52)
    exact = model(x)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)["logits"]
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())["logits"]
    of_plain = copy.deepcopy(build(plain, **OPTIONS[name])).bfloat16()(x.bfloat16())["logits"]
    error = float((of_plain.float() - exact).abs().max())
    assert mixed.dtype == half.dtype == torch.bfloat16
    assert (
        float((mixed.float() - exact).abs().max()) < 2 * error and float((half.float() - exact).abs().max()) < 2 * error
    )
    empty = model.train()(x[:0])
    assert empty["logits"].shape == (0, 5) and int(model.feature_bank.filled) == 0


# Sizes and arguments.


@pytest.mark.parametrize("name", OPTIONS)
def test_the_count_is_the_sum_of_all_parameters(name):
    options = OPTIONS[name]
    assert hivit.count_parameters(TINY, **options) == sum(p.numel() for p in plain.HiViT(TINY, **options).parameters())


@pytest.mark.parametrize(
    "name, count", [("tiny", 3124075), ("small", 5253611), ("base", 11145451), ("large", 36621035)]
)
def test_counts_of_the_variants(name, count):
    with torch.device("meta"):
        models = [getattr(room, f"hivit_{name}")() for room in (plain, fast)]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [count, count]
    assert hivit.count_parameters(hivit.VARIANTS[name]) == count


BAD = {
    "unknown": (
        lambda: plain.HiViT(TINY, depth=3),
        ValueError,
        r"config: expected keys out of image_size.*\['depth'\]",
    ),
    "config": (lambda: plain.HiViT([1]), TypeError, "config: expected a dict or None"),
    "heads": (lambda: plain.HiViT(TINY, num_heads=3), ValueError, "num_heads: expected a divisor of hidden_dim = 16"),
    "layers": (lambda: plain.HiViT(TINY, num_layers=0), ValueError, "num_layers"),
    "widths": (lambda: plain.HiViT(TINY, num_scales=6, image_size=999), ValueError, "hidden_dim"),
    "size": (lambda: plain.HiViT(TINY, image_size=15), ValueError, "image_size: expected at least the coarsest"),
    "size-kind": (lambda: plain.HiViT(TINY, image_size=32.0), TypeError, "image_size"),
    "ratio": (lambda: plain.HiViT(TINY, mlp_ratio=0.1), ValueError, "mlp_ratio"),
    "dropout": (lambda: plain.HiViT(TINY, dropout=2), ValueError, "dropout"),
    "path": (lambda: plain.HiViT(TINY, drop_path_rate=1.0), ValueError, "drop_path_rate"),
    "cross": (lambda: plain.HiViT(TINY, cross_scale="sum"), ValueError, "cross_scale: expected one of 'fusion'"),
    "cross-one": (lambda: plain.HiViT(TINY, cross_scale="attention", num_scales=1), ValueError, "num_scales"),
    "aggregate": (lambda: plain.HiViT(TINY, aggregate="max"), ValueError, "aggregate"),
    "pos": (lambda: plain.HiViT(TINY, pos_embed=1), TypeError, "pos_embed: expected a bool"),
    "bank": (lambda: plain.HiViT(TINY, use_bank=True), ValueError, "use_bank: expected False or 'residual'"),
    "bank-size": (lambda: plain.HiViT(TINY, bank_size=0), ValueError, "bank_size"),
    "images": (lambda: plain.HiViT(TINY)(torch.zeros(3, 32, 32)), ValueError, "images: expected 4 dimensions"),
    "channels": (lambda: plain.HiViT(TINY)(torch.zeros(1, 4, 32, 32)), ValueError, "images: expected 3 channels"),
    "small": (lambda: plain.HiViT(TINY)(torch.zeros(1, 3, 32, 15)), ValueError, "images: expected H and W of at least"),
    "mask": (lambda: plain.HiViT(TINY)(images(), torch.ones(2, 9).bool()), ValueError, "attention_mask"),
    "flag": (lambda: plain.HiViT(TINY)(images(), need_weights=1), TypeError, "need_weights"),
    "update": (lambda: plain.HiViT(TINY)(images(), update_bank=1), TypeError, "update_bank"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        call()
