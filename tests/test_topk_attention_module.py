"""The plain attention of hivilt.reference.modules: torch's module without topk, float64 top-k attention with it; the
twin of hivilt.nn gives the same; accelerate and restore keep what it was built with."""

import copy
import math
import pickle

import pytest
import torch
from plain_attention import CONSTRUCTIONS, B, E, H, L, S, close, mask_of, plain_topk, tokens
from torch import nn

import hivilt
from hivilt.nn import MultiheadAttention as Fast
from hivilt.reference.modules import FeatureBank
from hivilt.reference.modules import MultiheadAttention as Plain


def built(cls=Plain, dtype=torch.float32, **options):
    """A module whose biases are not zero, the same at each call."""
    torch.manual_seed(1)
    module = cls(E, H, dtype=dtype, **options).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return module


def test_one_class_above_the_other():
    assert Fast.__mro__[1] is Plain and Plain.__mro__[1] is nn.MultiheadAttention
    ours, torchs = built(topk=3), nn.MultiheadAttention(E, H)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict(), strict=True)
    built(Fast).load_state_dict(torchs.state_dict(), strict=True)


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_dense_equals_torch(options):
    ours = built(**options)
    torchs = nn.MultiheadAttention(E, H, **options).eval()
    torchs.load_state_dict(ours.state_dict(), strict=True)
    x = tokens(ours)
    masks = {"key_padding_mask": mask_of("bool", (B, S)), "attn_mask": mask_of("bool", (L, S))}
    for call in ({}, masks):
        close(ours(*x, **call)[0], torchs(*x, need_weights=False, **call)[0])
        for a, b in zip(ours(*x, need_weights=True, **call), torchs(*x, **call), strict=True):
            close(a, b)


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_topk_equals_plain(options, axis):
    ours = built(topk=4, axis=axis, **options)
    x, keep = tokens(ours), ~mask_of("bool", (B, S))
    expected, p = plain_topk(ours, *x, 4, axis, keep=keep[:, None, None])
    close(ours(*x, ~keep)[0].double(), expected)
    out, weights = ours(*x, ~keep, need_weights=True, average_attn_weights=False)
    close(out.double(), expected)
    close(weights.double(), p)
    assert torch.equal(weights > 0, p > 0)


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_raw_selection_equals_plain(axis):
    ours = built(topk=4, axis=axis, select="raw", batch_first=True)
    x = tokens(ours)
    close(ours(*x)[0].double(), plain_topk(ours, *x, 4, axis, "raw")[0])


@pytest.mark.parametrize("topk, axis", [(None, "keys"), (4, "keys"), (4, "queries")])
def test_gradients_equal_plain(topk, axis):
    ours = built(topk=topk, axis=axis, dtype=torch.float64, batch_first=True)
    x = [t.requires_grad_() for t in tokens(ours, dtype=torch.float64)]
    y = [t.detach().clone().requires_grad_() for t in x]
    keep = ~mask_of("bool", (B, S))
    weight = torch.randn(B, L, E, dtype=torch.float64)
    (ours(*x, ~keep)[0] * weight).sum().backward()
    (plain_topk(ours, *y, topk or S, axis, keep=keep[:, None, None])[0] * weight).sum().backward()
    for a, b in zip(x, y, strict=True):
        close(a.grad, b.grad, torch.float64)
    assert all(p.grad.abs().sum() > 0 for p in ours.parameters())


@pytest.mark.parametrize("topk, axis", [(None, "keys"), (4, "keys"), (4, "queries")])
@pytest.mark.parametrize("cls", [Plain, Fast], ids=["plain", "fast"])
def test_padding_and_empty_rows(cls, topk, axis):
    """What padded keys hold does not matter; a sample without keys and a padded query give the bias of out_proj."""
    ours = built(cls, topk=topk, axis=axis, batch_first=True)
    x = tokens(ours)
    keys, queries = torch.ones(B, S, dtype=torch.bool), torch.ones(B, L, dtype=torch.bool)
    keys[0, 8:], keys[1], queries[2, 5:] = False, False, False
    expected, _ = plain_topk(ours, *x, topk or S, axis, keep=keys[:, None, None] & queries[:, None, :, None])
    call = {"key_padding_mask": ~keys, "query_padding_mask": ~queries}
    clean = [t.clone().requires_grad_() for t in x]
    out = ours(*clean, **call)[0]
    close(out.double(), expected)
    assert (out[1] == ours.out_proj.bias).all() and (out[2, 5:] == ours.out_proj.bias).all()
    out.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (*clean, *ours.parameters()))
    assert (clean[0].grad[1] == 0).all() and (clean[1].grad[~keys] == 0).all()
    for t in x[1:]:
        t[~keys] = math.nan
    assert torch.equal(ours(*x, **call)[0], out)


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("options", [{}, {"topk": 4}, {"topk": 4, "axis": "queries", "select": "raw"}], ids=str)
@pytest.mark.parametrize("layout", ["batch-first", "sequence-first", "one-sample"])
@pytest.mark.parametrize("cls", [Plain, Fast], ids=["plain", "fast"])
def test_padding_reaches_no_gradient(cls, layout, options, need_weights):
    """In the gradient of a projection what padding holds meets a factor of 0, which NaN and infinity survive."""
    ours = built(cls, batch_first=layout == "batch-first", **options)
    keys, queries = torch.arange(S) < torch.tensor([[S], [6], [9]]), torch.arange(L) < torch.tensor([[L], [L], [4]])
    query, key, value = tokens(ours)
    if layout == "one-sample":
        query, key, value, keys, queries = query[:, 2], key[:, 2], value[:, 2], keys[2], queries[2]
    grads = []
    for poison in (0.5, math.nan, math.inf):
        first = layout == "sequence-first"
        q, k, v = (
            x.masked_fill(~(keep.T if first else keep)[..., None], poison)
            for x, keep in ((query, queries), (key, keys), (value, keys))
        )
        ours.zero_grad()
        x = [t.requires_grad_() for t in (q, k, v)]
        out, weights = ours(*x, ~keys, need_weights, query_padding_mask=~queries)
        (out.sin().sum() + (weights.square().sum() if need_weights else 0.0)).backward()
        grads.append([out.detach(), *(t.grad.clone() for t in (*x, *ours.parameters()))])
    for clean, poisoned, infinite in zip(*grads, strict=True):
        assert torch.equal(clean, poisoned) and torch.equal(clean, infinite)


@pytest.mark.parametrize("cls", [Plain, Fast], ids=["plain", "fast"])
def test_dense_probabilities_do_not_read_padding(cls):
    """They are torch's, whose own products would keep a NaN under the mask."""
    ours = built(cls, batch_first=True)
    query, key, value = tokens(ours)
    padding = torch.arange(S) >= torch.tensor([[S], [6], [9]])
    expected = ours(query, key, value, padding, need_weights=True)
    key[padding], value[padding] = math.nan, math.inf
    with torch.no_grad():
        found = ours(query, key, value, padding, need_weights=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
@pytest.mark.parametrize("topk, axis, select", [(None, "keys", "scores"), (4, "queries", "scores"), (4, "keys", "raw")])
def test_fast_equals_plain(options, topk, axis, select):
    if select == "raw" and "kdim" in options:
        options = options | {"kdim": E}
    one, two = (built(cls, topk=topk, axis=axis, select=select, **options) for cls in (Plain, Fast))
    results = []
    for module in (one, two):
        torch.manual_seed(2)
        x = [t.requires_grad_() for t in tokens(module)]
        out, _ = module(*x, mask_of("bool", (B, S)))
        out.sin().sum().backward()
        results.append([out, *(t.grad for t in (*x, *module.parameters()))])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_fast_drops_what_plain_drops():
    """One counter-based mask from one draw of torch's generator: training with topk is comparable too."""
    x = tokens(built())
    outs = []
    for cls in (Plain, Fast):
        module = built(cls, topk=4, dropout=0.4).train()
        torch.manual_seed(5)
        outs.append(module(*x)[0])
    close(*outs)
    assert (outs[0] - built(topk=4)(*x)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"topk": 0}, ValueError, "MultiheadAttention: topk: expected at least 1; got 0"),
        ({"topk": 2.0}, TypeError, "topk"),
        ({"topk": True}, TypeError, "topk"),
        ({"axis": "rows"}, ValueError, "axis: expected 'keys' or 'queries'; got 'rows'"),
        ({"axis": 1}, TypeError, "axis"),
        ({"select": "best"}, ValueError, "select"),
        ({"select": "raw", "kdim": 20}, ValueError, "kdim: expected embed_dim"),
    ],
    ids=["zero", "float", "bool", "rows", "number", "best", "kdim"],
)
def test_bad_options(options, kind, text):
    for cls in (Plain, Fast):
        with pytest.raises(kind, match=text):
            cls(E, H, **options)


def test_copies_and_pickles_keep_the_options():
    module = built(topk=3, axis="queries", select="raw", batch_first=True)
    x = tokens(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is Plain and (twin.topk, twin.axis, twin.select) == (3, "queries", "raw")
        assert torch.equal(twin(*x)[0], module(*x)[0])


def test_plain_dense_compiles_in_one_graph():
    module = built(batch_first=True)
    x, padding = tokens(module), mask_of("bool", (B, S))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(*x, padding)[0], module(*x, padding)[0])


# accelerate and restore.


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.sparse = built(topk=3, axis="queries", select="raw", batch_first=True)
        self.dense = built(batch_first=True)
        self.torchs = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, query, key):
        return sum(m(query, key, key, need_weights=False)[0] for m in self.children())


def test_accelerate_keeps_what_the_plain_module_was_built_with():
    model = Model().eval()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    x = torch.randn(B, L, E), torch.randn(B, S, E)
    expected = model(*x)
    report = hivilt.accelerate(model)
    assert [e.path for e in report.replaced] == ["sparse", "dense", "torchs"] and report.skipped == []
    assert "topk=3, axis='queries', select='raw', as it was built" in str(report)
    assert all(type(m) is Fast for m in model.children())
    close(model(*x), expected)
    assert hivilt.accelerate(model).skipped[0].reason.startswith("already accelerated (topk=3)")
    assert hivilt.restore(model) == ["sparse", "dense", "torchs"]
    after = [(type(m), dict(m.__dict__)) for m in model.modules()]
    for (kind, old), (same, new) in zip(before, after, strict=True):
        assert kind is same and list(old) == list(new) and all(old[name] is new[name] for name in old)


def test_topk_of_accelerate_is_for_torchs_own_attention():
    model = Model()
    report = hivilt.accelerate(model, topk=5)
    assert [m.topk for m in model.children()] == [3, None, 5]
    assert any("need_weights=True" in note for note in report.notes)
    model = Model()
    with pytest.raises(ValueError, match=r"topk: expected paths of attention modules \('torchs'\); got 'sparse'"):
        hivilt.accelerate(model, topk={"sparse": 5})
    assert type(model.torchs) is nn.MultiheadAttention


def test_a_changed_plain_module_is_skipped():
    class Subclass(Plain):
        pass

    model = Model()
    model.dense = Subclass(E, H)
    model.sparse.out_proj.register_forward_hook(lambda *_: None)
    report = hivilt.accelerate(model)
    reasons = {e.path: e.reason for e in report.skipped}
    assert list(reasons) == ["sparse", "dense"] and "hooks" in reasons["sparse"] and "subclass" in reasons["dense"]
    assert type(model.sparse) is Plain and type(model.dense) is Subclass


def test_restore_leaves_options_of_other_modules_alone():
    model = nn.ModuleDict({"bank": FeatureBank(8, 4, topk=3)})
    hivilt.accelerate(model)
    hivilt.restore(model)
    assert type(model["bank"]) is FeatureBank and model["bank"].topk == 3


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("topk", [None, 4])
@pytest.mark.parametrize("cls", [Plain, Fast], ids=["plain", "fast"])
def test_what_is_done_to_out_proj_counts(cls, topk, need_weights):
    """A hook fires, and a layer put in its place computes; torch's module would only read its weight."""
    ours = built(cls, topk=topk)
    x = tokens(ours)
    out, weights = ours(*x, need_weights=need_weights)
    handle = ours.out_proj.register_forward_hook(lambda module, args, result: 2 * result)
    found = ours(*x, need_weights=need_weights)
    close(found[0], 2 * out)
    assert (found[1] is None) == (weights is None)
    if need_weights:
        close(found[1], weights)
    handle.remove()

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.more = base, nn.Linear(E, E, bias=False)

        def forward(self, x):
            return self.base(x) + self.more(x)

    ours.out_proj = Adapted(ours.out_proj)
    with torch.no_grad():
        ours.out_proj.more.weight.copy_(ours.out_proj.base.weight)
    close(ours(*x, need_weights=need_weights)[0], 2 * out - ours.out_proj.base.bias)
