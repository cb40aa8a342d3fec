"""hivilt.nn.MultiheadAttention in training, half types, traces and torch's own layers, copied, saved and loaded."""

import copy
import io
import pickle

import pytest
import torch
from plain_attention import CONSTRUCTIONS, INF, B, E, H, L, S, close, mask_of, pair, plain_topk, tokens
from torch import nn

import hivilt
from hivilt.nn import MultiheadAttention

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
        ({"num_heads": 5}, ValueError),
        ({"num_heads": 4.0}, TypeError),
        ({"embed_dim": 0}, ValueError),
        ({"dropout": 1.5}, ValueError),
        ({"kdim": -1}, ValueError),
        ({"vdim": "16"}, TypeError),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, kind):
    with pytest.raises(kind, match=next(iter(options))):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H, **options})
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
