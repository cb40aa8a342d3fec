"""Bitwise identity: run to run, one thread or two, whatever the batch neighbours, whatever is padded."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

import hivilt
import hivilt.testing as t

op = hivilt.ops.topk_attention
CALLS = [(None, "keys", 0), (9, "keys", 0), (4, "queries", 0), (9, "keys", 5), (4, "queries", 5)]
H, G, Q, N, D, E = 4, 2, 41, 75, 24, 20
REPEATS = {"reference": 20}  # others: 250


def inputs(device, batch, topk, axis, select, dtype=torch.float32, **changes) -> dict:
    plain = {"mask": "float", "mask_shape": (batch, 1, Q, N), "key_mask": True, "query_mask": True, "scale": None}
    plain |= {"fill": "normal", "layout": ("contiguous",) * 3}
    shape = changes.pop("shape", (batch, H, G, Q, N, D, E))
    return t.case(17, dtype, shape=shape, topk=topk, axis=axis, select=select, **plain | changes).inputs(device)


def run(x: dict, backend: str, upstream) -> dict[str, torch.Tensor]:
    x = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    leaves = {n: x[n].requires_grad_() for n in ("query", "key", "value", "attn_mask") if n in x}
    out, lse, *rest = op(**x, return_lse=True, return_indices=x["topk"] is not None, backend=backend)
    grads = torch.autograd.grad([out, lse], list(leaves.values()), upstream)
    got = {"out": out, "lse": lse} | {f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}
    return {n: v.detach() for n, v in got.items()} | ({"indices": rest[0]} if rest else {})


def upstream(x: dict, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    B, heads, rows, _ = x["query"].shape
    out = torch.randn(B, heads, rows, x["value"].shape[-1], generator=g).to(x["query"].device, x["query"].dtype)
    return [out, torch.randn(B, heads, rows, generator=g).to(out.device)]


def digest(got: dict) -> str:
    raw = b"".join(v.cpu().contiguous().view(torch.uint8).numpy().tobytes() for v in got.values())
    return hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("topk, axis, select", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats(where, topk, axis, select, dtype):
    backend, device = where
    x = inputs(device, 2, topk, axis, select, dtype)
    grads = upstream(x)
    first = digest(run(x, backend, grads))
    for _ in range(REPEATS.get(backend, 250) // 5):
        assert digest(run(x, backend, grads)) == first


@pytest.mark.parametrize("topk, axis, select", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size", [(2, H, G, Q, N, D, E), (1, 1, 1, 300, 700, 32, 32), (3, 2, 1, 1, 1500, 64, 64)], ids=str
)
def test_threads(where, topk, axis, select, dtype, size):
    """One (b, h), many, and long rows: each way of splitting the work."""
    backend, device = where
    x = inputs(device, size[0], topk, axis, select, dtype, shape=size, mask_shape=(1, 1, size[3], size[4]))
    grads = upstream(x)
    two = run(x, backend, grads)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        other = run(x, backend, grads)
        for name, value in two.items():
            assert torch.equal(value, other[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("topk, axis, select", CALLS)
def test_batch_neighbours(where, topk, axis, select):
    """A sample's bits depend neither on how many others there are nor on its place among them."""
    backend, device = where
    x = inputs(device, 33, topk, axis, select)
    whole_up = upstream(x)
    whole = run(x, backend, whole_up)
    for batch in (1, 2, 7, 16):
        for start in (0, 5, 33 - batch):
            pick = slice(start, start + batch)
            part = {n: v[pick] if isinstance(v, torch.Tensor) else v for n, v in x.items()}
            got = run(part, backend, [u[pick] for u in whole_up])
            for name, value in got.items():
                assert torch.equal(value, whole[name][pick]), f"{name}: batch {batch} from {start}"


@pytest.mark.parametrize("topk, axis, select", CALLS)
def test_head_neighbours(where, topk, axis, select):
    backend, device = where
    x = inputs(device, 2, topk, axis, select)
    whole_up = upstream(x)
    whole = run(x, backend, whole_up)
    for g in range(G):
        heads = slice(g * H // G, (g + 1) * H // G)
        part = x | {"query": x["query"][:, heads], "key": x["key"][:, g : g + 1], "value": x["value"][:, g : g + 1]}
        got = run(part, backend, [u[:, heads] for u in whole_up])
        for name in ("out", "lse", "grad query"):
            assert torch.equal(got[name], whole[name][:, heads]), name
        for name in ("grad key", "grad value"):
            assert torch.equal(got[name], whole[name][:, g : g + 1]), name
        if "indices" in got and not select:
            assert torch.equal(got["indices"], whole["indices"][:, heads])


@pytest.mark.parametrize("topk, axis, select", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "more", [(0, 1), (0, 9), (0, 64), (0, 500), (1, 0), (7, 0), (64, 0), (300, 0), (33, 77)], ids=str
)
def test_padding_changes_no_bit(where, topk, axis, select, dtype, more):
    """Extra masked queries or keys, with NaN in them, leave every bit of the rest alone."""
    backend, device = where
    B = 2
    x = inputs(device, B, topk, axis, select, dtype)
    grads = upstream(x)
    plain = run(x, backend, grads)
    mq, mk = more
    y = dict(x)
    pad = {"query": mq, "select_query": mq, "key": mk, "value": mk, "select_key": mk}
    y |= {n: F.pad(x[n], (0, 0, 0, extra), value=float("nan")) for n, extra in pad.items() if n in x}
    y["query_mask"], y["key_mask"] = F.pad(x["query_mask"], (0, mq)), F.pad(x["key_mask"], (0, mk))
    y["attn_mask"] = F.pad(x["attn_mask"], (0, mk, 0, mq), value=1.5)
    wide = run(y, backend, [F.pad(grads[0], (0, 0, 0, mq), value=1.0), F.pad(grads[1], (0, mq), value=1.0)])
    rows = {"out": Q, "lse": Q, "grad query": Q, "grad key": N, "grad value": N, "grad attn_mask": Q}
    rows["indices"] = Q if axis == "keys" else N
    for name, value in plain.items():
        got = wide[name]
        rest = got[:, :, rows[name] :]
        got = got[:, :, : rows[name]]
        if name == "grad attn_mask":
            assert not got[..., N:].any()
            got = got[..., :N]
        assert torch.equal(got, value), name
        assert (rest == (-float("inf") if name == "lse" else -1 if name == "indices" else 0)).all(), (
            f"padding of {name}"
        )


def test_longer_topk_than_row_changes_no_bit(where):
    """topk at, and beyond, the number of keys is one and the same dense call."""
    backend, device = where
    x = inputs(device, 2, None, "keys", 0)
    dense = op(**x, return_lse=True, backend=backend)
    for topk in (N, N + 1, N + 500):
        for a, b in zip(op(**x | {"topk": topk}, return_lse=True, backend=backend), dense, strict=True):
            assert torch.equal(a, b), f"topk={topk}"


@pytest.mark.parametrize("threads", [1, 3])
def test_masked_keys_beside_many_queries(where, threads):
    """Gradients of keys sum over 700 queries, in links whose length must not depend on how many keys there are."""
    backend, device = where
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 24, generator=g).to(device) for n in (700, 60, 60))
    grads = []
    for more in (0, 3, 17, 90):
        leaves = [q.clone(), F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more))]
        leaves = [x.requires_grad_() for x in leaves]
        mask = torch.arange(60 + more, device=device)[None] < 60
        out = op(*leaves, 16, key_mask=mask, backend=backend)
        grads.append([x[:, :, : 700 if i == 0 else 60] for i, x in enumerate(
                      torch.autograd.grad(out, leaves, torch.ones_like(out)))])  # fmt: skip
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
