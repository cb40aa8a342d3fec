"""Attention among scales, the way back to the scales, and the embeddings of all scales, against loops in float64."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from multi_scale import as_exact, gradients, kernels_on_cpu, randomise
from torch import nn

import hivilt
from hivilt import nn as fast
from hivilt.reference import modules as plain

BACKENDS = ["reference", "auto", "cpu"] if kernels_on_cpu() else ["reference"]
GRIDS = {
    "one": [(5, 5)],
    "two": [(4, 6), (2, 3)],
    "seed-at-224": [(14, 14), (7, 7), (3, 3)],
    "not-whole": [(30, 17), (15, 9), (8, 5)],
    "four": [(6, 9), (3, 5), (2, 3), (1, 1)],
}
C, H = 16, 4


@pytest.fixture(params=BACKENDS)
def backend(request):
    with hivilt.use_backend(request.param):
        yield request.param


def tokens(grids, batch=2, dtype=torch.float32):
    return [torch.randn(batch, math.prod(g), C >> s, dtype=dtype) for s, g in enumerate(grids)]


def build(room, name, *args, **options):
    torch.manual_seed(3)
    module = getattr(room, name)(*args, **options)
    randomise(module)
    return module.eval()


def cells(mask, grid, out_grid):
    """bool [B, prod(out_grid)]: whether any of the first grid's tokens inside a cell is kept, cell by cell."""
    mask = mask.view(-1, *grid)
    bounds = [
        [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(grid, out_grid, strict=True)
    ]  # fmt: skip
    return torch.stack(
        [mask[:, a:b, c:d].flatten(1).any(1) for a, b in bounds[0] for c, d in bounds[1]], 1
    )  # fmt: skip


def attention(q, k, v, keep):
    """Sample by sample, head by head and query by query over the keys that are kept: [B, N, C] of [B, N, C]."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    rows = []
    for b in range(q.shape[0]):
        kept = torch.arange(k.shape[1]) if keep is None else keep[b].nonzero()[:, 0]
        heads = []
        for qh, kh, vh in zip(q[b].chunk(H, 1), k[b][kept].chunk(H, 1), v[b][kept].chunk(H, 1), strict=True):
            if not len(kept):
                heads.append(torch.zeros_like(qh))
                continue
            e = torch.exp((s := qh @ kh.T / math.sqrt(C // H)) - s.max(1, keepdim=True).values.detach())
            heads.append(e / e.sum(1, keepdim=True) @ vh)
        rows.append(torch.cat(heads, 1))
    return torch.stack(rows) if rows else out


def by_hand(module, xs, masks=None):
    outputs = []
    for s, x in enumerate(xs):
        keep = None if masks is None else masks[s]
        if keep is not None:
            x = torch.where(keep[..., None], x, 0.0)
        qkv, proj = module.qkv_projections[s], module.projs[s]
        q, k, v = (x @ w.T + b for w, b in zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True))
        out = attention(q, k, v, keep)
        if keep is not None:
            out = out * keep[..., None]
        outputs.append(out @ proj.weight.T + proj.bias)
    return outputs


class Joined(nn.Module):
    """A module whose results, one per scale, are one tensor [B, sum N_s C_s]."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        found = self.module(*args, **options)
        found = found["scale_features"] if isinstance(found, dict) else found
        return torch.cat([x.flatten(1) for x in found], 1)


def root_mean_square(grads, truth):
    """Error of all gradients, each in parts of its largest number; of one alone plain PyTorch may be lucky."""
    parts = [((grads[n].double() - t) / t.abs().max()).flatten() for n, t in truth.items() if t.abs().max() > 1e-6]
    return float(torch.cat(parts).square().mean().sqrt())


def check(one, two, truth, xs, *args, exact, **options):
    """Results and gradients of two, as exact as those of one; of one in float64, equal to ``exact(truth, xs)``."""
    wide = [x.double() for x in xs]
    leaves = [x.clone().requires_grad_() for x in wide]
    expected = exact(truth.module if isinstance(truth, Joined) else truth, leaves)
    expected = torch.cat([x.flatten(1) for x in expected], 1) if isinstance(expected, list) else expected
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weight).sum().backward()
    of_exact = {f"input {i}": x.grad for i, x in enumerate(leaves)}
    of_exact |= {name: p.grad for name, p in truth.named_parameters()}
    assert all(g is not None for g in of_exact.values())
    of_exact = {name: g.clone() for name, g in of_exact.items()}
    with hivilt.use_backend("auto"):
        out, of_truth = gradients(truth, wide, weight, *args, **options)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-11, atol=1e-11)
    for name, g in of_truth.items():
        torch.testing.assert_close(g, of_exact[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    out, of_plain = gradients(one, xs, weight, *args, **options)
    ours, found = gradients(two, xs, weight, *args, **options)
    as_exact(out, out, expected.detach())
    as_exact(ours, out, expected.detach())
    error = [root_mean_square(grads, of_exact) for grads in (of_plain, found)]
    assert error[1] <= 2 * error[0] + 2**-24, error


# MultiScaleAttention.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_every_scale_attends_to_itself(backend, name, masked):
    grids = GRIDS[name]
    if backend == "reference" and name == "not-whole":
        grids = [(9, 5), (5, 3), (3, 2)]
    one, two = (build(room, "MultiScaleAttention", C, H, 0.5, len(grids)) for room in (plain, fast))
    xs, options, masks = tokens(grids), {}, None
    if masked:
        mask = torch.rand(2, math.prod(grids[0])) < 0.4
        mask[1, : mask.shape[1] // 2] = False
        masks = [mask, *(cells(mask, grids[0], g) for g in grids[1:])]
        assert len(grids) < 3 or not all(m.all() for m in masks[1:])
        options = {"attention_mask": mask, "grid_sizes": grids}
        listed = two(xs, attention_mask=masks)["scale_features"]
        derived = two(xs, **options)["scale_features"]
        assert all(torch.equal(a, b) for a, b in zip(listed, derived, strict=True))
    truth = Joined(copy.deepcopy(one).double())
    check(Joined(one), Joined(two), truth, xs, exact=lambda module, x: by_hand(module, x, masks), **options)


@pytest.mark.parametrize("room", [plain, fast], ids=["plain", "fast"])
def test_weights_are_probabilities_and_give_the_same_result(room):
    module, xs = build(room, "MultiScaleAttention", C, H, 0.0, 2), tokens(GRIDS["two"], 3)
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[1, 10:], mask[2] = False, False
    dense, found = module(xs), module(xs, True)
    assert dense["attention_weights"] is None and list(found) == ["scale_features", "attention_weights"]
    for s, (x, weights) in enumerate(zip(xs, found["attention_weights"], strict=True)):
        q, k, _ = (t.unflatten(-1, (H, C // H)).transpose(1, 2) for t in module.qkv_projections[s](x).chunk(3, -1))
        torch.testing.assert_close(weights, ((q @ k.mT) / math.sqrt(C // H)).softmax(-1))
        torch.testing.assert_close(found["scale_features"][s], dense["scale_features"][s], rtol=1e-5, atol=1e-5)
    hidden = module(xs, True, mask, GRIDS["two"])
    for s, weights in enumerate(hidden["attention_weights"]):
        assert (weights[2] == 0).all() and torch.allclose(weights[0].sum(-1), torch.ones(()), atol=1e-5)
        assert torch.equal(weights[1].sum(-1) > 0.5, cells(mask, (4, 6), GRIDS["two"][s])[1].expand(H, -1))
        without = module(xs, False, mask, GRIDS["two"])["scale_features"][s]
        torch.testing.assert_close(hidden["scale_features"][s], without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["MultiScaleAttention", "CrossScaleAttention"])
def test_what_padding_holds_does_not_matter(backend, name):
    module, grids = build(fast, name, C, H, 0.0, 2), GRIDS["two"]
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[1, 8:], mask[2] = False, False
    masks = [mask, cells(mask, *grids)]
    how = {"attention_mask": mask.long(), "grid_sizes": grids} if name[0] == "M" else {"masks": masks}
    module, xs = Joined(module) if name[0] == "M" else module, tokens(grids, 3)
    clean, of_clean = gradients(module, xs, torch.ones(()), **how)
    dirty = [torch.where(m[..., None], x, math.nan) for x, m in zip(xs, masks, strict=True)]
    out, found = gradients(module, dirty, torch.ones(()), **how)
    assert torch.equal(out, clean) and out.isfinite().all()
    assert all(torch.equal(found[key], of_clean[key]) and found[key].isfinite().all() for key in found)
    assert all((found[f"input {s}"][~m] == 0).all() for s, m in enumerate(masks))


def test_masked_tokens_give_the_bias():
    module, xs = build(fast, "MultiScaleAttention", C, H, 0.0, 2), tokens(GRIDS["two"])
    out = module(xs, False, torch.zeros(2, 24, dtype=torch.bool), GRIDS["two"])["scale_features"]
    assert all(torch.equal(x, p.bias.expand_as(x)) for x, p in zip(out, module.projs, strict=True))


def test_a_batch_is_its_samples_one_by_one(backend):
    module, grids = build(fast, "MultiScaleAttention", C, H), [(9, 8), (5, 4), (2, 2)]
    xs, mask = tokens(grids, 3), torch.rand(3, 72) < 0.7
    whole = module(xs, False, mask, grids)["scale_features"]
    for b in range(3):
        alone = module([x[b : b + 1] for x in xs], False, mask[b : b + 1], grids)["scale_features"]
        assert all(torch.allclose(x[b : b + 1], y, atol=1e-6) for x, y in zip(whole, alone, strict=True))


def test_the_first_scales_alone():
    module, xs = build(fast, "MultiScaleAttention", C, H), tokens(GRIDS["seed-at-224"])
    some = module(xs[:2], num_scales=2)["scale_features"]
    assert len(some) == 2
    assert all(torch.equal(a, b) for a, b in zip(some, module(xs)["scale_features"], strict=False))


def test_dropout_is_of_probabilities_and_its_mean_is_kept(backend):
    module = build(fast, "MultiScaleAttention", C, H, 0.5, 1)
    with torch.no_grad():  # values of one and no other term: a result is the sum of the probabilities that stay
        module.qkv_projections[0].weight[2 * C :].zero_()
        module.qkv_projections[0].bias[2 * C :].fill_(1.0)
        module.projs[0].weight.copy_(torch.eye(C))
        module.projs[0].bias.zero_()
    x = [torch.randn(16, 100, C)]
    torch.testing.assert_close(module(x)["scale_features"][0], torch.ones(16, 100, C))
    out = module.train()(x)["scale_features"][0]
    assert 0.97 < float(out.detach().mean()) < 1.03 and float(out.detach().std()) > 0.05
    weights = module(x, True)["attention_weights"][0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(16, H, 100))


class SeedAttention(nn.Module):
    """The layer as first written."""

    def __init__(self, hidden_dim, num_heads, dropout=0.1):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_dim // num_heads
        self.qkv_projections = nn.ModuleList(nn.Linear(hidden_dim // 2**i, 3 * hidden_dim) for i in range(3))
        self.proj, self.dropout = nn.Linear(hidden_dim, hidden_dim), nn.Dropout(dropout)

    def forward(self, scale_features, attention_mask=None):
        outputs = []
        for feat, project in zip(scale_features, self.qkv_projections, strict=True):
            B, N, _ = feat.shape
            q, k, v = project(feat).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            attn = (q @ k.transpose(-2, -1)) * self.head_dim**-0.5
            attn = self.dropout((attn if attention_mask is None else attn + attention_mask).softmax(-1))
            outputs.append(self.proj((attn @ v).transpose(1, 2).reshape(B, N, -1)))
        return {"scale_features": outputs, "attention_weights": attn}


@pytest.mark.parametrize("room", [plain, fast], ids=["plain", "fast"])
def test_compat_is_the_layer_as_first_written(room):
    seed, module = SeedAttention(C, H).double(), room.MultiScaleAttention(C, H, compat="seed").double()
    module.load_state_dict(seed.state_dict(), strict=True)
    xs = tokens([(3, 3)] * 3, dtype=torch.float64)
    for mask in (None, torch.randn(2, 1, 9, 9, dtype=torch.float64)):
        torch.manual_seed(5)
        expected = seed(xs, mask)
        torch.manual_seed(5)
        found = module(xs, mask) if mask is not None else module(xs)
        torch.testing.assert_close(found["attention_weights"], expected["attention_weights"])
        for a, b in zip(found["scale_features"], expected["scale_features"], strict=True):
            assert a.shape[-1] == C
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compat", [None, "seed"])
@pytest.mark.parametrize("room", [plain, fast], ids=["plain", "fast"])
def test_embeddings_and_fusions_are_those_first_written(room, compat):
    """Names and results, strictly loaded; by default too, but that ``compat`` mixes tensors of any one shape."""

    class SeedPatches(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection, self.norm = nn.Conv2d(3, C, 4, 4), nn.LayerNorm(C)

        def forward(self, x):
            return self.norm(self.projection(x).flatten(2).transpose(1, 2))

    class SeedFusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion = nn.Sequential(nn.Linear(C + C // 2, C), nn.LayerNorm(C), nn.GELU(), nn.Dropout(0.1))

        def forward(self, fine, coarse):
            maps = coarse.transpose(1, 2).reshape(2, C // 2, 2, 2)
            maps = F.interpolate(maps, size=(4, 4), mode="bilinear", align_corners=False)
            return self.fusion(torch.cat([fine, maps.flatten(2).transpose(1, 2)], -1))

    patches, fusion, weights = SeedPatches(), SeedFusion().eval(), nn.Parameter(torch.randn(3))
    module = room.HierarchicalPatchEmbedding(3, C, 4, compat=compat)
    module.load_state_dict(patches.state_dict(), strict=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(module(x), patches(x))
    module = room.CrossScaleFusion(C, 2, compat=compat).eval()
    module.load_state_dict(fusion.state_dict(), strict=True)
    xs = [torch.randn(2, 16, C), torch.randn(2, 4, C // 2)]
    torch.testing.assert_close(module(xs), fusion(*xs))
    mix = room.AdaptiveFusion(3, compat=compat)
    mix.load_state_dict({"scale_weights": weights}, strict=True)
    for shape in ((2, 5, C), (2, C), *([(2, C, 4, 3), (5,)] if compat else [])):
        xs = [torch.randn(shape) for _ in range(3)]
        torch.testing.assert_close(mix(xs), sum(w * f for w, f in zip(F.softmax(weights, 0), xs, strict=True)))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda m: m.AdaptiveFusion(3, compat="seeds"), "compat: expected one of 'seed'; got 'seeds'"),
        (lambda m: m.AdaptiveFusion(3, hidden_dim=C, compat="seed"), "hidden_dim: expected None, because compat"),
        (lambda m: m.CrossScaleFusion(C, norm="none", compat="seed"), "norm: expected 'layernorm', because compat"),
        (lambda m: m.HierarchicalPatchEmbedding(3, C, 4, pos_grid=(2, 2), compat="seed"), "pos_grid: expected None"),
        (lambda m: m.AdaptiveFusion(2, compat="seed")([torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)]),
         r"scale_features\[1\]: expected shape \(2, 3, 4\)"),
    ],
    ids=["name", "projections", "norm", "table", "shapes"],
)  # fmt: skip
def test_compat_allows_no_options(make, said):
    for room in (plain, fast):
        with pytest.raises(ValueError, match=said):
            make(room)


# CrossScaleAttention.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["two", "seed-at-224", "four"])
def test_the_finest_attend_to_all_coarser(backend, name, masked):
    grids = GRIDS[name]
    one, two = (build(room, "CrossScaleAttention", C, H, 0.5, len(grids)) for room in (plain, fast))
    xs, masks, options = tokens(grids), None, {}
    if masked:
        mask = torch.rand(2, math.prod(grids[0])) < 0.3
        masks = [mask, *(cells(mask, grids[0], g) for g in grids[1:])]
        xs = [x * m[..., None] for x, m in zip(xs, masks, strict=True)]
        options = {"masks": masks}

    def exact(module, xs):
        if masks is not None:
            xs = [x * m[..., None] for x, m in zip(xs, masks, strict=True)]
        normed = [F.layer_norm(x, x.shape[-1:], n.weight, n.bias) for x, n in zip(xs, module.norms, strict=True)]
        q = normed[0] @ module.q_proj.weight.T + module.q_proj.bias
        kv = [x @ p.weight.T + p.bias for x, p in zip(normed[1:], module.kv_projections, strict=True)]
        k, v = torch.cat(kv, 1).chunk(2, -1)
        out = attention(q, k, v, None if masks is None else torch.cat(masks[1:], 1))
        out = out if masks is None else out * masks[0][..., None]
        return xs[0] + out @ module.out_proj.weight.T + module.out_proj.bias

    check(one, two, copy.deepcopy(one).double(), xs, exact=exact, **options)
    assert torch.equal(two(xs[:1], num_scales=1), xs[0])


# ScaleExtraction.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_extraction_averages_areas(backend, name, masked):
    grids = GRIDS[name]
    one, two = (build(room, "ScaleExtraction", C, len(grids)) for room in (plain, fast))
    x, options = [torch.randn(2, math.prod(grids[0]), C)], {}
    mask = torch.rand(2, math.prod(grids[0])) < (0.5 if masked else 2.0)
    if masked:
        options["masks"] = [mask, *(cells(mask, grids[0], g) for g in grids[1:])]

    def exact(module, xs):
        fine, kept = xs[0].unflatten(1, grids[0]), mask.unflatten(1, grids[0])
        outputs = []
        for proj, grid in zip(module.projs, grids, strict=True):
            (rows, columns), means = grid, []
            for i in range(rows):
                for j in range(columns):
                    a, b = i * grids[0][0] // rows, -(-(i + 1) * grids[0][0] // rows)
                    c, d = j * grids[0][1] // columns, -(-(j + 1) * grids[0][1] // columns)
                    count = kept[:, a:b, c:d].sum((1, 2)).clamp(min=1)[:, None]
                    means.append((fine[:, a:b, c:d] * kept[:, a:b, c:d, None]).sum((1, 2)) / count)
            outputs.append(torch.stack(means, 1) @ proj.weight.T + proj.bias)
        return outputs

    class First(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, xs, **options):
            return torch.cat([t.flatten(1) for t in self.module(xs[0], grids, **options)], 1)

    truth = copy.deepcopy(one).double()
    check(First(one), First(two), First(truth), x, exact=lambda m, xs: exact(truth, xs), **options)


# The thin ones.


@pytest.mark.parametrize("masked", [False, True])
def test_flash_layout(backend, masked):
    q, k, v = torch.randn(2, 70, H, 8), torch.randn(2, 65, H, 8), torch.randn(2, 65, H, 12)
    mask = (torch.rand(2, 65) < 0.5) if masked else None
    keep = None if mask is None else mask[:, None, None]
    for room in (plain, fast):
        for scale in (None, 0.7):
            heads = [t.transpose(1, 2).double() for t in (q, k, v)]
            expected = F.scaled_dot_product_attention(*heads, keep, scale=scale).transpose(1, 2)
            out = room.FlashMultiScaleAttention(0.3, scale).eval()(q, k, v, mask)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_embeddings_of_all_scales_are_those_of_each(scales):
    images = torch.randn(2, 3, 35, 44)
    for room in (plain, fast):
        module = build(room, "EfficientScaleProcessor", scales, C, 4, pos_size=(32, 32))
        found, grids = module(images, True)
        assert len(found) == scales and grids == [(35 // (4 << s), 44 // (4 << s)) for s in range(scales)]
        for s, (x, grid) in enumerate(zip(found, grids, strict=True)):
            part, side = module[f"scale_{s}"], 32 // (4 << s)
            maps = F.conv2d(images, part.projection.weight, part.projection.bias, stride=4 << s)
            expected = F.layer_norm(maps.flatten(2).mT, (C >> s,), part.norm.weight, part.norm.bias)
            table = part.pos_embed.mT.unflatten(2, (side, side))
            table = F.interpolate(table, size=grid, mode="bilinear", align_corners=False)
            torch.testing.assert_close(x, expected + table.flatten(2).mT, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module(images, num_scales=1)[0], found[0])
        sum(x.sum() for x in module(images)).backward()
        assert all(p.grad is not None for p in module.parameters())


# All of them.

MODULES = {
    "MultiScaleAttention": (C, H),
    "CrossScaleAttention": (C, H),
    "ScaleExtraction": (C, 3),
    "FlashMultiScaleAttention": (),
    "EfficientScaleProcessor": (3, C, 4),
}


@pytest.mark.parametrize("name", MODULES)
def test_twins_are_alike_copy_and_pickle(name):
    one, two = (build(room, name, *MODULES[name]) for room in (plain, fast))
    assert isinstance(two, type(one)) and type(two).__mro__[1] is type(one) and list(one.state_dict()) == list(
        two.state_dict()
    )  # fmt: skip
    for twin in (copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert type(twin) is type(two) and all(
            torch.equal(a, b) for a, b in zip(twin.state_dict().values(), two.state_dict().values(), strict=True)
        )


def test_names_of_the_parameters():
    assert list(plain.MultiScaleAttention(C, H).state_dict()) == [
        f"{part}.{s}.{kind}" for part in ("qkv_projections", "projs") for s in range(3) for kind in ("weight", "bias")
    ]
    shapes = {k: tuple(v.shape) for k, v in plain.MultiScaleAttention(C, H).state_dict().items()}
    assert shapes["qkv_projections.2.weight"] == (3 * C, C // 4) and shapes["projs.2.weight"] == (C // 4, C)
    assert list(plain.MultiScaleAttention(C, H, compat="seed").state_dict())[-2:] == ["proj.weight", "proj.bias"]


def test_accelerate_swaps_them_and_spares_the_first_version():
    model = nn.ModuleDict({name: build(plain, name, *args) for name, args in MODULES.items()})
    model["seed"] = plain.MultiScaleAttention(C, H, compat="seed")
    report = hivilt.accelerate(model)
    assert {e.path for e in report.replaced} == set(MODULES) - {"EfficientScaleProcessor"}
    assert "compat='seed'" in next(e.reason for e in report.skipped if e.path == "seed")
    hivilt.restore(model)
    assert all(type(model[name]) is getattr(plain, name) for name in MODULES)


@pytest.mark.parametrize("name", ["MultiScaleAttention", "CrossScaleAttention"])
def test_fullgraph_compile(name):
    module, xs = build(fast, name, C, H), tokens([(9, 9), (4, 4), (2, 2)])
    run = Joined(module) if name[0] == "M" else module
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(xs), run(xs), rtol=1e-5, atol=1e-5)


X = [torch.zeros(2, 16, 16), torch.zeros(2, 4, 8), torch.zeros(2, 1, 4)]
BAD = {
    "heads": (lambda: plain.MultiScaleAttention(C, 3), ValueError, "num_heads: expected a divisor of hidden_dim = 16"),
    "width": (lambda: plain.MultiScaleAttention(2, 1), ValueError, "hidden_dim"),
    "compat": (lambda: plain.MultiScaleAttention(C, H, compat="old"), ValueError, "compat"),
    "dropout": (lambda: plain.MultiScaleAttention(C, H, 1.5), ValueError, "dropout"),
    "four": (lambda: plain.MultiScaleAttention(C, H)([*X, X[2]]), ValueError, "features: expected 3 tensors"),
    "channels": (lambda: plain.MultiScaleAttention(C, H)([X[0], X[0], X[2]]), ValueError, r"features\[1\]: expected 8"),
    "flag": (lambda: plain.MultiScaleAttention(C, H)(X, 1), TypeError, "need_weights: expected a bool"),
    "mask": (lambda: plain.MultiScaleAttention(C, H)(X, False, torch.zeros(2, 16)), TypeError, "attention_mask"),
    "mask-list": (lambda: plain.MultiScaleAttention(C, H)(X, False, [None]), ValueError, "attention_mask: expected 3"),
    "mask-shape": (
        lambda: plain.MultiScaleAttention(C, H)(X, False, torch.ones(2, 9).bool()), ValueError, "attention_mask",
    ),
    "grids": (
        lambda: plain.MultiScaleAttention(C, H)(X, False, torch.ones(2, 16).bool(), [(4, 4), (2, 2), (1, 2)]),
        ValueError, r"features\[2\]",
    ),
    "scales": (lambda: plain.MultiScaleAttention(C, H)(X, num_scales=4), ValueError, "num_scales: expected at most 3"),
    "coarser": (lambda: plain.CrossScaleAttention(C, H, 0.0, 1), ValueError, "num_scales: expected at least 2"),
    "masks": (lambda: plain.CrossScaleAttention(C, H)(X, masks=[]), ValueError, "masks: expected 3"),
    "fused": (lambda: plain.ScaleExtraction(C)(X[1], [(2, 2)]), ValueError, "fused: expected 16 channels"),
    "many": (lambda: plain.ScaleExtraction(C)(X[0], [(4, 4)] * 4), ValueError, "grid_sizes: expected 1 to 3"),
    "rank": (lambda: plain.ScaleExtraction(C)(X[0], [(4, 4), (2,)]), ValueError, r"grid_sizes\[1\]"),
    "k": (lambda: plain.FlashMultiScaleAttention()(*[torch.zeros(1, n, 2, 4) for n in (3, 4)],
                                                    torch.zeros(1, 5, 2, 4)), ValueError, "v: expected shape"),
    "image": (lambda: plain.EfficientScaleProcessor(3, C, 4)(torch.zeros(1, 3, 15, 99)), ValueError, "x: expected an"),
    "positions": (lambda: plain.EfficientScaleProcessor(3, C, 4, pos_size=(8, 99)), ValueError, "pos_size"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        call()
