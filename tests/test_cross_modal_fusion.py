"""Local, global and sparse fusion of vision with text, plain and fast, against attention and pools written out in
float64, sample by sample and without padding."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from plain_attention import close, plain_topk
from torch import nn

import hivilt
from hivilt import nn as fast
from hivilt.reference import modules as plain

B, NV, NT, C, H = 4, 7, 5, 16, 2
ROOMS = pytest.mark.parametrize("room", [plain, fast], ids=["plain", "fast"])
OPTIONS = {
    "default": {},
    "product": {"product": True},
    "residual": {"apply_fusion": False},
    "layernorm": {"input_norm": "layernorm"},
    "l2": {"input_norm": "l2"},
    "keys": {"topk": 3},
    "queries": {"topk": 2, "axis": "queries", "product": True},
    "raw": {"topk": 2, "select": "raw", "input_norm": "layernorm"},
    "raw-queries": {"topk": 2, "axis": "queries", "select": "raw", "apply_fusion": False},
}
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(room, name="LocalFusionModule", *args, dtype=torch.float32, **options):
    """The same parameters in both rooms; no bias is 0 and no norm weight 1."""
    torch.manual_seed(3)
    module = getattr(room, name)(*args, **options)
    with torch.no_grad():
        for label, p in module.named_parameters():
            if p.dim() < 2:
                p.copy_(torch.rand_like(p) + 0.5 if label.endswith("weight") else torch.randn_like(p))
    return module.eval().to(dtype)


def local(room, dtype=torch.float32, **options):
    return build(room, "LocalFusionModule", C, H, dtype=dtype, **options)


def inputs(dtype=torch.float32):
    """(v, t, vision_mask, attention_mask): a whole sample, a padded one, one without text, one without image."""
    torch.manual_seed(4)
    v, t = torch.randn(B, NV, C, dtype=dtype), torch.randn(B, NT, C, dtype=dtype)
    patches, words = torch.ones(B, NV, dtype=torch.bool), torch.ones(B, NT, dtype=torch.bool)
    patches[1, 4:], words[1, 0], words[2], patches[3] = False, False, False, False
    return v, t, patches, words


# The truth.


def attention(module, x, y):
    """module(x, y, y) of two sequences [N, C] in float64."""
    if not len(y):
        return module.out_proj.bias.double().expand(len(x), -1)
    topk = getattr(module, "topk", None) or len(y)
    options = (module.axis, module.select) if getattr(module, "topk", None) else ()
    return plain_topk(module, x[None], y[None], y[None], topk, *options)[0][0]


def joined(module, x, seen):
    linear, norm = module.fusion[0], module.fusion[1]
    y = torch.cat([x, seen, x * seen] if module.product else [x, seen], -1) @ linear.weight.double().T
    y = y + linear.bias.double()
    centred = y - y.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    y = y + norm.bias.double()
    return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))


def local_truth(module, v, t, patches, words):
    rows = []
    for b in range(len(v)):
        x, y = v[b, patches[b]].double(), t[b, words[b]].double()
        if module.input_norm == "layernorm":
            x, y = (
                F.layer_norm(z, (C,), norm.weight.double(), norm.bias.double(), norm.eps)
                for z, norm in ((x, module.vision_norm), (y, module.text_norm))
            )
        elif module.input_norm == "l2":
            x, y = (z / z.square().sum(-1, keepdim=True).sqrt() for z in (x, y))
        whole = torch.zeros(NV + NT, C, dtype=torch.float64)
        for keep, z, seen in (
            (F.pad(patches[b], (0, NT)), x, attention(module.v2t_attn, x, y)),
            (F.pad(words[b], (NV, 0)), y, attention(module.t2v_attn, y, x)),
        ):
            whole = whole.masked_scatter(keep[:, None], z + (joined(module, z, seen) if module.apply_fusion else seen))
        rows.append(whole)
    return torch.stack(rows)


def pooled(module, x):
    """The three pools of tokens [N, C]; none: zeros."""
    if not len(x):
        return x.new_zeros(C)
    first, second = module.attn_pool[0], module.attn_pool[2]
    scores = torch.tanh(x @ first.weight.double().T + first.bias.double()) @ second.weight.double().T
    attended = ((scores + second.bias.double()).softmax(0) * x).sum(0)
    weights = module.pool_weights.double().softmax(0)
    return weights @ torch.stack([x.mean(0), x.amax(0), attended])


def global_truth(module, joint, v, t, patches, words):
    found = {name: [] for name in ("vision_global", "text_global", "vision_pooled", "text_pooled", "fused_features")}
    for b in range(len(v)):
        both = torch.cat([patches[b], words[b]])[: joint.shape[1]]
        x, y, z = (
            pooled(pool, s.double())
            for pool, s in (
                (module.vision_pool, v[b, patches[b]]),
                (module.text_pool, t[b, words[b]]),
                (module.local_pool, joint[b, both]),
            )
        )
        seen_v = attention(module.vision_attn, x[None], torch.stack([y, z]))[0]
        seen_t = attention(module.text_attn, y[None], torch.stack([x, z]))[0]
        first, last = module.fusion[0], module.fusion[3]
        hidden = F.gelu(torch.cat([seen_v, seen_t]) @ first.weight.double().T + first.bias.double())
        fused = hidden @ last.weight.double().T + last.bias.double()
        for name, value in zip(found, (seen_v, seen_t, x, y, fused), strict=True):
            found[name].append(value)
    return {name: torch.stack(values) for name, values in found.items()}


# LocalFusionModule.


@ROOMS
@EVERY
def test_local_fusion_equals_its_formula(room, options):
    """Outputs and gradients of inputs; what padding holds does not matter, and its rows are zeros."""
    module = local(room, **options)
    v, t, patches, words = inputs()
    x = [z.double().requires_grad_() for z in (v, t)]
    weight = torch.randn(B, NV + NT, C)
    expected = local_truth(module, *x, patches, words)
    (expected * weight).sum().backward()
    y = [v.masked_fill(~patches[..., None], math.nan), t.masked_fill(~words[..., None], math.inf)]
    for z in y:
        z.requires_grad_()
    out = module(*y, patches, words.long())
    (out * weight).sum().backward()
    close(out.double(), expected)
    assert (out[~torch.cat([patches, words], 1)] == 0).all()
    for ours, true in zip(y, x, strict=True):
        close(ours.grad.double(), true.grad)
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@ROOMS
def test_rows_of_length_one_in_half_precision(room):
    """A row of zeros, which every masked one is, divides by no length that float16 cannot hold."""
    module = local(room, input_norm="l2", dtype=torch.float16)
    v, t, patches, words = inputs()
    out = module(x := v.half().requires_grad_(), y := t.half().requires_grad_(), patches, words)
    out.float().square().sum().backward()
    assert all(z.grad.isfinite().all() for z in (x, y, *module.parameters()))
    expected = local_truth(copy.deepcopy(module).double(), v.half().double(), t.half().double(), patches, words)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)  # of numbers up to 8, in steps of 2^-8


@ROOMS
@EVERY
def test_every_parameter_learns(room, options):
    module = local(room, **options)
    v, t, patches, words = inputs()
    module(v, t, patches, words).square().sum().backward()
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert frozen == (
        [f"fusion.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")] if module.apply_fusion is False else []
    )
    assert all(p.grad.abs().sum() > 0 for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"product": True, "input_norm": "layernorm"}], ids=str)
def test_gradients_of_parameters_are_those_of_finite_differences(options):
    module = local(plain, torch.float64, **options)
    v, t, patches, words = inputs(torch.float64)
    weight = torch.randn(B, NV + NT, C, dtype=torch.float64)
    directions = [torch.randn_like(p) for p in module.parameters()]

    def loss(step):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), directions, strict=True):
                p.add_(d, alpha=step)
        return moved, (moved(v, t, patches, words) * weight).sum()

    moved, here = loss(0.0)
    here.backward()
    slope = sum((p.grad * d).sum() for p, d in zip(moved.parameters(), directions, strict=True))
    torch.testing.assert_close((loss(1e-6)[1] - loss(-1e-6)[1]) / 2e-6, slope, rtol=1e-6, atol=1e-6)


@EVERY
def test_fast_gradients_equal_plain(options):
    results = []
    for room in (plain, fast):
        module = local(room, **options)
        v, t, patches, words = inputs()
        module(v, t, patches, words).sin().sum().backward()
        results.append({name: p.grad for name, p in module.named_parameters()})
    assert list(results[0]) == list(results[1])
    for name, grad in results[0].items():
        assert (grad is None) == (results[1][name] is None), name
        if grad is not None:
            close(results[1][name], grad)


@ROOMS
def test_a_padded_batch_is_its_samples_one_by_one(room):
    module = local(room)
    v, t, patches, words = inputs()
    out = module(v, t, patches, words)
    for b in range(B):
        alone = module(v[b : b + 1, patches[b]], t[b : b + 1, words[b]])[0]
        close(out[b, torch.cat([patches[b], words[b]])], alone)


@ROOMS
def test_seed_compatibility(room):
    """compat="seed": torch's own attention and two sums; the parameters of fusion load and do nothing."""

    class Seed(nn.Module):
        def __init__(self):
            super().__init__()
            self.v2t_attn = nn.MultiheadAttention(C, H, dropout=0.1, batch_first=True)
            self.t2v_attn = nn.MultiheadAttention(C, H, dropout=0.1, batch_first=True)
            self.fusion = nn.Sequential(nn.Linear(2 * C, C), nn.LayerNorm(C), nn.GELU(), nn.Dropout(0.1))

        def forward(self, v, t):
            return torch.cat([v + self.v2t_attn(v, t, t)[0], t + self.t2v_attn(t, v, v)[0]], 1)

    seed = Seed().eval()
    module = room.LocalFusionModule(C, H, compat="seed").eval()
    module.load_state_dict(seed.state_dict(), strict=True)
    seed.load_state_dict(module.state_dict(), strict=True)
    v, t = inputs()[:2]
    close(module(v, t), seed(v, t))
    room.LocalFusionModule(C, H).load_state_dict(seed.state_dict(), strict=True)
    for options in ({"topk": 3}, {"product": True}, {"input_norm": "l2"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .* because compat is 'seed'"):
            room.LocalFusionModule(C, H, compat="seed", **options)


def test_dropout_drops_in_training_only():
    for room in (plain, fast):
        module = build(room, "LocalFusionModule", C, H, 0.5)
        v, t = inputs()[:2]
        assert torch.equal(module(v, t), module(v, t))
        module.train()
        torch.manual_seed(1)
        one = module(v, t)
        assert not torch.equal(one, module(v, t))
        torch.manual_seed(1)
        assert torch.equal(one, module(v, t))


def test_a_changed_fusion_is_called():
    """Hooks fire, and another module in it is obeyed."""
    one, two = local(plain), local(fast)
    fired = []
    two.fusion[2].register_forward_hook(lambda *_: fired.append(1))
    v, t, patches, words = inputs()
    close(two(v, t, patches, words), one(v, t, patches, words))
    assert fired
    for module in (one, two := local(fast)):
        module.fusion[2] = nn.ReLU()
    close(two(v, t), one(v, t))


# GlobalFusionModule.


@ROOMS
@pytest.mark.parametrize("rows", [NV + NT, NV])
def test_global_fusion_equals_its_formula(room, rows):
    module = build(room, "GlobalFusionModule", {"hidden_dim": C, "num_heads": H})
    v, t, patches, words = inputs()
    torch.manual_seed(5)
    joint = torch.randn(B, rows, C)
    x = [z.double().requires_grad_() for z in (joint, v, t)]
    expected = global_truth(module, *x, patches, words)
    weights = {name: torch.randn(B, C) for name in expected}
    sum((value * weights[name]).sum() for name, value in expected.items()).backward()
    keep = torch.cat([patches, words], 1)[:, :rows]
    y = [z.masked_fill(~m[..., None], math.nan) for z, m in ((joint, keep), (v, patches), (t, words))]
    for z in y:
        z.requires_grad_()
    out = module(*y, patches, words)
    assert list(out) == ["fused_features", "vision_global", "text_global", "vision_pooled", "text_pooled"]
    sum((value * weights[name]).sum() for name, value in out.items()).backward()
    for name, value in expected.items():
        close(out[name].double(), value)
    for ours, true in zip(y, x, strict=True):
        close(ours.grad.double(), true.grad)
    for name, p in module.named_parameters():
        no_shift = name.endswith("attn_pool.2.bias")  # a softmax does not know it
        assert p.grad.isfinite().all() and (no_shift or p.grad.abs().sum() > 0), name
    assert (out["text_pooled"][2] == 0).all() and (out["vision_pooled"][3] == 0).all()


@ROOMS
def test_global_fusion_takes_keywords_and_pools(room):
    one = build(room, "GlobalFusionModule", hidden_dim=C, num_heads=H, pool_types=("max", "mean"))
    v, t, *_ = inputs()
    out = one(torch.cat([v, t], 1), v, t)
    weights = one.vision_pool.pool_weights.softmax(0)
    close(out["vision_pooled"], weights[0] * v.amax(1) + weights[1] * v.mean(1))
    assert room.GlobalFusionModule({"hidden_dim": 8, "num_heads": H}, hidden_dim=C).hidden_dim == C


# FusionModule: one name, three signatures.


@ROOMS
def test_the_three_signatures(room):
    v, t, patches, words = inputs()
    of_config = build(room, "FusionModule", {"hidden_dim": C, "num_heads": H})
    of_dim = build(room, "FusionModule", C, H)
    masks = {"vision_mask": patches, "attention_mask": words}
    as_dict = of_config({"vision": v, "text": t}, **masks)
    assert list(as_dict) == ["fused_features"] and type(of_dim.fusion) is room.LocalFusionModule
    assert torch.equal(as_dict["fused_features"], of_dim(v, t, **masks))
    behind = local(room)
    behind.load_state_dict(of_dim.fusion.state_dict())
    assert torch.equal(of_dim(v, t, **masks), behind(v, t, patches, words))
    whole = build(room, "FusionModule", {"hidden_dim": C, "num_heads": H}, mode="global")
    assert type(whole.fusion) is room.GlobalFusionModule
    fused = whole({"local": as_dict["fused_features"], "vision": v, "text": t}, **masks)
    assert torch.equal(
        fused["fused_features"],
        whole.fusion(as_dict["fused_features"], v, t, patches, words)["fused_features"],
    )
    assert room.FusionModule(C, H, 0.0, topk=3).fusion.v2t_attn.topk == 3
    assert room.FusionModule({"hidden_dim": C, "num_heads": 4}, 8).fusion.v2t_attn.num_heads == 4


@ROOMS
def test_fusion_modules_are_stages_of_progressive_fusion(room):
    v, t, _, words = inputs()
    module = build(room, "ProgressiveFusion", C, 2, stages=lambda dim: room.FusionModule(dim, H))
    out = module([v[:, :4], v], t, attention_mask=words)
    assert [x.shape for x in out] == [(B, 4 + NT, C), (B, NV + NT, C)]
    assert torch.equal(out[0], module.fusion_stages[0](v[:, :4], t, attention_mask=words))


# SparseLocalFusion.


@ROOMS
@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("select", ["scores", "raw"])
@pytest.mark.parametrize("top_k", [1, 3, 64, None])
def test_sparse_fusion_equals_its_formula(room, axis, select, top_k):
    module = build(room, "SparseLocalFusion", C, top_k, H, axis=axis, select=select)
    v, t, patches, words = inputs()
    expected = torch.zeros(B, NV, C, dtype=torch.float64)
    for b in range(B):
        expected[b, patches[b]] = attention(module.attn, v[b, patches[b]].double(), t[b, words[b]].double())
    v, t = v.masked_fill(~patches[..., None], math.nan), t.masked_fill(~words[..., None], math.nan)
    v, t = v.requires_grad_(), t.requires_grad_()
    out = module(v, t, patches, words)
    close(out.double(), expected)
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (v, t, *module.parameters()))
    assert (v.grad[~patches] == 0).all() and (t.grad[~words] == 0).all()
    if axis == "queries" and top_k == 1:  # as many patches as words, at most, see anything
        empty = (out[0] == module.attn.out_proj.bias).all(-1)
        assert empty.sum() >= NV - NT or select == "scores"


def test_a_checkpoint_of_torchs_attention_loads():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(C, H, batch_first=True)

    for room in (plain, fast):
        room.SparseLocalFusion(C, num_heads=H).load_state_dict(First().state_dict(), strict=True)


# CheckpointedFusionModule.


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the numbers that autograd keeps for backward."""

    def __init__(self):
        self.numbers = 0
        super().__init__(self.keep, lambda x: x)

    def keep(self, x):
        self.numbers += x.numel()
        return x


@ROOMS
def test_checkpointing_gives_the_same_gradients_and_keeps_less(room):
    """With dropout: the random numbers of the first forward are drawn again."""
    config = {"hidden_dim": C, "num_heads": H, "dropout": 0.3, "topk": 3}
    results = []
    for use in (False, True):
        module = build(room, "CheckpointedFusionModule", {**config, "use_checkpointing": use}).train()
        v, t, patches, words = inputs()
        v.requires_grad_()
        torch.manual_seed(9)
        kept = Kept()
        with kept:
            out = module(v, t, patches, words)["fused_features"]
        following = torch.rand(())
        out.square().sum().backward()
        results.append((out, following, v.grad, *(p.grad for p in module.parameters()), kept.numbers))
    *plainly, most = results[0]
    *again, least = results[1]
    assert all(torch.equal(a, b) for a, b in zip(plainly, again, strict=True))
    assert least < 0.2 * most
    module.eval()
    dropped = build(room, "CheckpointedFusionModule", config)
    assert torch.equal(module(v, t)["fused_features"], dropped(v, t)["fused_features"])


# All of them.

BUILT = {
    "LocalFusionModule": ((C, H), {"product": True, "input_norm": "layernorm"}),
    "GlobalFusionModule": ((), {"hidden_dim": C, "num_heads": H}),
    "FusionModule": ((C, H), {}),
    "SparseLocalFusion": ((C, 3, H), {}),
    "CheckpointedFusionModule": (({"hidden_dim": C, "num_heads": H},), {}),
}
NAMES = pytest.mark.parametrize("name", BUILT)


def made(room, name):
    args, options = BUILT[name]
    return build(room, name, *args, **options)


def call_of(name):
    v, t, patches, words = inputs()
    if name == "GlobalFusionModule":
        return torch.cat([v, t], 1), v, t, patches, words
    return (v, t) if name == "FusionModule" else (v, t, patches, words)


def result(out):
    return out["fused_features"] if isinstance(out, dict) else out


@NAMES
def test_twins_share_parameters(name):
    one, two = made(plain, name), made(fast, name)
    assert type(two).__mro__[1] is type(one)
    a, b = one.state_dict(), two.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    two.load_state_dict(a, strict=True)
    one.load_state_dict(b, strict=True)
    close(result(two(*call_of(name))), result(one(*call_of(name))))


@NAMES
def test_accelerate_and_restore(name):
    module = made(plain, name)
    expected = result(module(*call_of(name)))
    kinds = [type(m) for m in module.modules()]
    report = hivilt.accelerate(module)
    assert report.skipped == [] and report.replaced
    twin = made(fast, name)
    close(result(module(*call_of(name))), result(twin(*call_of(name))), torch.float64)
    hivilt.restore(module)
    assert kinds == [type(m) for m in module.modules()]
    assert torch.equal(result(module(*call_of(name))), expected)


@NAMES
@ROOMS
def test_copies_and_pickles(name, room):
    module = made(room, name)
    expected = result(module(*call_of(name)))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and torch.equal(result(twin(*call_of(name))), expected)


@pytest.mark.parametrize("name", ["CheckpointedFusionModule", "SparseLocalFusion"])  # the first holds the others
def test_compiles_in_one_graph(name):
    module = made(fast, name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(result(compiled(*call_of(name))), result(module(*call_of(name))))


@NAMES
@ROOMS
def test_autocast(name, room):
    """bf16 inside, near the float32 result, and gradients in the parameters' type."""
    module = made(room, name)
    expected = result(module(*call_of(name)))
    with torch.autocast("cpu", torch.bfloat16):
        out = result(module(*call_of(name)))
        loss = out.float().square().mean()
    loss.backward()
    scale = float(expected.detach().abs().max())
    assert 0 < float((out.float() - expected).abs().max()) < 0.03 * scale
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@ROOMS
@pytest.mark.parametrize("sizes", [(0, NT), (NV, 0)], ids=["no-patches", "no-words"])
def test_empty_sequences(room, sizes):
    v, t = torch.randn(B, sizes[0], C, requires_grad=True), torch.randn(B, sizes[1], C, requires_grad=True)
    module = local(room)
    out = module(v, t)
    everything = torch.ones(B, NV, dtype=torch.bool)[:, : sizes[0]], torch.ones(B, NT, dtype=torch.bool)[:, : sizes[1]]
    expected = [local_truth_of(module, v[b], t[b]) for b in range(B)]
    close(out.double(), torch.stack(expected))
    assert torch.equal(module(v, t, *everything), out)
    out.sum().backward()


def local_truth_of(module, v, t):
    x, y = v.double(), t.double()
    return torch.cat(
        [
            x + joined(module, x, attention(module.v2t_attn, x, y)),
            y + joined(module, y, attention(module.t2v_attn, y, x)),
        ]
    )


V, T = torch.zeros(2, 3, C), torch.zeros(2, 4, C)
BAD = {
    "hidden_dim": (lambda m: m.LocalFusionModule(0), ValueError, "hidden_dim"),
    "hidden_dim-type": (lambda m: m.LocalFusionModule("16"), TypeError, "hidden_dim"),
    "num_heads": (lambda m: m.LocalFusionModule(16, 3), ValueError, "num_heads: expected a divisor of hidden_dim = 16"),
    "dropout": (lambda m: m.LocalFusionModule(16, 2, 1.5), ValueError, "dropout"),
    "topk": (lambda m: m.LocalFusionModule(16, 2, topk=0), ValueError, "topk"),
    "axis": (lambda m: m.LocalFusionModule(16, 2, axis="rows"), ValueError, "axis"),
    "select": (lambda m: m.LocalFusionModule(16, 2, select="best"), ValueError, "select"),
    "product": (lambda m: m.LocalFusionModule(16, 2, product=1), TypeError, "product"),
    "product-alone": (lambda m: m.LocalFusionModule(16, 2, product=True, apply_fusion=False), ValueError, "product"),
    "input_norm": (lambda m: m.LocalFusionModule(16, 2, input_norm="batch"), ValueError, "input_norm"),
    "compat": (lambda m: m.LocalFusionModule(16, 2, compat="first"), ValueError, "compat"),
    "vision": (lambda m: m.LocalFusionModule(C, 2)(V[0], T), ValueError, "vision_features"),
    "vision-type": (lambda m: m.LocalFusionModule(C, 2)([1], T), TypeError, "vision_features"),
    "text-width": (lambda m: m.LocalFusionModule(C, 2)(V, T[..., 1:]), ValueError, "text_features: expected 16 ch"),
    "text-batch": (lambda m: m.LocalFusionModule(C, 2)(V, T[:1]), ValueError, "text_features: expected the batch"),
    "vision_mask": (lambda m: m.LocalFusionModule(C, 2)(V, T, V[..., 0]), TypeError, "vision_mask"),
    "attention_mask": (
        lambda m: m.LocalFusionModule(C, 2)(V, T, None, torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        "attention_mask",
    ),
    "config": (lambda m: m.GlobalFusionModule([16]), TypeError, "config"),
    "config-key": (lambda m: m.GlobalFusionModule({"hidden_dim": 16, "heads": 2}), ValueError, "got 'heads'"),
    "config-less": (lambda m: m.GlobalFusionModule(num_heads=2), ValueError, "hidden_dim"),
    "pools": (lambda m: m.GlobalFusionModule(hidden_dim=16, pool_types=("sum",)), ValueError, "pool_types"),
    "local": (lambda m: m.GlobalFusionModule(hidden_dim=C)(V[:, :2], V, T), ValueError, "local: expected shape"),
    "mode": (lambda m: m.FusionModule(16, mode="both"), ValueError, "mode"),
    "dim": (lambda m: m.FusionModule(16.0), TypeError, "config_or_dim"),
    "setting": (lambda m: m.FusionModule(16, pool_types=("max",)), ValueError, "got 'pool_types'"),
    "features": (lambda m: m.FusionModule(C)({"vision": V}), ValueError, "features: expected exactly vision, text"),
    "features-type": (lambda m: m.FusionModule(C)([V, T]), TypeError, "features"),
    "text-beside": (lambda m: m.FusionModule(C)({"vision": V, "text": T}, T), TypeError, "text"),
    "text-missing": (lambda m: m.FusionModule(C)(V), TypeError, "text_features"),
    "global-tensors": (lambda m: m.FusionModule(C, mode="global")(V, T), TypeError, "features"),
    "top_k": (lambda m: m.SparseLocalFusion(16, 0), ValueError, "top_k"),
    "checkpointing": (
        lambda m: m.CheckpointedFusionModule(hidden_dim=16, use_checkpointing=1),
        TypeError,
        "use_checkpointing",
    ),
}  # fmt: skip


@ROOMS
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(room, case):
    make, kind, text = BAD[case]
    with pytest.raises(kind, match=text) as caught:
        make(room)
    assert "expected" in str(caught.value) and "got" in str(caught.value)
