"""hivilt.nn.SegformerFusionHead: SegFormer's head as transformers has it, with random weights, in float64 the truth."""

import copy
import io
import pickle
import re

import fresh
import pytest
import torch
from multi_scale import BACKENDS, as_exact, gradients, randomise
from torch import nn

import hivilt
from hivilt.nn import SegformerFusionHead, replace_segformer_heads

transformers = pytest.importorskip("transformers", reason="pip install 'hivilt[hf]'")
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead  # noqa: E402

WIDTHS, D, LABELS = [8, 16, 20, 32], 24, 5
GRIDS = {
    "square": [(8, 8), (4, 4), (2, 2), (1, 1)],
    "wide": [(6, 10), (3, 5), (2, 3), (1, 2)],
    "one-size": [(3, 5)] * 4,
}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with hivilt.use_backend(request.param):
        yield request.param


def config_of(**options):
    return transformers.SegformerConfig(
        hidden_sizes=WIDTHS, decoder_hidden_size=D, num_labels=LABELS, depths=[1] * 4, num_attention_heads=[1, 2, 2, 4],
        classifier_dropout_prob=options.pop("dropout", 0.0), **options,
    )  # fmt: skip


def head_of(dtype=torch.float32, **options):
    head = SegformerDecodeHead(config_of(**options))
    randomise(head)
    return head.eval().to(dtype)


def maps_of(grids="wide", batch=2, dtype=torch.float32):
    return [torch.randn(batch, c, *grid).to(dtype) for c, grid in zip(WIDTHS, GRIDS[grids], strict=True)]


def away_from_the_kink(head, maps):
    """Shifts every channel far above or below 0, where rounding does not decide what the ReLU lets through."""
    seen, twin = [], copy.deepcopy(head)
    twin.batch_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        twin(maps)
        sign = torch.tensor([1.0, -1.0]).repeat(D // 2)
        head.batch_norm.bias.add_((2.0 * sign * seen[0].float().abs().max()).to(head.batch_norm.bias.dtype))


def wide(head):
    return copy.deepcopy(head).double()


def doubles(maps):
    return [x.double() for x in maps]


def check_equal(head, maps):
    """A head without gradients against the plain one."""
    plain = copy.deepcopy(head)
    plain.__class__ = SegformerDecodeHead
    with torch.no_grad():
        as_exact(head(maps), plain(maps), wide(plain)(doubles(maps)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grids", GRIDS)
def test_eval_equals_transformers(grids, batch, dtype):
    head, maps = head_of(dtype), maps_of(grids, batch, dtype)
    ours = SegformerFusionHead.from_hf(head)
    with torch.no_grad():
        out = ours(maps)
        assert out.shape == (batch, LABELS, *GRIDS[grids][0]) and out.is_contiguous()
        as_exact(out, head(maps), wide(head)(doubles(maps)))
        assert torch.equal(ours(tuple(maps)), out)
        strided = [x.to(memory_format=torch.channels_last) for x in maps]
        as_exact(ours(strided), head(strided), wide(head)(doubles(maps)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen-norm"])
def test_gradients_and_statistics_equal_transformers(mode, dtype):
    head, maps = head_of(dtype), maps_of("wide", 3, dtype)
    head.train(mode != "eval")
    if mode == "frozen-norm":
        head.batch_norm.eval()
    if dtype == torch.bfloat16:
        away_from_the_kink(head, maps)
    plain, truth = copy.deepcopy(head), wide(head)
    ours = SegformerFusionHead.from_hf(head)
    weight = torch.randn(3, LABELS, *GRIDS["wide"][0], dtype=torch.float64)
    out, found = gradients(ours, maps, weight)
    expected, of_plain = gradients(plain, maps, weight)
    exact, of_truth = gradients(truth, doubles(maps), weight)
    as_exact(out, expected, exact)
    assert set(found) == set(of_plain) and len(found) == 4 + len(list(head.parameters()))
    scale = {name: float(g.abs().max()) for name, g in of_truth.items()}
    for name in found:
        if mode == "train" and name.endswith("proj.bias"):
            # A constant added before batch statistics changes nothing: the gradient is 0 but for rounding.
            assert scale[name] < 1e-9
            unit = 1e-5 if dtype == torch.float32 else 0.5
            assert float(found[name].abs().max()) <= unit * scale["batch_norm.bias"]
        else:
            as_exact(found[name], of_plain[name], of_truth[name], name)
    before = dict(head_of(dtype).named_buffers())
    for (name, ours_now), plain_now, exact_now in zip(
        head.named_buffers(), plain.buffers(), truth.buffers(), strict=True
    ):
        if ours_now.is_floating_point():
            as_exact(ours_now, plain_now, exact_now, name)
        else:
            assert ours_now == plain_now == exact_now == (mode == "train") and name in before


def test_statistics_of_many_pixels_are_as_exact_as_of_planes():
    """Sums over 16384 pixels, and maps in channels_last order, which torch sums one by one."""
    head = head_of().train()
    plain = copy.deepcopy(head)
    accelerated = SegformerFusionHead.from_hf(head)
    maps = [torch.randn(1, c, 128 >> i, 128 >> i) for i, c in enumerate(WIDTHS)]
    with torch.no_grad():
        as_exact(accelerated(maps), plain(maps), wide(plain)(doubles(maps)))


def test_momentum_none_averages_all_batches():
    head = head_of().train()
    head.batch_norm.momentum = None
    head.batch_norm.reset_running_stats()
    plain, truth = copy.deepcopy(head), wide(head)
    ours = SegformerFusionHead.from_hf(head)
    for _ in range(3):
        maps = maps_of()
        ours(maps), plain(maps), truth(doubles(maps))
    assert ours.batch_norm.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        as_exact(*(getattr(m.batch_norm, name) for m in (ours, plain, truth)), name)


def test_training_converges_to_the_same_weights():
    """Four steps of SGD; then in eval mode with the statistics that they gathered."""
    plain, truth = head_of().train(), None
    truth, ours = wide(plain), SegformerFusionHead.from_hf(copy.deepcopy(plain))
    batches = [maps_of() for _ in range(4)]
    target = torch.randint(LABELS, (2, 6, 10))
    for head, cast in ((plain, list), (ours, list), (truth, doubles)):
        optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
        for maps in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(cast(maps)), target).backward()
            optimizer.step()
        head.eval()
    with torch.no_grad():
        out, expected, exact = ours(batches[0]), plain(batches[0]), truth(doubles(batches[0]))
    torch.testing.assert_close(expected.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


def test_frozen_head_passes_gradients_to_its_inputs():
    head, maps = head_of(), maps_of()
    ours = SegformerFusionHead.from_hf(head.requires_grad_(False))
    weight = torch.randn(2, LABELS, 6, 10, dtype=torch.float64)
    with torch.inference_mode():
        ours(maps)  # composed weights of an inference cannot be a part of a graph
    _, found = gradients(ours, maps, weight)
    _, of_plain = gradients(copy.deepcopy(head), maps, weight)
    _, of_truth = gradients(wide(head), doubles(maps), weight)
    for name in found:
        as_exact(found[name], of_plain[name], of_truth[name], name)


def test_dropout_drops_and_scales():
    head, maps = head_of(dropout=0.5), maps_of("square", 4)
    ours, seen = SegformerFusionHead.from_hf(head), []
    head.dropout.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        assert torch.equal(ours(maps), ours(maps))
        head.dropout.train()
        ours(maps)
    before, after = seen[-1]
    assert torch.equal(seen[0][0], seen[0][1])
    dropped = (after == 0)[before > 0].float().mean()
    assert 0.4 < dropped < 0.6
    assert torch.allclose(after[after != 0], 2 * before[after != 0])


def test_autocast_gives_its_dtype():
    head, maps = head_of(), maps_of()
    ours = SegformerFusionHead.from_hf(head)
    truth = wide(head)(doubles(maps))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        as_exact(ours(maps), head(maps), truth)
    with torch.no_grad():  # and leaves nothing composed in its dtype behind
        as_exact(ours(maps), head(maps), truth)


# What is kept between calls.


def step(head):
    """One step of an optimizer on every parameter."""
    head.train()
    optimizer = torch.optim.SGD(head.parameters(), 0.5)
    head(maps_of("square", 4)).square().mean().backward()
    optimizer.step()
    head.eval()


def through_data(head):
    for p in head.parameters():
        p.data.mul_(1.5)


def new_data(head):
    head.linear_fuse.weight.data = torch.randn_like(head.linear_fuse.weight)


def one_projection(head):
    with torch.no_grad():
        head.linear_projections[2].proj.weight[3, 5] += 1.0


def new_parameter(head):
    head.linear_projections[1].proj.bias = nn.Parameter(torch.randn(D))


def loaded(head):
    other = head_of()
    head.load_state_dict(other.state_dict())


def statistics(head):
    head.batch_norm.running_var.mul_(4.0)


def other_eps(head):
    head.batch_norm.eps = 0.5


def batch_statistics(head):
    head.batch_norm.train()


def halves(head):
    head.to(torch.bfloat16)


CHANGES = [step, through_data, new_data, one_projection, new_parameter, loaded, statistics, other_eps,
           batch_statistics, halves]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_composed_weights_are_never_stale(change):
    ours, maps = SegformerFusionHead.from_hf(head_of()), maps_of()
    with torch.no_grad():
        before = ours(maps)
    change(ours)
    maps = [x.to(ours.linear_fuse.weight.dtype) for x in maps]
    check_equal(ours, maps)
    with torch.no_grad():
        assert (ours(maps).float() - before).abs().max() > 1e-3


def test_composed_weights_are_kept_while_nothing_changes(monkeypatch):
    ours, maps, calls = SegformerFusionHead.from_hf(head_of()), maps_of(), []
    compose = SegformerFusionHead._compose
    monkeypatch.setattr(SegformerFusionHead, "_compose", lambda *args: calls.append(1) or compose(*args))
    with torch.no_grad():
        outs = [ours(maps) for _ in range(3)]
    assert len(calls) == 1 and all(torch.equal(out, outs[0]) for out in outs)
    ours(maps)
    assert len(calls) == 2  # a gradient may be wanted


def test_kept_weights_are_no_part_of_the_state():
    ours, maps = SegformerFusionHead.from_hf(head_of()), maps_of()
    with torch.no_grad():
        expected = ours(maps)
        assert "_kept" in ours.__dict__
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is type(ours) and "_kept" not in twin.__dict__
            assert torch.equal(twin(maps), expected)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(maps), expected)
    assert list(ours.state_dict()) == list(head_of().state_dict())


# Whose head it is.


def test_from_hf_shares_everything_and_changes_nothing():
    head = head_of()
    before = (type(head), dict(head.__dict__))
    ours = SegformerFusionHead.from_hf(head)
    assert (type(head), dict(head.__dict__)) == before
    assert isinstance(ours, SegformerDecodeHead) and isinstance(ours, SegformerFusionHead)
    assert [id(p) for p in ours.parameters()] == [id(p) for p in head.parameters()]
    assert list(ours.state_dict()) == list(head.state_dict())
    ours.load_state_dict(head_of().state_dict(), strict=True)
    ours.register_forward_hook(lambda *_: None)
    assert not head._forward_hooks
    again = SegformerFusionHead.from_hf(ours)
    assert type(again) is type(ours) and again is not ours


def test_names_of_transformers_4():
    head, maps = head_of(), maps_of()
    old = copy.deepcopy(head)
    old.linear_c = old._modules.pop("linear_projections")
    ours = SegformerFusionHead.from_hf(old)
    assert "linear_c.0.proj.weight" in ours.state_dict()
    with torch.no_grad():
        as_exact(ours(maps), head(maps), wide(head)(doubles(maps)))


def test_last_stage_as_tokens():
    """transformers reads the side of the image off the channels, so it takes such a stage only where both agree."""
    widths = [8, 16, 20, 16]
    config = config_of(reshape_last_stage=False)
    config.hidden_sizes = widths
    head = SegformerDecodeHead(config).eval()
    randomise(head)
    maps = [torch.randn(2, c, n, n) for c, n in zip(widths, (8, 6, 5, 4), strict=True)]
    maps[3] = maps[3].flatten(2).transpose(1, 2)
    ours = SegformerFusionHead.from_hf(head)
    with torch.no_grad():
        as_exact(ours(maps), head(maps), wide(head)(doubles(maps)))
        maps[3] = torch.randn(2, 9, 16)
        assert ours(maps).shape == (2, LABELS, 8, 8)
        with pytest.raises(ValueError, match=r"encoder_hidden_states\[3\]: expected a square number of tokens"):
            ours([*maps[:3], torch.randn(2, 12, 16)])


def test_no_kernel_for_float64_means_the_original():
    head, maps = head_of(torch.float64), maps_of(dtype=torch.float64)
    with torch.no_grad(), hivilt.use_backend("auto"):
        assert torch.equal(SegformerFusionHead.from_hf(head)(maps), head(maps))


class Lora(nn.Module):
    """A linear layer beside another, as adapters have it; ``weight`` still names the frozen one."""

    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, nn.Linear(base.in_features, base.out_features)
        self.weight, self.bias, self.in_features = base.weight, base.bias, base.in_features

    def forward(self, x):
        return self.base(x) + self.extra(x)


def test_inner_modules_that_were_changed_are_called():
    for change in ("hook", "adapter", "parametrized", "forward"):
        ours, maps, fired = SegformerFusionHead.from_hf(head_of()), maps_of(), []
        proj = ours.linear_projections[1].proj
        if change == "hook":
            ours.linear_fuse.register_forward_hook(lambda *_, fired=fired: fired.append(1))
        elif change == "adapter":
            ours.linear_projections[1].proj = Lora(proj)
        elif change == "parametrized":
            nn.utils.parametrizations.weight_norm(proj)
            with torch.no_grad():
                proj.parametrizations.weight.original0.mul_(2.0)
        else:
            proj.forward = lambda x, proj=proj: 3.0 * nn.functional.linear(x, proj.weight, proj.bias)
        with torch.no_grad():
            expected = SegformerDecodeHead.forward(ours, maps)
            fired.clear()
            assert torch.equal(ours(maps), expected), change
        assert len(fired) == (change == "hook")


@pytest.mark.parametrize("name", ["batch_norm", "activation", "dropout", "classifier"])
def test_hooks_behind_the_linear_layers_fire(name):
    ours, maps, seen = SegformerFusionHead.from_hf(head_of()), maps_of(), []
    getattr(ours, name).register_forward_hook(lambda module, args, out: seen.append(out))
    check_equal(ours, maps)
    plain, expected = head_of(), []
    plain.load_state_dict(ours.state_dict())
    getattr(plain, name).register_forward_hook(lambda module, args, out: expected.append(out))
    with torch.no_grad():
        seen.clear()
        ours(maps), plain(maps)
    torch.testing.assert_close(seen[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("replacement", ["sync", "identity", "no-affine", "no-statistics", "gelu", "biases"])
def test_other_norms_activations_and_biases(replacement):
    head, maps = head_of(), maps_of()
    norm = head.batch_norm
    if replacement == "sync":
        head = nn.SyncBatchNorm.convert_sync_batchnorm(head)
        assert type(head.batch_norm) is nn.SyncBatchNorm
    elif replacement == "identity":
        head.batch_norm = nn.Identity()
    elif replacement == "no-affine":
        norm.weight = norm.bias = None
        norm.affine = False
    elif replacement == "no-statistics":
        head.batch_norm = nn.BatchNorm2d(D, track_running_stats=False).eval()
    elif replacement == "biases":
        head.linear_fuse.bias, head.classifier.bias = nn.Parameter(torch.randn(D)), None
        for projection in head.linear_projections[::2]:
            projection.proj.bias = None
    else:
        head.activation = nn.GELU()
    check_equal(SegformerFusionHead.from_hf(head), maps)


def test_fullgraph_compile():
    for training in (False, True):
        head = head_of().train(training)
        plain, maps = copy.deepcopy(head), maps_of()
        compiled = torch.compile(SegformerFusionHead.from_hf(head), fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(maps), plain(maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "maps, kind, text",
    [
        (torch.zeros(2, 8, 4, 4), TypeError, "encoder_hidden_states: expected 4 feature maps"),
        (maps_of()[:3], ValueError, "encoder_hidden_states: expected 4 feature maps; got 3"),
        ([*maps_of()[:3], "map"], TypeError, r"encoder_hidden_states\[3\]: expected a tensor"),
        ([*maps_of()[:3], torch.zeros(2, 32, 2)], ValueError, r"encoder_hidden_states\[3\]: expected 4 dimensions"),
        ([*maps_of()[:3], torch.zeros(2, 31, 1, 2)], ValueError, r"encoder_hidden_states\[3\].*32.*31"),
        ([*maps_of()[:3], torch.zeros(3, 32, 1, 2)], ValueError, r"features\[3\]: expected the batch"),
    ],
    ids=["tensor", "three", "string", "three-dimensions", "channels", "batch"],
)
def test_bad_maps_name_the_argument(maps, kind, text):
    with pytest.raises(kind, match=text):
        SegformerFusionHead.from_hf(head_of())(maps)


def test_from_hf_refuses_what_is_no_head():
    with pytest.raises(TypeError, match=r"module: expected a SegformerDecodeHead; got a dict"):
        SegformerFusionHead.from_hf({})
    with pytest.raises(TypeError, match="got a Linear without linear_fuse, batch_norm"):
        SegformerFusionHead.from_hf(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="from_hf"):
        SegformerFusionHead(config_of())
    head = head_of()
    head.linear_fuse = nn.Conv2d(4 * D, D, 3, padding=1)
    with pytest.raises(ValueError, match="linear_fuse is no 1 x 1 convolution"):
        SegformerFusionHead.from_hf(head)
    head = head_of()
    head.linear_projections[0].proj = Lora(head.linear_projections[0].proj)
    with pytest.raises(ValueError, match=r"projection 0\.proj was replaced by a Lora"):
        SegformerFusionHead.from_hf(head)


# In a model.


def model_of():
    model = transformers.SegformerForSemanticSegmentation(config_of(sr_ratios=[8, 4, 2, 1])).eval()
    randomise(model)
    return model


def test_accelerate_and_restore_a_model():
    model, pixels = model_of(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, truth = model(pixels).logits, wide(model)(pixels.double()).logits
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    state, parameters = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    report = hivilt.accelerate(model)
    assert [(e.path, e.kind.rpartition(".")[2]) for e in report.replaced] == [("decode_head", "SegformerDecodeHead")]
    assert report.skipped == [] and "scale_fusion" in str(report) and report.notes == []
    assert isinstance(model.decode_head, SegformerFusionHead) and parameters == [id(p) for p in model.parameters()]
    assert list(state) == list(model.state_dict())
    with torch.no_grad():
        out = model(pixels).logits
    assert out.shape == (1, LABELS, 16, 24) and not torch.equal(out, expected)
    as_exact(out, expected, truth)
    second = hivilt.accelerate(model)
    assert second.replaced == [] and "already accelerated" in second.skipped[0].reason
    twin = copy.deepcopy(model)
    assert hivilt.restore(twin) == ["decode_head"] and type(twin.decode_head) is SegformerDecodeHead
    assert hivilt.restore(model) == ["decode_head"]
    for (kind, old), m in zip(before, model.modules(), strict=True):
        assert type(m) is kind and list(m.__dict__) == list(old) and all(m.__dict__[n] is old[n] for n in old)
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, expected)


def test_replace_segformer_heads_in_place():
    model, pixels = model_of(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(pixels).logits
        assert replace_segformer_heads(model) == ["decode_head"]
        torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-4, atol=1e-4)
    assert replace_segformer_heads(model) == [] and hivilt.restore(model) == []
    with pytest.raises(ValueError, match="from_hf"):
        replace_segformer_heads(head_of())
    with pytest.raises(TypeError, match="model"):
        replace_segformer_heads([model])


def test_nothing_imports_transformers():
    code = (
        "import sys, torch, hivilt; hivilt.accelerate(torch.nn.Linear(2, 2)); hivilt.nn; "
        "assert 'transformers' not in sys.modules"
    )
    fresh.run(code).check_returncode()


class Subclass(SegformerDecodeHead):
    pass


def foreign():
    """A class of the same name in somebody's own code."""
    kind = type("SegformerDecodeHead", (nn.Module,), {"__module__": "somebody.model", "forward": lambda self, x: x})
    return kind()


def hooked():
    head = head_of()
    head.linear_projections[0].proj.register_forward_pre_hook(lambda *_: None)
    return head


def other_forward():
    head = head_of()
    head.forward = lambda maps: maps[0]
    return head


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Subclass(config_of()), "a subclass"),
        (foreign, "SegformerDecodeHead of somebody.model"),
        (hooked, r"projection 0\.proj carries hooks"),
        (other_forward, "forward was replaced"),
        (lambda: SegformerFusionHead.from_hf(head_of()), "already a hivilt module"),
    ],
    ids=["subclass", "foreign", "hooked", "forward", "ours"],
)
def test_heads_that_accelerate_skips(make, text):
    model = nn.ModuleDict({"head": make()})
    kind = type(model["head"])
    report = hivilt.accelerate(model)
    assert report.replaced == [] and [e.path for e in report.skipped] == ["head"]
    assert re.search(text, report.skipped[0].reason)
    assert type(model["head"]) is kind and hivilt.restore(model) == []
