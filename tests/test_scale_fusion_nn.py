"""The multi-scale modules, plain and fast, against the layers they stem from, written out in float64 with loops."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from multi_scale import BACKENDS, as_exact, gradients, randomise
from torch import nn

import hivilt
from hivilt import nn as fast
from hivilt.reference import modules as plain

NAMES = [
    "AdaptiveFusion",
    "AdaptiveGlobalPooling",
    "CrossScaleFusion",
    "HierarchicalPatchEmbedding",
    "ProgressiveFusion",
]
GRIDS = {
    "square": [(8, 8), (4, 4), (2, 2)],
    "seed-at-224": [(14, 14), (7, 7), (3, 3)],
    "wide": [(6, 10), (3, 5), (2, 3)],
    "coarse-first": [(2, 3), (5, 7), (6, 10)],
    "sequence": [(9,), (5,), (2,)],
    "video": [(2, 4, 3), (1, 2, 2), (1, 1, 1)],
}
C = 16


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with hivilt.use_backend(request.param):
        yield request.param


def tokens_of(grids, widths, batch=2, dtype=torch.float32):
    return [torch.randn(batch, math.prod(g), c).to(dtype) for g, c in zip(grids, widths, strict=True)]


def wide(x):
    return [t.double() for t in x] if isinstance(x, list) else copy.deepcopy(x).double()


def upsample(x, grid, out_grid, align_corners=False):
    """Tokens of one grid on another, one axis after the other, each as a matrix of torch's 1-D interpolation."""
    x = x.unflatten(1, grid)
    for axis, (n, m) in enumerate(zip(grid, out_grid, strict=True), 1):
        if n != m:
            eye = torch.eye(n, dtype=x.dtype)[None]
            matrix = F.interpolate(eye, size=m, mode="linear", align_corners=align_corners)[0]  # [n, m]
            x = torch.movedim(torch.tensordot(x, matrix, ([axis], [0])), -1, axis)
    return x.flatten(1, len(grid))


def build(name, room, **options):
    """A module in the plain or in the fast room, parameters away from their defaults."""
    torch.manual_seed(3)
    positional = {
        "HierarchicalPatchEmbedding": (3, C, 4),
        "AdaptiveFusion": (3,),
        "ProgressiveFusion": (C, 3),
        "CrossScaleFusion": (C,),
        "AdaptiveGlobalPooling": (C,),
    }[name]
    return getattr(room, name)(*positional, **options)


def pair(name, dtype=torch.float32, **options):
    """(plain, fast) with the same parameters, biases and norms random."""
    one = build(name, plain, **options)
    randomise(one)
    two = build(name, fast, **options)
    two.load_state_dict(one.state_dict(), strict=True)
    return one.eval().to(dtype), two.eval().to(dtype)


def check(modules, inputs, weight, *args, exact=None, **options):
    """Results and all gradients of the fast module, as exact as the plain one's, which in float64 gives ``exact``."""
    one, two = modules
    truth = wide(one)
    result, of_truth = gradients(truth, wide(inputs), weight, *args, **options)
    if exact is not None:
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)
    expected, of_plain = gradients(one, inputs, weight, *args, **options)
    out, found = gradients(two, inputs, weight, *args, **options)
    as_exact(out, expected, result)
    assert set(found) == set(of_plain)
    for key in found:
        if of_plain[key] is None:
            assert found[key] is None, key
        else:
            as_exact(found[key], of_plain[key], of_truth[key], key)


# All of them.


@pytest.mark.parametrize("name", NAMES)
def test_a_fast_module_is_its_twin_with_the_same_start(name):
    one, two = build(name, plain), build(name, fast)
    assert type(two) is not type(one) and isinstance(two, type(one)) and type(two).__mro__[1] is type(one)
    a, b = one.state_dict(), two.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in two.parameters()]
    assert repr(one) == repr(two) or name == "ProgressiveFusion"


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_work(name):
    two = build(name, fast)
    for twin in (copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert type(twin) is type(two)
        assert all(
            torch.equal(a, b) for a, b in zip(two.state_dict().values(), twin.state_dict().values(), strict=True)
        )


# CrossScaleFusion.


class SeedFusion(nn.Module):
    """The layer as first written: names of its parameters, and its result on square grids."""

    def __init__(self, hidden_dim, num_scales=3):
        super().__init__()
        total = sum(hidden_dim // 2**i for i in range(num_scales))
        self.fusion = nn.Sequential(nn.Linear(total, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Dropout(0.1))

    def forward(self, scale_features):
        side = int(scale_features[0].shape[1] ** 0.5)
        aligned = [scale_features[0]]
        for feat in scale_features[1:]:
            B, N, width = feat.shape
            maps = feat.transpose(1, 2).reshape(B, width, int(N**0.5), int(N**0.5))
            maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
            aligned.append(maps.flatten(2).transpose(1, 2))
        return self.fusion(torch.cat(aligned, -1))


@pytest.mark.parametrize("grids", ["square", "seed-at-224"])
def test_a_checkpoint_of_the_first_version_loads_and_gives_its_result(grids):
    seed = SeedFusion(C).double().eval()
    randomise(seed)
    x = tokens_of(GRIDS[grids], (16, 8, 4), dtype=torch.float64)
    for room in (plain, fast):
        module = room.CrossScaleFusion(C).double().eval()
        module.load_state_dict(seed.state_dict(), strict=True)
        torch.testing.assert_close(module(x), seed(x), rtol=1e-12, atol=1e-12)
        assert module.fusion[3].p == 0.1


def fused(module, x, grids, act, align_corners):
    linear, norm = module.fusion[0], module.fusion[1]
    y = torch.cat([upsample(t, g, grids[0], align_corners) for t, g in zip(x, grids, strict=True)], -1)
    y = y @ linear.weight.T + linear.bias
    if isinstance(norm, nn.LayerNorm):
        centred = y - y.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    return {
        "gelu": lambda: y * 0.5 * (1 + torch.erf(y / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
        "relu": lambda: y.clamp(min=0),
        "silu": lambda: y / (1 + torch.exp(-y)),
        "none": lambda: y,
    }[act]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("grids", GRIDS)
def test_cross_scale_fusion_equals_its_formula(grids, align_corners, dtype):
    grids = GRIDS[grids]
    modules = pair("CrossScaleFusion", dtype, align_corners=align_corners)
    x = tokens_of(grids, (16, 8, 4), dtype=dtype)
    exact = fused(wide(modules[0]), wide(x), grids, "gelu", align_corners)
    weight = torch.randn(exact.shape, dtype=torch.float64)
    check(modules, x, weight, grids, exact=exact.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"act": "gelu_tanh", "norm": "none"},
        {"act": "relu", "norm_eps": 0.1},
        {"act": "silu", "dims": (5, 7, 3)},
        {"act": "none", "norm": "none"},
        {"num_scales": 1},
        {"num_scales": 4, "act": "silu"},
    ],
    ids=str,
)
def test_cross_scale_fusion_options(options):
    modules = pair("CrossScaleFusion", **options)
    grids = [*GRIDS["wide"], (1, 2)][: modules[0].num_scales]
    assert modules[0].dims == options.get("dims", (16, 8, 4, 2)[: len(grids)])
    x = tokens_of(grids, modules[0].dims)
    exact = fused(wide(modules[0]), wide(x), grids, options.get("act", "gelu"), False).detach()
    check(modules, x, torch.randn(exact.shape, dtype=torch.float64), grids, exact=exact)


def test_dropout_drops_scales_and_spares_eval():
    _, module = pair("CrossScaleFusion", dropout=0.5, norm="none", act="none")
    x = [t.requires_grad_() for t in tokens_of(GRIDS["square"], (16, 8, 4), 8)]
    whole = module(x)
    assert torch.equal(module(x), whole)
    module.fusion[3].train()  # the state of the dropout counts, as it does when only that is switched on
    out = module(x)
    kept = out != 0
    assert 0.45 < float(kept.float().mean()) < 0.55
    torch.testing.assert_close(out[kept], 2 * whole[kept], rtol=1e-5, atol=1e-5)
    assert not torch.equal(module(x), out)
    out.sum().backward()
    torch.testing.assert_close(module.fusion[0].bias.grad, 2.0 * kept.float().sum((0, 1)))


def test_images_that_may_not_be_square_are_pointed_out_once():
    x = tokens_of([(24, 24), (12, 12)], (16, 8), 1)
    for room in (plain, fast):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hivilt.reference.modules._checks._warned.clear()
            module = room.CrossScaleFusion(C, 2).eval()
            module(x), module(x)
            module(x, [(18, 32), (9, 16)])
        texts = [str(w.message) for w in caught if "as squares" in str(w.message)]
        assert len(texts) == 1 and "[(18, 32), (9, 16)]" in texts[0] and "grid_sizes=" in texts[0]


def lora(linear):
    class Lora(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum(-1, keepdim=True)

    other = Lora(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


def test_inner_modules_that_were_changed_are_called():
    x = tokens_of(GRIDS["wide"], (16, 8, 4))
    for change in ("hook", "replaced", "parametrized", "longer"):
        one, two = pair("CrossScaleFusion")
        for module in (one, two):
            if change == "hook":
                module.fusion[0].register_forward_hook(lambda m, args, out: out + 1.0)
            elif change == "replaced":
                module.fusion[0] = lora(module.fusion[0])
            elif change == "parametrized":
                nn.utils.parametrizations.weight_norm(module.fusion[0])
            else:
                module.fusion.append(nn.Tanh())
        assert torch.equal(two(x, GRIDS["wide"]), one(x, GRIDS["wide"])), change


def test_float64_takes_the_twin_without_a_word():
    one, two = pair("CrossScaleFusion", torch.float64)
    x = tokens_of(GRIDS["wide"], (16, 8, 4), dtype=torch.float64)
    with hivilt.use_backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(two(x, GRIDS["wide"]), one(x, GRIDS["wide"]))


@pytest.mark.parametrize("name", ["CrossScaleFusion", "AdaptiveFusion", "AdaptiveGlobalPooling", "ProgressiveFusion"])
def test_fullgraph_compile(name):
    _, module = pair(name)
    x = tokens_of(GRIDS["wide"], (16, 8, 4) if name == "CrossScaleFusion" else (16,) * 3)
    args = {
        "AdaptiveGlobalPooling": (x[0],),
        "ProgressiveFusion": (x, torch.randn(2, 5, C)),
    }.get(name, (x, GRIDS["wide"]))
    expected = module(*args)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-5, atol=1e-5)


# AdaptiveFusion.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"dims": (5, 7, 3), "hidden_dim": 6}, {"hidden_dim": C}, {"dims": (6, 4, 4)}])
@pytest.mark.parametrize("grids", ["wide", "coarse-first", "sequence", "same"])
def test_adaptive_fusion_equals_its_formula(grids, options, dtype):
    grids = [(6,)] * 3 if grids == "same" else GRIDS[grids]
    modules = pair("AdaptiveFusion", dtype, **options)
    widths = modules[0].dims or (C,) * 3
    x, truth = tokens_of(grids, widths, dtype=dtype), wide(modules[0])
    shares = torch.exp(truth.scale_weights) / torch.exp(truth.scale_weights).sum()
    exact = 0.0
    for s, (t, grid) in enumerate(zip(wide(x), grids, strict=True)):
        t = upsample(t, grid, grids[0])
        linear = truth.projections[s] if truth.projections is not None else None
        exact = exact + shares[s] * (t if linear is None else t @ linear.weight.T + linear.bias)
    weight = torch.randn(exact.shape, dtype=torch.float64)
    check(modules, x, weight, *(() if grids == [(6,)] * 3 else (grids,)), exact=exact.detach())


def test_adaptive_fusion_of_pooled_features():
    one, two = pair("AdaptiveFusion", dims=(5, 7, 3), hidden_dim=6)
    x = [torch.randn(4, c) for c in (5, 7, 3)]
    shares = one.scale_weights.softmax(0)
    exact = sum(w * (t @ p.weight.T + p.bias) for w, t, p in zip(shares, x, one.projections, strict=True))
    for module in (one, two):
        torch.testing.assert_close(module(x), exact)
    seed = plain.AdaptiveFusion(2)
    seed.load_state_dict({"scale_weights": torch.tensor([0.0, math.log(3.0)])}, strict=True)
    torch.testing.assert_close(seed([torch.ones(1, 2), torch.zeros(1, 2)]), torch.full((1, 2), 0.25))


# AdaptiveGlobalPooling.


def pooled(module, x, mask):
    """Row by row, over the tokens that take part and no others."""
    rows = []
    first, score = module.attn_pool[0], module.attn_pool[2]
    shares = torch.exp(module.pool_weights) / torch.exp(module.pool_weights).sum()
    for b in range(x.shape[0]):
        kept = x[b] if mask is None else x[b][mask[b].bool()]
        if not len(kept):
            rows.append(x[b].new_zeros(x.shape[2]))
            continue
        s = torch.tanh(kept @ first.weight.T + first.bias) @ score.weight.T + score.bias
        a = torch.exp(s - s.max()) / torch.exp(s - s.max()).sum()
        every = {"mean": kept.sum(0) / len(kept), "max": kept.amax(0), "attention": (a * kept).sum(0)}
        rows.append(sum(w * every[pool] for w, pool in zip(shares, module.pool_types, strict=True)))
    return torch.stack(rows)


class One(nn.Module):
    """A module of one tensor as a module of a list of one, for ``check``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, *args, **options):
        return self.module(x[0], *args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [None, "bool", "int"])
@pytest.mark.parametrize("pools", [("mean", "max", "attention"), ("attention", "mean"), ("max",), ["mean"]], ids=str)
def test_pooling_equals_its_formula(pools, masked, dtype):
    modules = pair("AdaptiveGlobalPooling", dtype, pool_types=pools)
    x, mask = torch.randn(3, 13, C).to(dtype), None
    if masked:
        mask = torch.rand(3, 13) < 0.5
        mask[0], mask[1, 4] = False, True
        mask = mask if masked == "bool" else mask.long()
    exact = pooled(wide(modules[0]), x.double(), mask)
    wrapped = tuple(One(m) for m in modules)
    check(wrapped, [x], torch.randn(3, C, dtype=torch.float64), mask, exact=exact.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pools", [("mean", "max", "attention"), ("max", "mean")], ids=str)
def test_pooling_under_autocast(pools, dtype):
    """The dtype of the plain module, whose softmax autocast widens; without products nothing is rounded."""
    one, two = pair("AdaptiveGlobalPooling", pool_types=pools)
    x = torch.randn(3, 13, C).to(dtype)
    exact = pooled(wide(one), x.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = two(x), one(x)
    assert got.dtype == want.dtype == torch.float32
    worst = 2**-7 if "attention" in pools or dtype == torch.bfloat16 else 2**-22
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=worst * float(exact.abs().max()))


def test_pooling_ignores_what_padding_holds():
    for module in pair("AdaptiveGlobalPooling"):
        x, mask = torch.randn(3, 7, C), torch.ones(3, 7, dtype=torch.bool)
        mask[0], mask[1, 5:] = False, False
        expected = module(x, mask)
        assert (expected[0] == 0).all() and torch.allclose(expected[1:2], module(x[1:2, :5]), atol=1e-6)
        x[~mask] = math.nan
        x.requires_grad_()
        out = module(x, mask)
        assert torch.equal(out, expected)
        out.sum().backward()
        assert (x.grad[~mask] == 0).all() and x.grad[mask].abs().min() > 0
        assert all(p.grad.isfinite().all() for p in module.parameters())


def test_a_tied_maximum_sends_its_gradient_to_the_first():
    for module in pair("AdaptiveGlobalPooling", pool_types=("max",)):
        x = torch.zeros(1, 4, C, requires_grad=True)
        module(x, torch.tensor([[False, True, True, True]])).sum().backward()
        assert torch.equal(x.grad[0, :, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_no_tokens_and_no_batch():
    for module in pair("AdaptiveGlobalPooling"):
        assert torch.equal(module(torch.randn(2, 0, C)), torch.zeros(2, C))
        assert module(torch.randn(0, 3, C)).shape == (0, C)


def test_pooling_keeps_the_names_of_the_first_version():
    shapes = {k: tuple(v.shape) for k, v in plain.AdaptiveGlobalPooling(64, ["mean", "max"]).state_dict().items()}
    assert shapes == {
        "pool_weights": (2,), "attn_pool.0.weight": (16, 64), "attn_pool.0.bias": (16,),
        "attn_pool.2.weight": (1, 16), "attn_pool.2.bias": (1,),
    }  # fmt: skip
    module = plain.AdaptiveGlobalPooling(64, ["mean", "max"])
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["pool_weights"]


def test_seed_compatibility_of_pooling():
    """compat="seed": entry p of pool_weights belongs to the p-th of mean, max, attention, in this order."""
    x = torch.randn(2, 5, 8)
    for room in (plain, fast):
        module = room.AdaptiveGlobalPooling(8, ["attention", "mean"], compat="seed")
        assert room.AdaptiveGlobalPooling(8, ["attention", "mean"]).pool_types == ("attention", "mean")
        with torch.no_grad():
            module.pool_weights.copy_(torch.tensor([1.0, -1.0]))
        attended = (x * module.attn_pool(x).softmax(1)).sum(1)
        weights = torch.tensor([1.0, -1.0]).softmax(0)
        torch.testing.assert_close(module(x), weights[0] * x.mean(1) + weights[1] * attended)
        with pytest.raises(ValueError, match="compat"):
            room.AdaptiveGlobalPooling(8, compat="first")


# ProgressiveFusion.


def attention(module, query, key, ignored=None):
    """torch.nn.MultiheadAttention in eval mode, written out."""
    w, b = module.in_proj_weight.split(C), module.in_proj_bias.split(C)
    q, k, v = (x @ w[i].T + b[i] for i, x in enumerate((query, key, key)))
    q, k, v = (x.unflatten(-1, (8, C // 8)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(C // 8)
    if ignored is not None:
        scores = scores.masked_fill(ignored[:, None, None], -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out @ module.out_proj.weight.T + module.out_proj.bias


def progressive(module, pyramid, text, grids, mask):
    outputs = []
    for i, (v, stage) in enumerate(zip(pyramid, module.fusion_stages, strict=True)):
        ignored = None if mask is None else ~mask
        vision, words = v + attention(stage.v2t_attn, v, text, ignored), text + attention(stage.t2v_attn, text, v)
        words = words if mask is None else words * mask[..., None]
        if outputs:
            n = pyramid[i - 1].shape[1]
            vision = vision + module.scales[i] * upsample(outputs[-1][:, :n], grids[i - 1], grids[i])
            words = words + module.scales[i] * outputs[-1][:, n:]
        outputs.append(torch.cat([vision, words], 1))
    return outputs


class Last(nn.Module):
    """Pyramid and text as one list, all levels as one tensor, for ``check``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, *args, **options):
        return torch.cat(self.module(x[:-1], x[-1], *args, **options), 1)


@pytest.mark.parametrize("interp", ["linear1d", "grid"])
@pytest.mark.parametrize("grids", ["wide", "coarse-first", "square"])
@pytest.mark.parametrize("masked", [False, True])
def test_progressive_fusion_equals_its_formula(grids, interp, masked):
    grids = GRIDS[grids]
    modules = pair("ProgressiveFusion", interp=interp)
    x = [*tokens_of(grids, (C,) * 3), torch.randn(2, 5, C)]
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]]) if masked else None
    seen = grids if interp == "grid" else [(math.prod(g),) for g in grids]
    y = wide(x)
    exact = torch.cat(progressive(wide(modules[0]), y[:-1], y[-1], seen, mask), 1).detach()
    args = (grids,) if interp == "grid" and grids != GRIDS["square"] else ()
    extra = {"attention_mask": mask} if masked else {}
    wrapped = tuple(Last(m) for m in modules)
    # Of the sign of the result: the gradient of a scale, a sum over everything, then does not cancel to nothing.
    weight = torch.randn(exact.shape, dtype=torch.float64).abs() * exact.sign()
    check(wrapped, x, weight, *args, exact=exact, **extra)


def test_what_padding_holds_does_not_matter_to_progressive_fusion():
    """NaN in padded words, and a sample without any: finite everywhere, and zeros for words that take no part."""
    pyramid, text = tokens_of(GRIDS["wide"], (C,) * 3), torch.randn(2, 4, C)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    for module in pair("ProgressiveFusion"):
        results = []
        for value in (0.0, math.nan):
            x = text.masked_fill(~mask[..., None], value).requires_grad_()
            module.zero_grad()
            out = torch.cat(module(pyramid, x, attention_mask=mask), 1)
            out.square().sum().backward()
            results.append([out, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))
        words = module(pyramid, x, attention_mask=mask)[-1][:, pyramid[-1].shape[1] :]
        assert (words[~mask] == 0).all() and (words[mask] != 0).any()


@pytest.mark.parametrize("batch, words", [(0, 4), (2, 0)])
def test_progressive_fusion_of_nothing_under_a_mask(batch, words):
    """No sample; or no word, which is what a sample of masked words sees."""
    pyramid, text = [torch.randn(batch, n, C) for n in (4, 9, 6)], torch.randn(batch, words, C)
    for module in pair("ProgressiveFusion"):
        out = module(pyramid, text, attention_mask=torch.ones(batch, words, dtype=torch.bool))
        masked = module(pyramid, torch.zeros(batch, 1, C), attention_mask=torch.zeros(batch, 1, dtype=torch.bool))
        for x, y, vision in zip(out, masked, pyramid, strict=True):
            assert x.shape == (batch, vision.shape[1] + words, C)
            torch.testing.assert_close(x[:, : vision.shape[1]], y[:, :-1])


class Vision(nn.Module):
    """A stage that returns vision tokens alone."""

    def __init__(self, hidden_dim):
        super().__init__()
        self.linear = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, vision, text):
        return self.linear(vision) + text.mean(1, keepdim=True)


class Rows(nn.Module):
    """A stage that does nothing but put both behind each other."""

    def forward(self, vision, text):
        return torch.cat([vision, text], 1)


@pytest.mark.parametrize("interp", ["linear1d", "grid"])
def test_stages_can_be_given(interp):
    pyramid, text = tokens_of(GRIDS["wide"], (C,) * 3), torch.randn(2, 4, C)
    args = (GRIDS["wide"],) if interp == "grid" else ()
    one, two = pair("ProgressiveFusion", interp=interp, stages=Vision)
    assert list(one.state_dict())[:2] == ["fusion_stages.0.linear.weight", "fusion_stages.0.linear.bias"]
    grids = GRIDS["wide"] if interp == "grid" else [(math.prod(g),) for g in GRIDS["wide"]]
    outs = []
    for i, v in enumerate(pyramid):
        out = one.fusion_stages[i](v, text)
        outs.append(out + one.scales[i] * upsample(outs[-1], grids[i - 1], grids[i]) if outs else out)
    for module in (one, two):
        for a, b in zip(module(pyramid, text, *args), outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_text_stays_text_and_vision_vision():
    for room in (plain, fast):
        module = room.ProgressiveFusion(C, 2, stages=[Rows(), Rows()])
        pyramid, text = [torch.zeros(1, 6, C), torch.zeros(1, 12, C)], torch.ones(1, 4, C)
        out = module(pyramid, text)[-1]
        assert (out[:, :12] == 0).all() and (out[:, 12:] == 2).all()
        module.return_last = True
        assert torch.equal(module(pyramid, text), out)


def test_the_first_scale_asks_for_no_gradient():
    module = plain.ProgressiveFusion(C, 3)
    assert [p.requires_grad for p in module.scales] == [False, True, True]
    assert [k for k in module.state_dict() if k.startswith("scales")] == ["scales.0", "scales.1", "scales.2"]
    assert "fusion_stages.2.t2v_attn.in_proj_weight" in module.state_dict()
    kinds = {type(m) for m in fast.ProgressiveFusion(C, 1).modules()}
    assert fast.MultiheadAttention in kinds and nn.MultiheadAttention not in kinds


# HierarchicalPatchEmbedding.


@pytest.mark.parametrize("pos_grid", [None, (3, 4), (5, 2)])
def test_patches_are_projected_and_normed(pos_grid):
    one, two = pair("HierarchicalPatchEmbedding", pos_grid=pos_grid)
    image, truth = torch.randn(2, 3, 14, 16), wide(one)
    patches = F.unfold(image.double()[:, :, :12], 4, stride=4).transpose(1, 2)
    y = patches @ truth.projection.weight.flatten(1).T + truth.projection.bias
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = y * truth.norm.weight + truth.norm.bias
    if pos_grid is not None:
        y = y + upsample(truth.pos_embed, pos_grid, (3, 4))
    for module in (one, two):
        out, grid = module(image, return_grid=True)
        assert grid == (3, 4) and torch.equal(module(image), out)
        torch.testing.assert_close(out.double(), y, rtol=1e-4, atol=1e-4)
    one(image).sum().backward(), two(image).sum().backward()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert ("pos_embed" in one.state_dict()) == (pos_grid is not None)


# Refusals.


X = [torch.zeros(2, 16, 16), torch.zeros(2, 4, 8), torch.zeros(2, 1, 4)]
BAD = [
    (lambda r: r.CrossScaleFusion(0), ValueError, "CrossScaleFusion: hidden_dim: expected an int of at least 1; got 0"),
    (lambda r: r.CrossScaleFusion(16.0), TypeError, "hidden_dim"),
    (lambda r: r.CrossScaleFusion(2, 3), ValueError, "hidden_dim: expected at least 4 for 3 scales; got 2"),
    (lambda r: r.CrossScaleFusion(16, dims=(16, 8)), ValueError, "dims: expected 3 sizes"),
    (lambda r: r.CrossScaleFusion(16, dropout=1.5), ValueError, "dropout: expected a number from 0 to 1; got 1.5"),
    (lambda r: r.CrossScaleFusion(16, norm="batch"), ValueError, "norm: expected one of 'layernorm', 'none'"),
    (lambda r: r.CrossScaleFusion(16, norm_eps="1e-5"), TypeError, "norm_eps: expected a real number"),
    (lambda r: r.CrossScaleFusion(16, norm_eps=-1.0), ValueError, "norm_eps: expected a number from 0"),
    (lambda r: r.FlashMultiScaleAttention(scale=float("nan")), ValueError, "scale: expected a finite number; got nan"),
    (lambda r: r.CrossScaleFusion(16, act="tanh"), ValueError, "act"),
    (lambda r: r.CrossScaleFusion(16, align_corners=1), TypeError, "align_corners"),
    (lambda r: r.CrossScaleFusion(16)(X[0]), TypeError, "scale_features: expected a list of 3 tensors"),
    (lambda r: r.CrossScaleFusion(16)(X[:2]), ValueError, "scale_features: expected 3 tensors, one per scale; got 2"),
    (lambda r: r.CrossScaleFusion(16)([*X[:2], X[1]]), ValueError, r"scale_features\[2\]: expected 4 channels"),
    (lambda r: r.CrossScaleFusion(16)([*X[:2], X[2][:1]]), ValueError, r"scale_features\[2\]: expected the batch"),
    (
        lambda r: r.CrossScaleFusion(16)([X[0][:, :15], *X[1:]]),
        ValueError,
        r"\[0\]: expected a square number of tokens",
    ),
    (lambda r: r.CrossScaleFusion(16)(X, [(4, 4), (2, 2)]), ValueError, "grid_sizes: expected 3 tuples"),
    (lambda r: r.CrossScaleFusion(16)(X, [(4, 4), (2, 2), (1,)]), ValueError, r"grid_sizes\[2\]: expected 2 sizes"),
    (lambda r: r.CrossScaleFusion(16)(X, [(4, 4), (2, 3), (1, 1)]), ValueError, r"\[1\]: expected 6 tokens"),
    (lambda r: r.AdaptiveFusion(2, dims=(3,)), ValueError, "AdaptiveFusion: dims"),
    (lambda r: r.AdaptiveFusion(2)([torch.zeros(2, 3), torch.zeros(2, 4)]), ValueError, r"\[1\]: expected 3 channels"),
    (lambda r: r.AdaptiveFusion(1)([torch.zeros(2, 3)], [(1,)]), ValueError, "grid_sizes: expected None"),
    (
        lambda r: r.AdaptiveGlobalPooling(8, ("mean", "min")),
        ValueError,
        "pool_types: expected names out of .*got 'min'",
    ),
    (lambda r: r.AdaptiveGlobalPooling(8, ()), ValueError, "pool_types"),
    (lambda r: r.AdaptiveGlobalPooling(8, ("max", "max")), ValueError, "pool_types: expected at least one pool, each"),
    (lambda r: r.AdaptiveGlobalPooling(8, "mean"), TypeError, "pool_types"),
    (lambda r: r.AdaptiveGlobalPooling(8)(torch.zeros(2, 3, 7)), ValueError, "features: expected 8 channels"),
    (lambda r: r.AdaptiveGlobalPooling(8)(torch.zeros(2, 3, 8), torch.ones(2, 3)), TypeError, "mask"),
    (lambda r: r.AdaptiveGlobalPooling(8)(torch.zeros(2, 3, 8), torch.ones(3, 2).bool()), ValueError, "mask: expected"),
    (lambda r: r.ProgressiveFusion(16, interp="cubic"), ValueError, "interp"),
    (lambda r: r.ProgressiveFusion(12), ValueError, "num_heads: expected a divisor of hidden_dim = 12; got 8"),
    (lambda r: r.ProgressiveFusion(16, 2, stages=[Rows()]), ValueError, "stages: expected 2 modules; got 1"),
    (lambda r: r.ProgressiveFusion(16, 1, stages=Rows()), TypeError, "stages"),
    (lambda r: r.ProgressiveFusion(16, 1, stages=[len]), TypeError, r"stages\[0\]"),
    (lambda r: r.ProgressiveFusion(16, 2)([X[0]], X[0]), ValueError, "vision_pyramid: expected 2 tensors"),
    (lambda r: r.ProgressiveFusion(16, 1)([X[0]], X[0], [(4, 4)]), ValueError, "grid_sizes: expected None"),
    (
        lambda r: r.ProgressiveFusion(16, 2)([X[0], X[0][:, :0]], X[0]),
        ValueError,
        r"vision_pyramid\[1\]: expected a tok",
    ),
    (lambda r: r.ProgressiveFusion(16, 1)([X[0]], X[0][:1]), ValueError, "text: expected the batch"),
    (
        lambda r: r.HierarchicalPatchEmbedding(3, 8, 4)(torch.zeros(1, 3, 3, 8)),
        ValueError,
        "x: expected an image of at",
    ),
    (lambda r: r.HierarchicalPatchEmbedding(3, 8, 4)(torch.zeros(1, 1, 8, 8)), ValueError, "x: expected 3 channels"),
    (lambda r: r.HierarchicalPatchEmbedding(3, 8, 4)(torch.zeros(3, 8, 8)), ValueError, "x: expected 4 dimensions"),
    (lambda r: r.HierarchicalPatchEmbedding(3, 8, 4, pos_grid=(2,)), ValueError, "pos_grid: expected 2 sizes"),
]


@pytest.mark.parametrize("call, kind, text", BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_call_names_the_argument(call, kind, text):
    for room in (plain, fast):
        with pytest.raises(kind, match=text):
            call(room)


class Short(nn.Module):
    def forward(self, vision, text):
        return vision[:, 1:]


def test_a_stage_that_returns_something_else_is_named():
    for room in (plain, fast):
        with pytest.raises(ValueError, match=r"result of stages\[1\]: expected 2 samples of 4 or 7 tokens"):
            room.ProgressiveFusion(8, 2, stages=[Rows(), Short()])([X[1], X[1]], torch.zeros(2, 3, 8))


# In a model.


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.ModuleList(
            plain.HierarchicalPatchEmbedding(3, c, p, pos_grid=(2, 2) if p == 4 else None)
            for c, p in ((16, 4), (8, 8), (4, 16))
        )
        self.fuse = plain.CrossScaleFusion(C, dropout=0.0)
        self.mix = plain.AdaptiveFusion(3, hidden_dim=C)
        self.progress = plain.ProgressiveFusion(C, 2, dropout=0.0)
        self.pool = plain.AdaptiveGlobalPooling(C)

    def forward(self, images):
        x, grids = zip(*[embed(images, return_grid=True) for embed in self.patches], strict=True)
        fused, mixed = self.fuse(x, grids), self.mix(x, grids)
        return self.pool(self.progress([mixed, fused], x[0])[-1])


SWAPPED = ["patches.0", "fuse", "mix", "progress", *(f"progress.fusion_stages.{i}.{a}_attn" for i in (0, 1)
           for a in ("v2t", "t2v")), "pool"]  # fmt: skip


def test_accelerate_and_restore():
    model, images = Model(), torch.randn(2, 3, 32, 48)
    randomise(model)
    truth, expected = wide(model)(images.double()), model(images)
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    fired = []
    handle = model.fuse.register_forward_hook(lambda *_: fired.append(1))
    report = hivilt.accelerate(model)
    assert [e.path for e in report.replaced] == SWAPPED
    assert {e.path: e.reason for e in report.skipped} == {
        f"patches.{i}": "without a position table there is nothing to do faster" for i in (1, 2)
    }
    assert [e.detail for e in report.replaced if e.path in ("fuse", "pool")] == ["scale_fusion", "token_pool"]
    assert all(type(model.get_submodule(p)).__module__.startswith("hivilt.nn.") for p in SWAPPED)
    assert list(state) == list(model.state_dict())
    out = model(images)
    assert fired and not torch.equal(out, expected)
    as_exact(out.detach(), expected.detach(), truth.detach())
    assert hivilt.accelerate(model).replaced == []
    handle.remove()
    assert hivilt.restore(model) == SWAPPED
    for (kind, old), m in zip(before, model.modules(), strict=True):
        assert type(m) is kind and list(m.__dict__) == list(old) and all(m.__dict__[n] is old[n] for n in old)
    assert torch.equal(model(images), expected)


def subclassed():
    return type("Mine", (plain.CrossScaleFusion,), {})(C)


def hooked():
    module = plain.AdaptiveGlobalPooling(C)
    module.attn_pool[0].register_forward_hook(lambda *_: None)
    return module


def adapted():
    module = plain.AdaptiveFusion(2, hidden_dim=C)
    module.projections[1] = lora(module.projections[1])
    return module


def overridden():
    module = plain.ProgressiveFusion(C, 2)
    module.forward = lambda *args: args
    return module


def other_activation():
    module = plain.CrossScaleFusion(C)
    module.fusion[2] = nn.Tanh()
    return module


@pytest.mark.parametrize(
    "make, text",
    [
        (subclassed, "a subclass"),
        (hooked, "attn_pool.0 carries hooks"),
        (adapted, "projections.1 was replaced by a Lora"),
        (overridden, "forward was replaced on this instance"),
        (other_activation, "fusion.2 was replaced by a Tanh"),
        (lambda: fast.CrossScaleFusion(C), "already a hivilt module"),
    ],
    ids=["subclass", "hook", "adapter", "forward", "activation", "ours"],
)
def test_what_accelerate_skips(make, text):
    model = nn.ModuleDict({"it": make()})
    kind = type(model["it"])
    skipped = {e.path: e.reason for e in hivilt.accelerate(model).skipped}
    assert text in skipped["it"] and type(model["it"]) is kind
    hivilt.restore(model)
    assert type(model["it"]) is kind


def test_options_of_attention_concern_attention_alone():
    model = Model()
    with pytest.raises(ValueError, match="paths of attention modules"):
        hivilt.accelerate(model, topk={"fuse": 3})
    report = hivilt.accelerate(model, topk=2, filter=lambda path, _: path != "mix")
    assert [e.reason for e in report.skipped if e.path == "mix"] == ["left out by filter"]
    assert model.progress.fusion_stages[0].v2t_attn.topk == 2 and "topk" not in model.fuse.__dict__
    assert any("need_weights" in note for note in report.notes)
    assert hivilt.accelerate(nn.ModuleList([plain.AdaptiveGlobalPooling(8)])).notes == []
