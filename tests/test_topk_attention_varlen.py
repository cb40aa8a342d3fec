"""Packed sequences: each segment equals its own dense call, empty segments and slack rows included."""

import itertools
import math

import pytest
import torch

import hivilt
import hivilt.testing as t

op, packed = hivilt.ops.topk_attention, hivilt.ops.topk_attention_varlen
H, G, D, E, C = 4, 2, 12, 7, 5
LENGTHS = {
    "plain": ([5, 9, 1], [7, 3, 12]),
    "empty first": ([0, 4, 6], [5, 0, 8]),
    "empty middle": ([3, 0, 6], [5, 4, 0]),
    "empty last": ([3, 6, 0], [5, 4, 9]),
    "no keys anywhere": ([3, 6], [0, 0]),
    "no queries anywhere": ([0, 0], [3, 6]),
    "nothing at all": ([0, 0, 0], [0, 0, 0]),
    "one segment": ([37], [65]),
    "many": ([1, 0, 17, 2, 33, 0, 0, 8], [16, 3, 0, 64, 31, 0, 5, 1]),
}


def offsets(lengths: list[int], dtype=torch.int32) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def inputs(device, lengths, slack=(0, 0), dtype=torch.float32, shared=False, seed=0) -> dict:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g).to(device, dtype)  # noqa: E731
    Tq, Tk = sum(lengths[0]) + slack[0], sum(lengths[1]) + slack[1]
    x = {"query": draw(Tq, H, D), "key": draw(Tk, G, D), "value": draw(Tk, G, E)}
    x |= {"select_query": draw(Tq, C), "select_key": draw(Tk, C)} if shared else {}
    return x


def limits(lengths) -> tuple:
    return (offsets(lengths[0]), offsets(lengths[1]), max(lengths[0], default=0), max(lengths[1], default=0))


def segment(x: dict, lengths, s: int) -> dict:
    """The arguments of segment ``s`` as a dense call of batch one."""
    (a, b), (c, d) = (offsets(n)[s : s + 2].tolist() for n in lengths)
    q = {"query": x["query"][a:b].transpose(0, 1)[None]}
    q |= {n: x[n][c:d].transpose(0, 1)[None] for n in ("key", "value")}
    if "select_query" in x:
        q |= {"select_query": x["select_query"][None, a:b], "select_key": x["select_key"][None, c:d]}
    return q


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("topk, axis", [(None, "keys"), (3, "keys"), (2, "queries"), (100, "keys"), (100, "queries")])
@pytest.mark.parametrize("shared", [False, True])
def test_each_segment_within_budget(where, name, topk, axis, shared):
    backend, device = where
    lengths = LENGTHS[name]
    for slack, dtype in (((0, 0), torch.float32), ((4, 6), torch.float32), ((1, 0), torch.bfloat16)):
        x = inputs(device, lengths, slack, dtype, shared)
        total_q, total_k = sum(lengths[0]), sum(lengths[1])
        for n, total in (("query", total_q), ("key", total_k), ("value", total_k)):
            x[n][total:] = math.nan  # slack rows belong to nobody
        leaves = [x[n].requires_grad_() for n in ("query", "key", "value")]
        result = packed(**x, cu_seqlens_q=offsets(lengths[0]), cu_seqlens_k=offsets(lengths[1], torch.int64),
                        max_seqlen_q=max(lengths[0]), max_seqlen_k=max(lengths[1]), topk=topk, axis=axis,
                        return_lse=True, return_indices=topk is not None, backend=backend)  # fmt: skip
        out, lse = result[:2]
        assert out.shape == (total_q + slack[0], H, E) and lse.shape == out.shape[:2]
        assert not out[total_q:].any() and (lse[total_q:] == -math.inf).all()
        g, gl = torch.randn_like(out), torch.randn_like(lse)
        g.data[total_q:], gl.data[total_q:] = math.nan, math.nan
        grads = dict(zip(("query", "key", "value"), torch.autograd.grad([out, lse], leaves, [g, gl]), strict=True))
        x = {n: v.detach() for n, v in x.items()}
        for n, total in (("query", total_q), ("key", total_k), ("value", total_k)):
            assert not grads[n][total:].any(), f"gradient of {n} beyond the last segment"
        if topk is not None:
            rows = total_q + slack[0] if axis == "keys" else total_k + slack[1]
            assert result[2].shape == (rows, 1 if shared else H, topk) and result[2].dtype == torch.int32
            assert (result[2][total_q if axis == "keys" else total_k :] == -1).all()
        for s in range(len(lengths[0])):
            (a, b), (c, d) = (offsets(n)[s : s + 2].tolist() for n in lengths)
            y = segment(x, lengths, s) | {"axis": axis, "topk": topk}
            indices = None
            if topk is not None:
                indices = result[2][a:b] if axis == "keys" else result[2][c:d]
                indices = indices.transpose(0, 1)[None]
                t.assert_topk(indices, **{n: v for n, v in y.items() if n != "value"})
            truth = t.oracle(**y, indices=indices, grad_out=g[a:b].transpose(0, 1)[None],
                             grad_lse=gl[a:b].transpose(0, 1)[None])  # fmt: skip
            got = {"out": out[a:b], "lse": lse[a:b], "query": grads["query"][a:b], "key": grads["key"][c:d],
                   "value": grads["value"][c:d]}  # fmt: skip
            for n, v in got.items():
                budget = truth.budget(n, dtype)
                t.assert_within(v.detach().transpose(0, 1)[None], truth.values[n], budget, f"{name}, segment {s}: {n}")


@pytest.mark.parametrize("topk, axis", [(None, "keys"), (3, "keys"), (2, "queries")])
def test_segment_neighbours_change_no_bit(where, topk, axis):
    """A segment packed alone, or with others, or somewhere else among them: the same bits, gradients included."""
    backend, device = where
    lengths = LENGTHS["many"]
    x = inputs(device, lengths)

    def run(order: list[int]) -> dict[int, list[torch.Tensor]]:
        spans = [[offsets(n)[s : s + 2].tolist() for n in lengths] for s in order]
        parts = [torch.cat([x[n][slice(*p[n != "query"])] for p in spans]).requires_grad_() for n in x]
        own = tuple([n[s] for s in order] for n in lengths)
        out, lse = packed(*parts, *limits(own), topk, axis=axis, return_lse=True, backend=backend)
        grads = torch.autograd.grad(out.sum(), parts)
        results: dict[int, list[torch.Tensor]] = {}
        for i, s in enumerate(order):
            (a, b), (c, d) = (offsets(n)[i : i + 2].tolist() for n in own)
            results[s] = [out[a:b], lse[a:b], grads[0][a:b], grads[1][c:d], grads[2][c:d]]
        return results

    whole = run(list(range(len(lengths[0]))))
    for order in [[s] for s in whole] + [[7, 4, 2], [4, 4, 3], list(range(len(whole)))[::-1]]:
        if topk and min(sum(n[s] for s in order) for n in lengths) <= topk:
            continue  # topk at or beyond all tokens there are is the dense call
        for s, values in run(order).items():
            for name, a, b in zip(("out", "lse", "query", "key", "value"), values, whole[s], strict=True):
                assert torch.equal(a, b), f"segment {s} among {order}: {name}"


def test_dropout_counts_local_positions(where):
    """The mask of a segment is that of (segment, head, local query, local key)."""
    backend, device = where
    lengths = LENGTHS["many"]
    x = inputs(device, lengths)
    x["value"] = torch.ones_like(x["value"])
    seed = torch.tensor(11, device=device)
    out, _, _ = torch.ops.hivilt.topk_attention(
        *(x[n].transpose(0, 1)[None] for n in ("query", "key", "value")), -1, 0, None, None, None, None, None,
        offsets(lengths[0]), offsets(lengths[1]), seed, D**-0.5, 0.5, backend,
    )  # fmt: skip
    for s in range(len(lengths[0])):
        (a, b), (c, d) = (offsets(n)[s : s + 2].tolist() for n in lengths)
        keep = t.dropout_keep(11, 0.5, (1, H, b - a, d - c), first_batch=s).to(device)
        truth = t.oracle(**segment(x, lengths, s), keep=keep)
        t.assert_within(out[:, :, a:b], truth.values["out"], truth.budget("out", torch.float32), f"segment {s}")


def test_offset_devices_and_dtypes_agree(where):
    backend, device = where
    lengths = LENGTHS["many"]
    x = inputs(device, lengths)
    sizes = max(lengths[0]), max(lengths[1])
    expected = packed(*x.values(), *limits(lengths), 3, backend=backend)
    for dtype in (torch.int32, torch.int64):
        cu = [offsets(n, dtype).to(device) for n in lengths]
        assert torch.equal(packed(*x.values(), *cu, *sizes, 3, backend=backend), expected)
    strided = [torch.stack([offsets(n), offsets(n) + 999], 1)[:, 0] for n in lengths]
    assert torch.equal(packed(*x.values(), *strided, *sizes, 3, backend=backend), expected)
    assert torch.equal(packed(*x.values(), *limits(lengths)[:2], 999, 2**40, 3, backend=backend), expected)


BAD_OFFSETS = {
    "not from zero": [1, 5, 8],
    "falling": [0, 5, 3],
    "negative": [0, -1, 8],
    "beyond the end": [0, 5, 900],
    "huge": [0, 2**31 - 1, 2**31 - 1],
    "empty": [],
}


@pytest.mark.parametrize("side", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("name", BAD_OFFSETS)
def test_offsets_are_never_trusted(where, side, name):
    backend, device = where
    x = inputs(device, ([5, 3], [4, 6]))
    cu = {"cu_seqlens_q": offsets([5, 3]), "cu_seqlens_k": offsets([4, 6])}
    cu[side] = torch.tensor(BAD_OFFSETS[name], dtype=torch.int32)
    with pytest.raises(ValueError, match=side):
        packed(**x, **cu, max_seqlen_q=2**31, max_seqlen_k=2**31, backend=backend)


@pytest.mark.parametrize("change, names", [
    ({"max_seqlen_q": 4}, "max_seqlen_q"),
    ({"max_seqlen_k": 5}, "max_seqlen_k"),
    ({"max_seqlen_q": -1}, "max_seqlen_q"),
    ({"max_seqlen_k": 2.5}, "max_seqlen_k"),
    ({"cu_seqlens_q": offsets([5, 2, 1])}, "cu_seqlens"),
    ({"cu_seqlens_k": offsets([4, 6]).float()}, "cu_seqlens_k"),
    ({"cu_seqlens_k": offsets([4, 6])[None]}, "cu_seqlens_k"),
    ({"cu_seqlens_q": None}, "cu_seqlens_q"),
    ({"cu_seqlens_q": [0, 5, 8]}, "cu_seqlens_q"),
    ({"topk": 0}, "topk"),
    ({"query": torch.zeros(8, H)}, "query"),
    ({"key": torch.zeros(9, G, D)}, "value"),
    ({"select_query": torch.zeros(8, C)}, "select_key"),
    ({"select_query": torch.zeros(7, C), "select_key": torch.zeros(10, C)}, "select_query"),
], ids=str)  # fmt: skip
def test_malformed_packed_calls(where, change, names):
    backend, device = where
    x = inputs(device, ([5, 3], [4, 6])) | dict(
        zip(("cu_seqlens_q", "cu_seqlens_k"), limits(([5, 3], [4, 6]))[:2], strict=True)
    )
    change = {
        n: v.to(device) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in change.items()
    }
    with pytest.raises((ValueError, TypeError), match=names):
        packed(**x | {"max_seqlen_q": 5, "max_seqlen_k": 6, "backend": backend} | change)


def test_masks_are_not_taken(where):
    backend, device = where
    x = inputs(device, ([5, 3], [4, 6]))
    for name in ("attn_mask", "key_mask", "query_mask"):
        with pytest.raises((ValueError, TypeError), match=name):
            packed(
                *x.values(),
                *limits(([5, 3], [4, 6])),
                2,
                backend=backend,
                **{name: torch.ones(8, 10, dtype=torch.bool)},
            )
