"""For every operator in torch.ops.hivilt: opcheck; for the public functions: gradcheck, compile, equality with SDPA."""

import inspect
import itertools
import math

import plain_bank
import plain_contrastive_loss
import plain_scale_fusion
import plain_token_pool
import pytest
import torch
import torch.nn.functional as F

import hivilt
import hivilt.testing as t

op, select, selected = hivilt.ops.topk_attention, hivilt.ops.topk_select, hivilt.ops.selected_attention
B, H, G, Q, N, D, E = 2, 4, 2, 5, 7, 8, 6


# ---- opcheck


def representative(name: str, device: str) -> list[tuple]:
    """Argument tuples of an operator that between them set every optional argument."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).to(device)  # noqa: E731
    backend = () if name.endswith("_cpu") else ("",)
    name = name.removesuffix("_cpu")
    q, k, v = draw(B, H, Q, D), draw(B, G, N, D), draw(B, G, N, E)
    seed = torch.tensor(5, device=device)
    bias, km, qm = draw(B, 1, Q, N), torch.ones(B, N, device=device) > 0, torch.ones(B, Q, device=device) > 0
    km[0, 2] = qm[1, 1] = False
    cq, ck = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 4, 7], dtype=torch.int32)
    plain = (None,) * 7
    packed = [x[:1].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    shared = (bias, km, qm, draw(B, Q, 3), draw(B, N, 3), None, None)
    calls = {
        "topk_attention": [
            (q, k, v, 3, 0, *plain, None, 0.3, 0.0),
            (q, k, v, -1, 0, bias, km, qm, None, None, None, None, None, 0.3, 0.0),
            (q, k, v, 2, 1, *shared, seed, 0.3, 0.5),
            (*packed, 2, 0, None, None, None, None, None, cq, ck, None, 0.3, 0.0),
        ],
        "topk_select": [(q, k, 3, 0, *plain, 0.3), (q, k, 2, 1, *shared, 0.3)],
    }
    if name in calls:
        return [(*args, *backend) for args in calls[name]]
    indices = torch.ops.hivilt.topk_select(q, k, 3, 0, *plain, 0.3, "")
    if name == "selected_attention":
        return [
            (q, k, v, indices, 0, None, None, None, None, 0.3, 0.0, *backend),
            (q, k, v, indices, 0, bias, None, None, seed, 0.3, 0.5, *backend),
        ]
    if name == "topk_attention_backward":
        out, lse, indices = torch.ops.hivilt.topk_attention(
            q, k, v, 3, 0, bias, km, qm, None, None, None, None, None, 0.3, 0.0, ""
        )
        go, gl = torch.randn_like(out), torch.randn_like(lse)
        masks = (bias, km, qm, None, None)
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return [
            (go, gl, q, k, v, out, lse, indices, 0, *masks, None, 0.3, 0.0, True, True, *backend),
            (go, None, q, k, v, out, lse, indices, 0, *masks, None, 0.3, 0.0, False, False, *backend),
            (go, gl, q, k, v, out, lse, empty, 0, *masks, None, 0.3, 0.0, True, True, *backend),
            (go, gl, q, k, v, out, lse, empty, 0, *masks, None, 0.3, 0.0, False, True, *backend),
        ]
    if name == "bank_push_":  # one implementation, for every device
        return plain_bank.representative(name, device)
    others = {"token_pool": plain_token_pool, "bank": plain_bank, "contrastive": plain_contrastive_loss}
    other = next((module for stem, module in others.items() if name.startswith(stem)), plain_scale_fusion)
    return [(*args, *backend) for args in other.representative(name, device)]


def operators() -> list[str]:
    """Every operator of the namespace that takes a tensor."""
    names = {full.split(".")[0][8:] for full in torch._C._dispatch_get_all_op_names() if full.startswith("hivilt::")}
    return sorted(n for n in names if "Tensor" in str(getattr(torch.ops.hivilt, n).default._schema).split("->")[0])


@pytest.mark.parametrize("name", operators())
def test_opcheck(name, verdicts):
    """Schema, fake kernel, autograd registration and tracing of every operator the namespace holds."""
    if name.endswith("_cpu") and verdicts["cpu", "cpu"] is not None:
        pytest.skip(verdicts["cpu", "cpu"])
    calls = representative(name, "cpu")
    assert calls, f"hivilt::{name} has no representative arguments here: add them"
    for args in calls:
        torch.library.opcheck(getattr(torch.ops.hivilt, name).default, args)
        permuted = tuple(
            a.transpose(1, 2).contiguous().transpose(1, 2) if isinstance(a, torch.Tensor) and a.dim() == 4 else a
            for a in args
        )
        torch.library.opcheck(
            getattr(torch.ops.hivilt, name).default, permuted, test_utils=("test_schema", "test_faketensor")
        )


def test_family_is_complete():
    assert {"topk_attention", "selected_attention", "topk_select", "topk_attention_backward"} <= set(operators())


# ---- gradcheck


def separated(seed: int, **changes) -> dict:
    """Float64 inputs whose scores lie far enough apart that no finite difference changes the selection."""
    for attempt in itertools.count():
        g = torch.Generator().manual_seed(seed * 1000 + attempt)
        draw = lambda *shape, g=g: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
        x = {"query": draw(1, 2, 4, 3), "key": draw(1, 1, 5, 3), "value": draw(1, 1, 5, 2)}
        bias = draw(*changes["bias"]) if "bias" in changes else None
        scores = x["query"] @ x["key"].mT / math.sqrt(3) + (0 if bias is None else bias)
        gaps = [s.sort(-1).values.diff().min() for s in (scores, scores.mT.contiguous())]
        if min(gaps) > 1e-3:
            return x | ({} if bias is None else {"attn_mask": bias})
    raise AssertionError


CONFIGS = {
    "dense": {},
    "dense, bias": {"bias": (1, 2, 4, 5)},
    "dense, row bias": {"bias": (1, 1, 4, 1)},
    "dense, key mask": {"key_mask": [[True, False, True, True, False]]},
    "dense, empty row": {"attn_mask": [[True] * 5, [False] * 5, [True] * 5, [False] * 4 + [True]]},
    "keys": {"topk": 2},
    "keys, one": {"topk": 1},
    "keys, all but one": {"topk": 4},
    "keys, bias": {"topk": 2, "bias": (2, 4, 5)},
    "keys, scale": {"topk": 3, "scale": -0.7},
    "keys, query mask": {"topk": 2, "query_mask": [[True, False, True, True]]},
    "queries": {"topk": 2, "axis": "queries"},
    "queries, one": {"topk": 1, "axis": "queries"},
    "queries, bias": {"topk": 2, "axis": "queries", "bias": (4, 5)},
    "queries, key mask": {"topk": 2, "axis": "queries", "key_mask": [[True, False, True, True, False]]},
    "shared": {"topk": 2, "shared": True},
    "shared, queries": {"topk": 2, "axis": "queries", "shared": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck(name):
    """Slow mode in float64, out and lse, every differentiable input."""
    config = dict(CONFIGS[name])
    x = separated(1 + list(CONFIGS).index(name), **config)
    config.pop("bias", None)
    more = {n: torch.tensor(v) if isinstance(v, list) else v for n, v in config.items() if n != "shared"}
    if "shared" in config:
        more |= {n: torch.randn(1, s, 3, dtype=torch.float64) for n, s in (("select_query", 4), ("select_key", 5))}
    names = list(x)

    def call(*leaves):
        out, lse = op(**dict(zip(names, leaves, strict=True)), **more, return_lse=True, backend="reference")
        return out, lse.clamp_min(-1e6)

    assert torch.autograd.gradcheck(call, [v.requires_grad_() for v in x.values()])


def test_gradcheck_selected_attention():
    """Frozen indices, so no separation is needed."""
    x = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5)]
    for axis, rows, C in (("keys", 4, 5), ("queries", 5, 4)):
        indices = torch.rand(1, 2, rows, C).argsort(-1)[..., :3].int()
        assert torch.autograd.gradcheck(lambda *a, i=indices, x=axis: selected(*a, i, axis=x, backend="reference"), x)


def test_gradcheck_varlen():
    cu = torch.tensor([0, 2, 2, 4], dtype=torch.int32), torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    x = [torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (4, 6, 6)]
    packed = hivilt.ops.topk_attention_varlen
    for topk in (None, 1):
        assert torch.autograd.gradcheck(lambda *a, k=topk: packed(*a, *cu, 2, 3, k, backend="reference"), x)


def test_directional_derivative_at_a_real_size(where):
    """Float32 at a real size: the gradient predicts the change of a float64 loss over the same indices."""
    backend, device = where
    for topk, axis in ((None, "keys"), (16, "keys"), (20, "queries")):
        x = {n: torch.randn(1, 4, L, 64, device=device) for n, L in (("query", 96), ("key", 128), ("value", 128))}
        leaves = [v.requires_grad_() for v in x.values()]
        w = torch.randn(1, 4, 96, 64, device=device)
        out, *rest = op(**x, topk=topk, axis=axis, return_lse=True, return_indices=topk is not None, backend=backend)
        grads = torch.autograd.grad(out, leaves, w)
        step = [torch.randn_like(v) for v in x.values()]
        slope = sum((g.double() * s.double()).sum() for g, s in zip(grads, step, strict=True)).item()

        def loss(h, x=x, step=step, rest=rest, axis=axis, w=w):
            moved = [v.detach().double() + h * s.double() for v, s in zip(x.values(), step, strict=True)]
            return (
                (t.oracle(*moved, axis=axis, indices=rest[1] if len(rest) > 1 else None).values["out"] * w).sum().item()
            )

        h = 1e-5
        assert abs(slope - (loss(h) - loss(-h)) / (2 * h)) < 1e-4 * abs(slope) + 1e-2


# ---- compile

COMPILED = {
    "dense": {},
    "keys": {"topk": 3},
    "queries": {"topk": 2, "axis": "queries"},
    "bias": {"topk": 3, "attn_mask": "float"},
    "masks": {"attn_mask": "bool", "key_mask": True, "query_mask": True},
    "shared": {"topk": 3, "shared": True},
}


def compiled_inputs(config: dict, device: str, shape=(B, Q, N), seed: int = 0) -> tuple[list, dict]:
    g = torch.Generator().manual_seed(seed)
    b, q, n = shape
    draw = lambda *s: torch.randn(s, generator=g).to(device)  # noqa: E731
    leaves = [draw(b, H, q, D).requires_grad_(), draw(b, G, n, D).requires_grad_(), draw(b, G, n, E).requires_grad_()]
    more = {n_: v for n_, v in config.items() if n_ in ("topk", "axis")}
    if config.get("attn_mask"):
        more["attn_mask"] = draw(b, 1, q, n) if config["attn_mask"] == "float" else draw(b, 1, q, n) > -1
    if config.get("key_mask"):
        more |= {"key_mask": draw(b, n) > -1, "query_mask": draw(b, q) > -1}
    if config.get("shared"):
        more |= {"select_query": draw(b, q, 3), "select_key": draw(b, n, 3)}
    return leaves, more


@pytest.mark.parametrize("name, dynamic", [*((name, True) for name in COMPILED), ("bias", False)])
def test_fullgraph_equals_eager_bit_for_bit(verdicts, name, dynamic):
    """One graph, whatever backend is in force when it runs: a backend is chosen at run time."""
    torch._dynamo.reset()

    def call(q, k, v, more):
        out, lse, *rest = op(q, k, v, **more, return_lse=True, return_indices="topk" in more)
        return (out * 2, lse, *rest)

    fast = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for i, shape in enumerate(((B, Q, N), (3, 8, 11))):
        for backend, device in (where for where, reason in verdicts.items() if reason is None):
            leaves, more = compiled_inputs(COMPILED[name], device, shape, i)
            with hivilt.use_backend(backend):
                a, b = call(*leaves, more), fast(*leaves, more)
                assert hivilt.last_backend() == backend
                up = [torch.randn_like(a[0]), torch.randn_like(a[1])]
                ga, gb = (torch.autograd.grad(r[:2], leaves, up) for r in (a, b))
            for x, y in zip((*a, *ga), (*b, *gb), strict=True):
                assert torch.equal(x, y) and x.dtype == y.dtype


def test_few_recompiles_over_many_shapes(where):
    backend, device = where
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(lambda q, k, v: op(q, k, v, 3, backend=backend), backend=counter, fullgraph=True)
    for i in range(20):
        leaves, _ = compiled_inputs({}, device, (2 + i % 3, 5 + i, 9 + 2 * i), i)
        assert torch.equal(fast(*leaves), op(*leaves, 3, backend=backend))
    assert counter.frame_count <= 3  # one static, then at most two with symbolic sizes


def test_inductor(where):
    """The default compiler once, permuted inputs, forward and backward."""
    backend, device = where
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    x = [
        torch.randn(B, L, heads, w, generator=g).to(device).requires_grad_()
        for L, heads, w in ((Q, H, D), (N, G, D), (N, G, E))
    ]

    def call(q, k, v):
        out, lse = op(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 3, return_lse=True, backend=backend)
        return out.transpose(1, 2).flatten(2) + 1, lse

    a, b = call(*x), torch.compile(call, fullgraph=True)(*x)
    up = [torch.randn_like(r) for r in a]
    for m, n in zip((*a, *torch.autograd.grad(a, x, up)), (*b, *torch.autograd.grad(b, x, up)), strict=True):
        assert torch.equal(m, n)


# ---- SDPA


def sdpa_calls() -> dict[str, dict]:
    return {
        "plain": {},
        "scale": {"scale": 0.21},
        "bool mask": {"attn_mask": (B, H, Q, N), "bool": True},
        "bool mask per batch": {"attn_mask": (B, 1, Q, N), "bool": True},
        "bool mask (Q, N)": {"attn_mask": (Q, N), "bool": True},
        "bias": {"attn_mask": (B, H, Q, N)},
        "bias per key": {"attn_mask": (1, 1, 1, N)},
        "bias (Q, N)": {"attn_mask": (Q, N)},
        "key mask": {"key_mask": True},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", sdpa_calls())
@pytest.mark.parametrize("topk", [None, N, N + 3])
def test_dense_equals_sdpa(where, name, dtype, topk):
    """topk None, or at least the row, is scaled_dot_product_attention: values and every gradient, masks included."""
    backend, device = where
    config = sdpa_calls()[name]
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).to(device, dtype)  # noqa: E731
    if dtype == torch.float64 and backend != "reference":  # a kernel refuses it and says so
        with pytest.raises(hivilt.BackendError, match="float64"):
            op(draw(B, H, Q, D), draw(B, H, N, D), draw(B, H, N, E), topk, backend=backend)
        return
    x = [draw(B, H, Q, D).requires_grad_(), draw(B, H, N, D).requires_grad_(), draw(B, H, N, E).requires_grad_()]
    theirs, ours = {}, {}
    if "attn_mask" in config:
        mask = draw(*config["attn_mask"])
        mask = mask > -0.7 if "bool" in config else mask.requires_grad_()
        theirs["attn_mask"] = ours["attn_mask"] = mask
        x += [] if "bool" in config else [mask]
    if "key_mask" in config:
        ours["key_mask"] = draw(B, N) > -0.7
        theirs["attn_mask"] = ours["key_mask"][:, None, None]
    if "scale" in config:
        theirs["scale"] = ours["scale"] = config["scale"]
    out, lse = op(*x[:3], topk, **ours, return_lse=True, backend=backend)
    expected = F.scaled_dot_product_attention(*x[:3], **theirs)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    up = draw(B, H, Q, E)
    detached = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in ours.items()}
    truth = t.oracle(*(v.detach() for v in x[:3]), **detached, grad_out=up)
    got = (out, *torch.autograd.grad(out, x, up))
    want = (expected, *torch.autograd.grad(expected, x, up))
    for key, a, b in zip(("out", "query", "key", "value", "attn_mask"), got, want, strict=False):
        t.assert_within(a.detach(), truth.values[key], truth.budget(key, dtype), key)
        t.assert_within(
            b.detach(), truth.values[key], 4 * truth.budget(key, dtype), f"SDPA means something else: {key}"
        )
    t.assert_within(lse.detach(), truth.values["lse"], truth.budget("lse", dtype), "lse")


def test_empty_row_equals_sdpa(where):
    """SDPA, too, gives 0 and gradients of 0 for a row whose every key is masked."""
    backend, device = where
    x = [torch.randn(B, H, n, D, device=device, requires_grad=True) for n in (Q, N, N)]
    mask = torch.ones(Q, N, dtype=torch.bool, device=device)
    mask[2] = False
    out, expected = op(*x, attn_mask=mask, backend=backend), F.scaled_dot_product_attention(*x, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    assert not out[:, :, 2].any()
    for a, b in zip(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True):
        torch.testing.assert_close(a, b)


def test_grouped_heads_equal_sdpa(where):
    backend, device = where
    q, k, v = (torch.randn(B, h, n, D, device=device) for h, n in ((6, Q), (2, N), (2, N)))
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(op(q, k, v, backend=backend), expected)


# ---- names


def test_signatures():
    """The words users type, in the order of the contract."""
    words = list(inspect.signature(op).parameters)
    assert words == ["query", "key", "value", "topk", "axis", "attn_mask", "key_mask", "query_mask", "select_query",
                     "select_key", "scale", "dropout_p", "return_lse", "return_indices", "backend"]  # fmt: skip
    words = list(inspect.signature(hivilt.ops.topk_attention_varlen).parameters)
    assert words[:8] == [
        "query",
        "key",
        "value",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "topk",
    ]
    assert list(inspect.signature(select).parameters)[:3] == ["query", "key", "topk"]
    assert list(inspect.signature(selected).parameters)[:4] == ["query", "key", "value", "indices"]
    for f in (op, select, selected, hivilt.ops.topk_attention_varlen):
        for name, p in inspect.signature(f).parameters.items():
            if name in ("axis", "attn_mask", "scale", "backend", "dropout_p", "return_lse"):
                assert p.kind is p.KEYWORD_ONLY, f"{f.__name__}: {name}"
