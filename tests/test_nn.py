"""hivilt.nn.MultiheadAttention: torch's module exactly without topk, an independent float64 top-k attention with it."""

import math

import pytest
import torch
from plain_attention import CONSTRUCTIONS, B, E, H, L, S, close, mask_of, pair, plain_topk, tokens

from hivilt.nn import MultiheadAttention

# Dense: torch's own behaviour.


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_dense_equals_torch(options):
    ours, torchs = pair(**options)
    x = tokens(ours)
    out, weights = ours(*x)
    assert weights is None
    close(out, torchs(*x, need_weights=False)[0])
    for average in (True, False):
        for a, b in zip(
            ours(*x, need_weights=True, average_attn_weights=average),
            torchs(*x, average_attn_weights=average),
            strict=True,
        ):
            close(a, b)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("extras", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["", "extras"])
@pytest.mark.parametrize("padding", [None, "bool", "float", "infinite"])
@pytest.mark.parametrize(
    "shape, kind",
    [(None, ""), *((shape, kind) for shape in ((L, S), (B * H, L, S)) for kind in ("bool", "float", "infinite"))],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_dense_masks_equal_torch(batch_first, extras, padding, shape, kind):
    ours, torchs = pair(batch_first=batch_first, **extras)
    x = tokens(ours)
    masks = {
        "attn_mask": None if shape is None else mask_of(kind, shape),
        "key_padding_mask": None if padding is None else mask_of(padding, (B, S)),
    }
    close(ours(*x, **masks)[0], torchs(*x, need_weights=False, **masks)[0])


@pytest.mark.parametrize("topk", [None, S])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_gradients_equal_torch(topk, dtype):
    ours, torchs = pair(dtype, topk=topk)
    results = []
    for module, extra in ((ours, {}), (torchs, {"need_weights": False})):
        torch.manual_seed(1)
        x = [t.requires_grad_() for t in tokens(module, dtype=dtype)]
        bias = torch.randn(L, S, dtype=dtype, requires_grad=True)
        module(*x, attn_mask=bias, **extra)[0].sin().sum().backward()
        results.append([t.grad for t in (*x, bias, *module.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("which", ["self", "key-is-value", "all-differ"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "batch_first": True}], ids=["", "no-bias"])
def test_shared_inputs_share_a_projection(which, options):
    ours, torchs = pair(**options)
    query, key, value = tokens(ours, queries=S)
    x = {"self": (query, query, query), "key-is-value": (query, key, key), "all-differ": (query, key, value)}[which]
    close(ours(*x)[0], torchs(*x, need_weights=False)[0])


@pytest.mark.parametrize("topk", [None, 4])
def test_unbatched_is_a_batch_of_one(topk):
    for batch_first in (False, True):
        ours, torchs = pair(topk=topk, batch_first=batch_first)
        query, key = torch.randn(L, E), torch.randn(S, E)
        padding, mask = mask_of("bool", (S,)), mask_of("bool", (H, L, S))
        out, weights = ours(query, key, key, padding, attn_mask=mask, need_weights=True, average_attn_weights=False)
        assert out.shape == (L, E) and weights.shape == (H, L, S)
        dim = 0 if batch_first else 1
        batch = [x.unsqueeze(dim) for x in (query, key, key)]
        again, _ = ours(*batch, padding[None], attn_mask=mask)
        close(out, again.squeeze(dim))
        close(ours(query, key, key, padding, attn_mask=mask)[0], out)
        if topk is None:
            close(out, torchs(query, key, key, padding, attn_mask=mask)[0])


def test_result_is_contiguous_when_sequences_come_first():
    """Code behind such a layer may call .view(-1, E)."""
    for options in ({}, {"topk": 3}):
        ours, _ = pair(**options)
        assert ours(*tokens(ours))[0].is_contiguous()


@pytest.mark.parametrize("extras", [{}, {"add_bias_kv": True}], ids=["", "bias-kv"])
@pytest.mark.parametrize("padded", [False, True])
def test_is_causal_equals_torch(extras, padded):
    ours, torchs = pair(**extras)
    query, _, _ = tokens(ours)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = mask_of("bool", (B, L)) if padded else None
    call = {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding}
    close(ours(query, query, query, **call)[0], torchs(query, query, query, need_weights=False, **call)[0])


@pytest.mark.parametrize(
    "call",
    [
        {"attn_mask": torch.zeros(L, S + 1)},
        {"attn_mask": torch.zeros(2, L, S)},
        {"attn_mask": torch.zeros(L, S, dtype=torch.int64)},
        {"attn_mask": torch.zeros(S)},
        {"key_padding_mask": torch.zeros(B, S + 1)},
        {"key_padding_mask": torch.zeros(B + 1, S)},
        {"key_padding_mask": torch.zeros(S, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(B, S, dtype=torch.uint8)},
        {"is_causal": True},
    ],
    ids=lambda call: "-".join(f"{k}{list(v.shape)}" if isinstance(v, torch.Tensor) else k for k, v in call.items()),
)
def test_bad_masks_fail_as_in_torch_or_by_name(call):
    ours, torchs = pair()
    x = tokens(ours)
    with pytest.raises(Exception) as expected:
        torchs(*x, need_weights=False, **call)
    with pytest.raises(expected.type):
        ours(*x, **call)
    ours.topk = 3
    name = "attn_mask" if "is_causal" in call else next(iter(call))
    with pytest.raises((ValueError, TypeError), match=name):
        ours(*x, **call)


@pytest.mark.parametrize("position, name", [(0, "query"), (1, "key"), (2, "value")])
def test_bad_inputs_with_topk_name_the_argument(position, name):
    ours, _ = pair(topk=3, kdim=20, vdim=28)
    for bad, kind in (
        (torch.randn(S, B, E + 1), ValueError),
        (torch.randn(2, 2, S, E), ValueError),
        ([1.0], TypeError),
    ):
        x = tokens(ours)
        x[position] = bad
        with pytest.raises(kind, match=rf"MultiheadAttention: (query|{name}): expected .*; got "):
            ours(*x)


@pytest.mark.parametrize("topk, need_weights", [(None, False), (4, False), (4, True), (S, False), (S, True)])
def test_an_empty_row_gives_the_bias_of_out_proj(topk, need_weights):
    ours, _ = pair(topk=topk)
    x = [t.requires_grad_() for t in tokens(ours)]
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(*x, padding, need_weights)
    assert (out[:, 1] == ours.out_proj.bias).all()
    if need_weights:
        assert (weights[1] == 0).all()
        (out.sum() + weights.square().sum()).backward()
    else:
        out.sum().backward()
    for t in (*x, *ours.parameters()):
        assert t.grad.isfinite().all()
    assert (x[1].grad[:, 1] == 0).all()


def test_padded_keys_may_hold_anything():
    for topk in (None, 4):
        ours, _ = pair(topk=topk, batch_first=True)
        query, key, value = tokens(ours)
        padding = mask_of("bool", (B, S))
        expected = ours(query, key, value, padding)[0]
        for x in (key, value):
            x[padding] = math.nan
        assert torch.equal(ours(query, key, value, padding)[0], expected)
        if topk is not None:
            assert torch.equal(ours(query, key, value, padding, need_weights=True)[0], expected)


# With topk.


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("topk", [1, 4, 100])
def test_topk_equals_plain(options, axis, topk):
    ours, _ = pair(topk=topk, axis=axis, **options)
    x = tokens(ours)
    expected, p = plain_topk(ours, *x, topk, axis)
    close(ours(*x)[0].double(), expected)
    out, weights = ours(*x, need_weights=True, average_attn_weights=False)
    close(out.double(), expected)
    close(weights.double(), p)
    assert torch.equal(weights > 0, p > 0)
    close(ours(*x, need_weights=True)[1].double(), p.mean(1))


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "batch_first": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_raw_selection_equals_plain(options, axis):
    ours, _ = pair(topk=4, axis=axis, select="raw", **options)
    x = tokens(ours)
    padding = mask_of("bool", (B, S))
    expected, p = plain_topk(ours, *x, 4, axis, "raw", keep=~padding[:, None, None])
    out, weights = ours(*x, padding, need_weights=True, average_attn_weights=False)
    close(out.double(), expected)
    assert torch.equal(weights > 0, p > 0)
    close(ours(*x, padding)[0].double(), expected)


def test_raw_selection_refuses_what_it_cannot_share():
    with pytest.raises(ValueError, match="kdim: expected embed_dim"):
        MultiheadAttention(E, H, kdim=20, topk=4, select="raw")
    ours, _ = pair(topk=4, select="raw")
    x = tokens(ours)
    for shape in ((B * H, L, S), (B, H, L, S)):
        with pytest.raises(ValueError, match="attn_mask: expected no head axis"):
            ours(*x, attn_mask=torch.zeros(shape))
    for shape in ((L, S), (B, L, S), (B, 1, L, S)):
        assert torch.equal(ours(*x, attn_mask=torch.zeros(shape, dtype=torch.bool))[0], ours(*x)[0])


@pytest.mark.parametrize("topk", [None, 4])
@pytest.mark.parametrize("shape", [(B, L, S), (B, 1, L, S), (B, H, L, S), (B * H, L, S), (L, S)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "infinite"])
@pytest.mark.parametrize("padding", [None, "bool", "infinite"])
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_mask_shapes_beyond_torch(topk, shape, kind, padding):
    ours, torchs = pair(topk=topk, add_zero_attn=True)
    x = tokens(ours)
    mask = mask_of(kind, shape)
    four = mask.view(B, H, L, S) if shape[0] == B * H else mask.unsqueeze(1) if len(shape) == 3 else mask
    call = {"key_padding_mask": None if padding is None else mask_of(padding, (B, S))}
    out = ours(*x, attn_mask=mask, **call)[0]
    if topk is None:
        flat = four.expand(B, H, L, S).reshape(B * H, L, S)
        close(out, torchs(*x, attn_mask=flat, need_weights=False, **call)[0])
        close(ours(*x, attn_mask=mask, need_weights=True, **call)[1], torchs(*x, attn_mask=flat, **call)[1])
        return
    bias, keep = torch.zeros(B, H, L, S), torch.ones(B, H, L, S, dtype=torch.bool)
    for m in (four.expand(B, H, L, S), call["key_padding_mask"][:, None, None] if padding else None):
        if m is not None:
            bias, keep = (bias + m, keep) if m.is_floating_point() else (bias, keep & ~m)
    expected, p = plain_topk(ours, *x, topk, keep=keep, bias=bias)
    close(out.double(), expected)
    close(ours(*x, attn_mask=mask, need_weights=True, average_attn_weights=False, **call)[1].double(), p)


def test_three_dimensions_mean_heads_where_both_readings_fit():
    """One head: (B * H, L, S) and (B, L, S) are the same; a batch as large as B * H of another reading never is."""
    module = MultiheadAttention(E, 1, topk=3, batch_first=True).eval()
    x = tokens(module)
    mask = mask_of("bool", (B, L, S))
    assert torch.equal(module(*x, attn_mask=mask)[0], module(*x, attn_mask=mask[:, None])[0])


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_padded_queries_take_no_slot(axis):
    ours, _ = pair(topk=2, axis=axis, batch_first=True)
    x = tokens(ours)
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[:, 6:] = True
    out, weights = ours(*x, query_padding_mask=padding, need_weights=True)
    short = ours(x[0][:, :6], *x[1:])[0]
    close(out[:, :6], short)
    assert (out[:, 6:] == ours.out_proj.bias).all() and (weights[:, 6:] == 0).all()
    ours.topk = None
    dense, weights = ours(*x, query_padding_mask=padding, need_weights=True)
    close(dense[:, :6], ours(x[0][:, :6], *x[1:])[0])
    close(weights.sum(-1), (~padding).float())
    assert (dense[:, 6:] == ours.out_proj.bias).all()
    with pytest.raises(TypeError, match="query_padding_mask"):
        MultiheadAttention(E, H, topk=2, batch_first=True)(*x, query_padding_mask=padding.float())


def test_causal_mask_with_topk():
    ours, _ = pair(topk=3)
    query = tokens(ours)[0]
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    expected, _ = plain_topk(ours, query, query, query, 3, keep=~causal)
    for hint in (False, True):
        close(ours(query, query, query, attn_mask=causal, is_causal=hint)[0].double(), expected)


def test_weights_are_differentiable():
    ours, _ = pair(torch.float64, topk=3, add_bias_kv=True)
    x = tokens(ours, 1, 4, 6, torch.float64)
    mask = mask_of("infinite", (4, 6)).double()

    def weights(query, key):
        return ours(query, key, x[2], attn_mask=mask, need_weights=True, average_attn_weights=False)[1]

    assert torch.autograd.gradcheck(weights, (x[0].requires_grad_(), x[1].requires_grad_()))


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_gradients_equal_plain(axis, dtype):
    ours, _ = pair(dtype, topk=4, axis=axis)
    x = [t.requires_grad_() for t in tokens(ours, dtype=dtype)]
    keep = ~mask_of("bool", (B, S))[:, None, None]
    y = [t.detach().clone().requires_grad_() for t in x]
    weight = ours.out_proj.weight
    ours(*x, ~keep[:, 0, 0])[0].sin().sum().backward()
    plain_topk(ours, *y, 4, axis, keep=keep)[0].sin().sum().backward()
    assert weight.grad.abs().sum() > 0
    for a, b in zip(x, y, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
