"""hivilt.nn.MultiheadAttention: torch's module exactly without topk, an independent float64 top-k attention with it."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import hivilt
from hivilt.nn import MultiheadAttention

INF = float("inf")
B, L, S, E, H = 3, 9, 13, 32, 4

CONSTRUCTIONS = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "kdim-vdim": {"kdim": 20, "vdim": 28, "batch_first": True},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True, "batch_first": True},
    "all-extras": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 20, "vdim": 28},
}


def pair(dtype=torch.float32, **options) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same weights, biases not zero."""
    ours = MultiheadAttention(E, H, dtype=dtype, **options)
    torchs = nn.MultiheadAttention(
        E, H, dtype=dtype, **{k: v for k, v in options.items() if k not in ("topk", "axis", "select")}
    )
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "bias" in name:
                parameter.normal_()
    torchs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), torchs.eval()


def tokens(module, batch=B, queries=L, keys=S, dtype=torch.float32):
    x = [torch.randn(batch, n, c, dtype=dtype) for n, c in ((queries, E), (keys, module.kdim), (keys, module.vdim))]
    return x if module.batch_first else [t.transpose(0, 1).contiguous() for t in x]


def close(a, b, dtype=torch.float32):
    """Within the rounding of a few float operations on numbers of size one to ten."""
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def plain_topk(module, query, key, value, topk, axis="keys", select="scores", keep=None, bias=None):
    """Top-k attention written out in float64 from the module's weights; keep, bias broadcast to [B, H, L, S']."""
    m = copy.deepcopy(module).double()
    q, k, v = ((x if m.batch_first else x.transpose(0, 1)).double() for x in (query, key, value))
    raw_q, raw_k = q, k
    E = m.embed_dim
    weights = (
        m.in_proj_weight.chunk(3)
        if m.in_proj_weight is not None
        else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    )
    q, k, v = (x @ w.mT for x, w in zip((q, k, v), weights, strict=True))
    if m.in_proj_bias is not None:
        q, k, v = (x + b for x, b in zip((q, k, v), m.in_proj_bias.chunk(3), strict=True))
    more = 0
    if m.bias_k is not None:
        k, v, more = (
            torch.cat([k, m.bias_k.expand(len(k), 1, E)], 1),
            torch.cat([v, m.bias_v.expand(len(v), 1, E)], 1),
            1,
        )
        raw_k = torch.cat([raw_k, m.bias_k.expand(len(k), 1, E)], 1) if select == "raw" else raw_k
    if m.add_zero_attn:
        k, v, raw_k, more = (*(nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v, raw_k)), more + 1)
    q, k, v = (x.unflatten(-1, (m.num_heads, m.head_dim)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(m.head_dim)
    if bias is not None:
        scores = scores + nn.functional.pad(bias.double(), (0, more))
    valid = (
        torch.ones_like(scores, dtype=torch.bool)
        if keep is None
        else nn.functional.pad(keep, (0, more), value=True).expand_as(scores)
    )
    valid = valid & (scores != -INF)
    rated = (raw_q @ raw_k.mT)[:, None].expand_as(scores) if select == "raw" else scores
    dim = -1 if axis == "keys" else -2
    rated = rated.masked_fill(~valid, -INF)
    best = rated.sort(stable=True, dim=dim, descending=True).indices.narrow(dim, 0, min(topk, rated.shape[dim]))
    kept = torch.zeros_like(valid).scatter_(dim, best, True) & valid
    p = torch.where(kept.any(-1, keepdim=True), scores.masked_fill(~kept, -INF).softmax(-1).nan_to_num(0.0), 0.0)
    out = (p @ v).transpose(1, 2).flatten(2) @ m.out_proj.weight.mT
    if m.out_proj.bias is not None:
        out = out + m.out_proj.bias
    return (out if m.batch_first else out.transpose(0, 1)), p


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


def mask_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    keep_one = torch.arange(shape[-1]) == 0
    ignore = (torch.rand(shape) < 0.4) & ~keep_one
    if kind == "bool":
        return ignore
    if kind == "infinite":
        return torch.where(ignore, -INF, torch.randn(shape))
    return torch.randn(shape)


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


# Training, precision, tracing.


def test_dropout_acts_in_training_only():
    ours, _ = pair(topk=4, dropout=0.5)
    x = tokens(ours)
    still = ours(*x)[0]
    assert torch.equal(still, ours(*x)[0])
    ours.train()
    torch.manual_seed(3)
    one, two = ours(*x)[0], ours(*x)[0]
    torch.manual_seed(3)
    assert torch.equal(one, ours(*x)[0]) and not torch.equal(one, two) and not torch.equal(one, still)
    for topk in (4, None):
        ours.topk = topk
        mean = torch.stack([ours(*x)[0] for _ in range(1000)]).mean(0)
        expected = still if topk else ours.eval()(*x)[0]
        ours.train()
        assert (mean - expected).abs().max() < 0.25 * expected.std()
    ours.topk = 4
    out, weights = ours(*x, need_weights=True, average_attn_weights=False)
    assert ((weights > 0).sum(-1) < 4).any()  # the weights returned are those that were used
    q_v = torch.nn.functional.linear(x[2], ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :])
    mixed = weights @ q_v.unflatten(-1, (H, E // H)).permute(1, 2, 0, 3)
    close(out, ours.out_proj(mixed.permute(2, 0, 1, 3).flatten(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [None, 4])
def test_half_types_and_autocast(dtype, topk):
    ours, _ = pair(topk=topk, add_bias_kv=True, add_zero_attn=True)
    x = tokens(ours)
    expected = ours(*x)[0] if topk is None else None
    padding, mask = mask_of("infinite", (B, S)), mask_of("bool", (L, S))
    masked = {"key_padding_mask": padding, "attn_mask": mask}
    half = copy.deepcopy(ours).to(dtype)
    out = half(*(t.to(dtype) for t in x))[0]
    assert out.dtype == dtype
    half(*(t.to(dtype) for t in x), padding.to(dtype), attn_mask=mask.to(dtype))
    with torch.autocast("cpu", dtype):
        auto, weights = ours(*x, need_weights=False)
        with_weights, weights = ours(*x, need_weights=True, **masked)
    assert auto.dtype == dtype and with_weights.dtype in (dtype, torch.float32) and weights.isfinite().all()
    if topk is None:
        for result in (out, auto):
            assert (result.float() - expected).abs().max() < 0.1
    auto.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = MultiheadAttention(E, H, batch_first=True, **options)

    def forward(self, query, key, padding=None, mask=None):
        return self.attention(query, key, key, padding, attn_mask=mask)[0]


@pytest.mark.parametrize("options", [{}, {"topk": 4}, {"topk": 4, "axis": "queries", "select": "raw"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_in_one_graph(options, dtype):
    torch._dynamo.reset()
    block = Block(**options).to(dtype)
    query, key = torch.randn(B, L, E, dtype=dtype), torch.randn(B, S, E, dtype=dtype)
    padding, mask = mask_of("bool", (B, S)), mask_of("bool", (B, L, S))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (block, compiled):
        q = query.clone().requires_grad_()
        out = f(q, key, padding, mask)
        out.square().sum().backward()
        grads.append((out.detach(), q.grad))
    for a, b in zip(*grads, strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("options", [{}, {"topk": 4}], ids=str)
def test_exports_with_a_free_batch(options):
    block = Block(**options).eval()
    query, key, padding = torch.randn(B, L, E), torch.randn(B, S, E), mask_of("bool", (B, S))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        block,
        (query, key, padding),
        dynamic_shapes={"query": {0: batch}, "key": {0: batch}, "padding": {0: batch}},
    )
    more = torch.randn(7, L, E), torch.randn(7, S, E), mask_of("bool", (7, S))
    assert torch.equal(program.module()(*more), block(*more))


def test_checkpoint_vmap_and_inference_mode():
    ours, _ = pair(topk=4, batch_first=True)
    x = tokens(ours)
    expected = ours(*x)[0]
    again = torch.utils.checkpoint.checkpoint(lambda *t: ours(*t)[0], *x, use_reentrant=False)
    assert torch.equal(again, expected)
    with torch.inference_mode():
        assert torch.equal(ours(*x)[0], expected)
    stacked = torch.func.vmap(lambda q: ours(q, x[1], x[2])[0])(torch.stack([x[0], x[0] + 1]))
    close(stacked[0], expected)


# A plain module that cannot tell the difference.


def test_state_dict_is_torchs_both_ways():
    for options in CONSTRUCTIONS.values():
        ours, torchs = pair(topk=5, **options)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        assert [n for n, _ in ours.named_buffers()] == [] == [n for n, _ in torchs.named_buffers()]
        ours.load_state_dict(torchs.state_dict(), strict=True)


def test_initialisation_is_torchs():
    torch.manual_seed(5)
    ours = MultiheadAttention(E, H, add_bias_kv=True, topk=3)
    torch.manual_seed(5)
    torchs = nn.MultiheadAttention(E, H, add_bias_kv=True)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_keep_the_options():
    ours = MultiheadAttention(E, H, topk=3, axis="queries", select="raw").eval()
    x = tokens(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (
        copy.copy(ours),
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert (twin.topk, twin.axis, twin.select) == (3, "queries", "raw")
        assert torch.equal(twin(*x)[0], ours(*x)[0])


def test_repr_tells_the_options():
    assert "topk=3, axis='keys', select='raw'" in repr(MultiheadAttention(E, H, topk=3, select="raw"))
    assert "topk=None" in repr(MultiheadAttention(E, H))


@pytest.mark.parametrize(
    "options, kind",
    [
        ({"topk": 0}, ValueError),
        ({"topk": -1}, ValueError),
        ({"topk": 1.5}, TypeError),
        ({"topk": True}, TypeError),
        ({"topk": "4"}, TypeError),
        ({"axis": "key"}, ValueError),
        ({"axis": 0}, TypeError),
        ({"select": "score"}, ValueError),
        ({"select": None}, TypeError),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, kind):
    with pytest.raises(kind, match=next(iter(options))):
        MultiheadAttention(E, H, **options)
    with pytest.raises(TypeError):
        MultiheadAttention(E, H, 0.0, True, False, False, None, None, False, None, None, 4)  # keyword only


def test_options_may_change_later():
    ours, _ = pair()
    x = tokens(ours)
    dense = ours(*x)[0]
    ours.topk = 2
    assert not torch.equal(ours(*x)[0], dense)
    ours.topk = None
    assert torch.equal(ours(*x)[0], dense)


# torch's own layers around it.


def layer(topk, **options):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(E, H, 64, batch_first=True, **options)
    state = layer.self_attn.state_dict()
    layer.self_attn = MultiheadAttention(E, H, dropout=0.1, batch_first=True, topk=topk)
    layer.self_attn.load_state_dict(state)
    return layer.eval()


def slow(layer, x, padding=None):
    """The layer's definition, written out."""
    y = layer.norm1(x + layer.self_attn(x, x, x, padding)[0])
    return layer.norm2(y + layer.linear2(layer.linear1(y).relu()))


@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layer_in_eval_mode_does_not_bypass_topk(padded):
    x, padding = torch.randn(B, S, E), mask_of("bool", (B, S)) if padded else None
    for topk in (3, None):
        module = layer(topk)
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                close(module(x, src_key_padding_mask=padding), slow(module, x, padding))
    with torch.no_grad():
        different = (layer(3)(x) - layer(None)(x)).abs().max()
    assert different > 1e-2


@pytest.mark.parametrize("topk", [None, 3])
def test_encoder_of_padded_sentences(topk):
    """torch.nn.TransformerEncoder turns a padded batch into a nested tensor where it thinks its fast path will run."""
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 64, batch_first=True), 2).eval()
    x = torch.randn(B, S, E)
    padding = torch.arange(S) >= torch.tensor([5, S, 8])[:, None]
    with torch.no_grad():
        dense = plain(x, src_key_padding_mask=padding)
    hivilt.accelerate(plain, topk=topk)
    expected = x
    for module in plain.layers:
        expected = slow(module, expected, padding)
    expected = expected.masked_fill(padding[..., None], 0.0)  # what a nested tensor gives back for padding
    with torch.no_grad():
        close(plain(x, src_key_padding_mask=padding), expected)
    if topk is None:
        close(dense, expected)


def test_encoder_layer_compiles_with_topk():
    torch._dynamo.reset()
    module, x = layer(3), torch.randn(B, S, E)
    with torch.no_grad():
        close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), slow(module, x))


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_nested_tensors_take_no_masks(axis):
    module = MultiheadAttention(E, H, batch_first=True, topk=3, axis=axis).eval()
    nested = torch.nested.nested_tensor([torch.randn(4, E), torch.randn(9, E)])
    out, _ = module(nested, nested, nested)
    for got, x in zip(out.unbind(), nested.unbind(), strict=True):
        close(got, module(x, x, x)[0])
    with pytest.raises(ValueError, match="no masks"):
        module(nested, nested, nested, need_weights=True)
    with pytest.raises(TypeError, match="one nested"):
        module(nested, nested.clone(), nested)


def test_decoder_layer_equals_torch():
    plain = nn.TransformerDecoderLayer(E, H, 64, batch_first=True).eval()
    target, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    call = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": mask_of("bool", (B, S))}
    expected = plain(target, memory, **call)
    hivilt.accelerate(plain)
    close(plain(target, memory, **call), expected)


# Which implementation runs.


def test_dense_without_a_kernel_is_left_to_torch(monkeypatch):
    """float64 has no kernel: the reference would be slower than torch, so it runs only when asked for."""
    ours, torchs = pair(torch.float64)
    x = tokens(ours, dtype=torch.float64)
    expected = torchs(*x, need_weights=False)[0]
    with hivilt.use_backend("reference"):
        close(ours(*x)[0], expected, torch.float64)
        assert hivilt.last_backend() == "reference"
    hivilt.ops.topk_attention(*(torch.ones(1, 1, 2, 2),) * 3)
    before = hivilt.last_backend()
    monkeypatch.setattr("hivilt._backends._thread.ran", "nothing")
    close(ours(*x)[0], expected, torch.float64)
    assert hivilt.last_backend() == "nothing" and before != "nothing"
    padding, bias = mask_of("bool", (B, S)), torch.randn(B, L, S, dtype=torch.float64)
    flat = bias[:, None].expand(B, H, L, S).reshape(B * H, L, S)
    expected = torchs(
        *x, padding, attn_mask=flat.masked_fill(padding[:, None].repeat_interleave(H, 0), -INF), need_weights=False
    )
    close(ours(*x, padding, attn_mask=bias)[0], expected[0], torch.float64)
    close(ours(*x, padding)[0], torchs(*x, padding, need_weights=False)[0], torch.float64)


def test_backends_agree(backend):
    ours, _ = pair(topk=4)
    x = tokens(ours)
    expected, _ = plain_topk(ours, *x, 4)
    with hivilt.use_backend(backend):
        close(ours(*x)[0].double(), expected)
        assert hivilt.last_backend() == backend


@pytest.mark.parametrize("topk", [None, 4])
def test_meta_tensors_have_the_right_shape(topk):
    module = MultiheadAttention(E, H, batch_first=True, device="meta", topk=topk)
    query, key = torch.empty(B, L, E, device="meta"), torch.empty(B, S, E, device="meta")
    out, weights = module(query, key, key, need_weights=True)
    assert out.shape == (B, L, E) and weights.shape == (B, L, S) and out.is_meta
    assert module(query, key, key)[0].shape == (B, L, E)
