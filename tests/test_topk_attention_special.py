"""NaN and infinity, where they are read and where they must not be: forward, all gradients, indices in range."""

import itertools
import math

import pytest
import torch

import hivilt
import hivilt.testing as t

op, select = hivilt.ops.topk_attention, hivilt.ops.topk_select
NAN, INF = math.nan, math.inf
NEGATIVE_NAN = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
B, H, G, Q, N, D, E = 2, 2, 1, 37, 70, 8, 5
CALLS = [(None, "keys"), (6, "keys"), (3, "queries"), (500, "queries")]


def inputs(device, topk, axis, **changes) -> dict:
    plain = {
        "mask": "",
        "mask_shape": (),
        "key_mask": False,
        "query_mask": False,
        "select": 0,
        "scale": 1.0,
        "fill": "normal",
    }
    return t.case(3, torch.float32, shape=(B, H, G, Q, N, D, E), topk=topk, axis=axis, **plain | changes).inputs(device)


def run(x: dict, backend: str, upstream: torch.Tensor | None = None) -> dict:
    """Everything a call returns, gradients for an upstream gradient of ones included."""
    x = {n: v.detach().clone() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    leaves = {n: x[n].requires_grad_() for n in ("query", "key", "value")}
    out, lse, *rest = op(**x, return_lse=True, return_indices=x["topk"] is not None, backend=backend)
    upstream = torch.ones_like(out) if upstream is None else upstream
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    got = {"out": out.detach(), "lse": lse.detach()} | {f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}
    if rest:
        width = N if x["axis"] == "keys" else Q
        assert ((rest[0] >= -1) & (rest[0] < width)).all(), "wild index"
        got["indices"] = rest[0]
    return got


@pytest.mark.parametrize("topk, axis", CALLS)
@pytest.mark.parametrize("bad", [NAN, NEGATIVE_NAN, INF], ids=["nan", "-nan", "inf"])
def test_bad_query_ruins_its_own_row_only(where, topk, axis, bad):
    backend, device = where
    x = inputs(device, topk, axis)
    masked = torch.ones(B, Q, dtype=torch.bool, device=device)
    masked[0, 11] = False
    clean = run(x | {"query_mask": masked}, backend)
    x["query"][0, 1, 11] = bad if math.isnan(bad) else 0.0
    x["query"][0, 1, 11, 2] = bad
    got = run(x, backend)
    assert got["out"][0, 1, 11].isnan().all() and got["lse"][0, 1, 11].isnan()
    rest = torch.ones(B, H, Q, dtype=torch.bool, device=device)
    rest[0, :, 11] = False
    if axis == "keys" or topk is None or topk >= Q:
        # the other rows see the same set, so not one bit of them moves
        for name in ("out", "lse", "grad query"):
            assert torch.equal(got[name][rest], clean[name][rest]), name
    else:
        assert got["out"][rest].isfinite().all() and got["grad query"][rest].isfinite().all()
    if topk == 6:  # keys that the bad row did not keep get their usual gradients
        untouched = torch.ones(N, dtype=torch.bool)
        for h in range(H):
            untouched[got["indices"][0, h, 11].long().cpu()] = False
        for name in ("grad key", "grad value"):
            assert torch.equal(got[name][0, 0, untouched], clean[name][0, 0, untouched]), name
    assert got["grad key"][1].isfinite().all() and got["grad value"][1].isfinite().all()


@pytest.mark.parametrize("bad", [NAN, NEGATIVE_NAN])
def test_nan_query_never_displaces_another(where, bad):
    """axis="queries": NaN ranks below every number, so it takes a slot only where slots remain."""
    backend, device = where
    for topk in (1, 5, Q - 1, Q):
        x = inputs(device, topk, "queries")
        x["query"][1, 0, 4] = bad
        got = run(x, backend)
        kept = t.pairs_from_indices(got["indices"], Q, N, H, "queries")
        assert kept[1, 0, 4].any() == (topk == Q)
        t.assert_topk(got["indices"], x["query"], x["key"], topk, axis="queries", scale=1.0)
        rest = torch.ones(B, H, Q, dtype=torch.bool, device=device)
        rest[1, 0, 4] = False
        assert got["out"][1, 0, 4].isnan().all() and got["out"][rest].isfinite().all()


@pytest.mark.parametrize("topk, axis", CALLS)
@pytest.mark.parametrize("bad", [NAN, NEGATIVE_NAN], ids=["nan", "-nan"])
def test_nan_key_ruins_every_row_that_may_see_it(where, topk, axis, bad):
    backend, device = where
    x = inputs(device, topk, axis)
    x["key"][0, 0, 40, 3] = bad
    sees = torch.rand(Q, generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    mask = torch.ones(Q, N, dtype=torch.bool, device=device)
    mask[:, 40] = sees
    got = run(x | {"attn_mask": mask}, backend)
    assert got["out"][0][:, sees].isnan().all() and got["lse"][0][:, sees].isnan().all()
    x["key"][0, 0, 40, 3] = 0.25
    clean = run(x | {"attn_mask": mask}, backend)
    for name in ("out", "lse", "grad query"):
        assert torch.equal(got[name][0][:, ~sees], clean[name][0][:, ~sees]), name
        assert torch.equal(got[name][1], clean[name][1]), name
    assert got["grad key"][1].isfinite().all() and got["grad value"][1].isfinite().all()


def ruin_key(x: dict) -> None:
    x["key"][0, 0, 40, 3] = NAN


def ruin_key_by_infinity(x: dict) -> None:
    x["key"][0, 0, 40, 3] = INF  # the sign of the query decides: -inf is no score, +inf ruins


def ruin_query(x: dict) -> None:
    x["query"][1, 1, 5] = NAN


def overflow(x: dict) -> None:
    x["key"][0, 0, 33], x["query"][0, 1, 7] = 1e25, 1e25


def ruin_bias(x: dict) -> None:
    x["attn_mask"][1, 0, 6, 50], x["attn_mask"][0, 0, 9, 2], x["attn_mask"][0, 0, 9, 3] = NAN, INF, -INF


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("mask", ["", "bool", "float32"])
@pytest.mark.parametrize("ruin", [ruin_key, ruin_key_by_infinity, ruin_query, overflow, ruin_bias])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_selection_saves_no_row(where, ruin, mask, axis, dtype):
    """It looks at no attention score, yet a bad one of a valid pair ruins its row although the pair is not kept."""
    backend, device = where
    mask = "float32" if ruin is ruin_bias else mask
    x = inputs(device, 2, axis, mask=mask, mask_shape=(B, 1, Q, N), select=4)
    x["key_mask"] = (torch.arange(N, device=device) % 9 != 5).repeat(B, 1)
    x["query_mask"] = (torch.arange(Q, device=device) % 7 != 3).repeat(B, 1)
    x["key"][0, :, 41] = NAN  # of no pair
    ruin(x)
    # The selection source stays float32: beside half types it is judged as given.
    x = {n: v.to(dtype) if n in ("query", "key", "value", "attn_mask") and v.is_floating_point() else v
         for n, v in x.items()}  # fmt: skip
    out, lse = op(**x, return_lse=True, backend=backend)
    q, k = (x[n].double().cpu() for n in ("query", "key"))
    scores = (q @ k.repeat_interleave(H // G, 1).mT * x.get("scale", D**-0.5)).float()
    valid = x["key_mask"][:, None, None, :].cpu() & x["query_mask"][:, None, :, None].cpu() & (scores != -INF)
    if mask == "bool":
        valid = valid & x["attn_mask"].cpu()
    if mask == "float32":
        valid = valid & (x["attn_mask"].cpu() != -INF)
        scores = scores + x["attn_mask"].float().cpu()
    lost = (valid & ~(scores < INF)).any(-1)
    assert lost.any() and not lost.all()
    assert torch.equal(lse.isnan().cpu(), lost) and torch.equal(out.isnan().all(-1).cpu(), lost)
    assert torch.equal(out.isnan().any(-1).cpu(), lost)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("topk", [1, 3, 8, 30, 37, 69])
def test_nan_scores_fill_the_last_slots(where, topk, axis):
    """Numbers first, then NaN by index, never a masked pair: the count stays min(topk, #valid)."""
    backend, device = where
    x = inputs(device, topk, axis, mask="bool", mask_shape=(B, H, Q, N), key_mask=True, query_mask=True)
    for name, share in (("query", 0.0), ("key", 0.8), ("query", 0.8)):
        rows = torch.rand(x[name].shape[:3], generator=torch.Generator().manual_seed(topk)).to(device) < share
        x[name][rows] = NAN
        indices = select(**{n: v for n, v in x.items() if n != "value"}, backend=backend)
        t.assert_topk(indices, **{n: v for n, v in x.items() if n != "value"})
        assert torch.equal(op(**x, return_indices=True, backend=backend)[1], indices)


@pytest.mark.parametrize("topk, axis", CALLS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_bad_value_reaches_only_who_keeps_it(where, topk, axis, bad):
    backend, device = where
    x = inputs(device, topk, axis)
    clean = run(x, backend)
    x["value"][0, 0, 33, 2] = bad
    got = run(x, backend)
    kept = torch.ones(B, H, Q, N, dtype=torch.bool, device=device)
    if topk is not None:
        assert torch.equal(got["indices"], clean["indices"])
        kept = t.pairs_from_indices(got["indices"], Q, N, H, axis)
    hit = torch.zeros(B, H, Q, E, dtype=torch.bool, device=device)
    hit[0, :, :, 2] = kept[0, :, :, 33]
    assert hit.any()
    if math.isnan(bad):
        assert got["out"][hit].isnan().all()
    else:
        assert (got["out"][hit] == bad).all()
    assert torch.equal(got["out"][~hit], clean["out"][~hit]) and torch.equal(got["lse"], clean["lse"])
    rows = ~hit.any(-1)
    assert torch.equal(got["grad query"][rows], clean["grad query"][rows])
    assert torch.equal(got["grad value"], clean["grad value"])
    lonely = ~(kept & hit.any(-1)[..., None]).any(1).any(1)  # keys that no touched row keeps
    assert torch.equal(got["grad key"][:, 0][lonely], clean["grad key"][:, 0][lonely])


@pytest.mark.parametrize("topk, axis", CALLS)
def test_infinite_scores(where, topk, axis):
    """+inf makes the row NaN as in softmax; -inf takes no part."""
    backend, device = where
    x = inputs(device, topk, axis)
    bias = torch.zeros(Q, N, device=device)
    bias[5, 60] = INF
    bias[7, 1:] = -INF
    bias[8] = -INF
    got = run(x | {"attn_mask": bias}, backend)
    assert got["out"][:, :, 5].isnan().all() and got["lse"][:, :, 5].isnan().all()
    rest = [i for i in range(Q) if i != 5]
    assert got["out"][:, :, rest].isfinite().all() and got["grad query"][:, :, rest].isfinite().all()
    assert not got["out"][:, :, 8].any() and (got["lse"][:, :, 8] == -INF).all()
    if axis == "keys":
        torch.testing.assert_close(got["out"][:, :, 7], x["value"][:, :, 0].expand(B, H, E))
    overflow = x | {"query": x["query"] * 1e30, "key": x["key"] * 1e30}
    got = run(overflow, backend)
    scores = (overflow["query"].double() @ overflow["key"].double().mT).float()
    lost = (scores == INF).any(-1)
    assert lost.all() and got["out"].isnan().all() and got["lse"].isnan().all()


@pytest.mark.parametrize("topk, axis", CALLS)
@pytest.mark.parametrize("bad", [(NAN,), (INF,), (-INF,), (NAN, INF, -INF, 3e38)], ids=str)
def test_masked_poison_changes_no_bit(where, topk, axis, bad):
    """Masked keys, masked values, masked queries and idle rows of both selections may hold anything."""
    backend, device = where
    for used in itertools.product((False, True), repeat=3):
        masks = {
            "key_mask": used[0],
            "query_mask": used[1],
            "mask": "bool",
            "mask_shape": (B, 1, Q if used[2] else 1, N),
        }
        for shared in (0, 4):
            x = inputs(device, topk, axis, select=shared, **masks)
            poisoned = t.poison(x, bad)
            upstream = torch.randn(B, H, Q, E, device=device)
            clean = run(x, backend, upstream)
            if used[1]:
                upstream = torch.where(x["query_mask"][:, None, :, None], upstream, bad[0])
            got = run(poisoned, backend, upstream)
            for name, value in clean.items():
                assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_everything_nan_does_not_hang(where, axis):
    backend, device = where
    x = inputs(device, 6, axis)
    for name, bad in itertools.product(("query", "key", "value"), (NAN, NEGATIVE_NAN, INF, -INF)):
        got = run(x | {name: torch.full_like(x[name], bad)}, backend)
        assert not got["out"].isfinite().any() or axis == "queries"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_but_finite(where, dtype):
    """Numbers near the largest and the smallest of the dtype as values and scores: finite in, finite out.

    Dense attention, like SDPA, may add up to the row's kept count of values before it divides.
    """
    backend, device = where
    info = torch.finfo(dtype)
    x = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in inputs(device, 4, "keys").items()}
    tiny = x | {"query": x["query"] * info.tiny, "key": x["key"] * info.tiny}
    got = run(tiny, backend)
    assert got["out"].isfinite().all()
    value = torch.full_like(x["value"], info.max / 4)
    torch.testing.assert_close(op(**x | {"value": value}, backend=backend)[0, 0], value[0, 0, :Q], rtol=1e-2, atol=0)
    smallest = torch.full_like(x["value"], info.tiny * info.eps)
    assert torch.equal(op(**x | {"value": smallest, "topk": 1}, backend=backend), smallest[:, :, :1].expand(B, H, Q, E))


@pytest.mark.parametrize("bad", [NAN, NEGATIVE_NAN, INF], ids=str)
@pytest.mark.parametrize("N", [20, 64, 600])
def test_bad_scores_among_ties_end(where, bad, N):
    """Every score the same but one or two: the search for a threshold ends wherever the bad one stands."""
    backend, device = where
    q = torch.ones(1, 1, 3, 1, device=device)
    for at, other in itertools.product((0, 1, N // 2, N - 1), (0.0, 1.0, -1.0)):
        k = torch.zeros(1, 1, N, 1, device=device)
        k[..., 3, 0], k[..., at, 0] = other, bad
        out, indices = op(q, k, torch.ones_like(k), 5, return_indices=True, backend=backend)
        assert out.isnan().all()
        best = sorted(range(N), key=lambda j: (math.isnan(x := k[0, 0, j, 0].item()), -x, j))[:5]
        assert indices.tolist() == [[[sorted(best)] * 3]]


@pytest.mark.parametrize("topk, axis", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mean_of_huge_values(where, topk, axis, dtype):
    """Values near the largest number: their sum overflows, what attention returns does not."""
    backend, device = where
    x = inputs(device, topk, axis)
    x |= {name: 0.1 * x[name] for name in ("query", "key")}
    x["value"] = torch.full_like(x["value"], 0.9 * torch.finfo(dtype).max)
    x = {n: v.to(dtype) if torch.is_tensor(v) else v for n, v in x.items()}
    out, lse = op(**x, return_lse=True, backend=backend)
    kept = lse > -INF
    assert kept.any() and (out[~kept] == 0).all()
    # Probabilities that sum to 1 within some units in the last place of float32, and one rounding to the dtype.
    allowed = 32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (out[kept].double() / x["value"].double().max() - 1).abs().max() <= allowed


@pytest.mark.parametrize("size", [1e3, 1e5, 1e8])
def test_gradients_of_huge_scores_are_finite(where, size):
    """Forward and backward may round scores of 1e10 by more than exp can bear."""
    backend, device = where
    g = torch.Generator().manual_seed(0)
    q, k, v = ((torch.randn(1, 2, n, 64, generator=g) * m).to(device) for n, m in ((50, size), (90, size), (90, 1)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, indices = op(*leaves, 20, return_indices=True, backend=backend)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(x.isfinite().all() for x in grads)
    # The weights of a query sum to 1, whatever they are.
    torch.testing.assert_close(grads[2].sum((2, 3)), torch.full((1, 2), 50.0 * 64, device=device))


def test_lse_of_a_ruined_listed_row(where):
    backend, device = where
    q, k, v = (torch.randn(1, 1, n, 8, device=device) for n in (20, 6, 6))
    q[0, 0, 0, 0], q[0, 0, 17, 3] = NAN, NAN
    lists = torch.tensor([0, 2, 3], device=device).expand(1, 1, 20, 3)
    out, lse = hivilt.ops.selected_attention(q, k, v, lists, return_lse=True, backend=backend)
    lost = torch.isin(torch.arange(20, device=device), torch.tensor([0, 17], device=device))
    assert torch.equal(lse[0, 0].isnan(), lost) and torch.equal(out[0, 0].isnan().all(1), lost)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("threads", [1, 2])
def test_listed_pairs_without_a_score_get_no_gradient(where, axis, threads):
    """A score of -inf makes a pair invalid although it is listed; 0 * inf must not show, however the work is split."""
    backend, device = where
    torch.set_num_threads(threads)
    q, k, v = (torch.rand(1, 1, n, 64, device=device) + 0.1 for n in (400, 300, 300))
    q[0, 0, 1, 0] = -INF
    k.requires_grad_(), v.requires_grad_()
    rows, width = (400, 300) if axis == "keys" else (300, 400)
    lists = torch.arange(3, device=device).expand(1, 1, rows, 3)
    out = hivilt.ops.selected_attention(q, k, v, lists, axis=axis, backend=backend)
    assert (out[0, 0, 1] == 0).all() and width > 3
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (k, v)))


def test_dense_pairs_without_a_score_take_no_part(where):
    """Without any mask: a key whose scores are all -inf may hold a NaN value, and gets no gradient."""
    backend, device = where
    q, k, v = (torch.rand(1, 2, n, 24, device=device) + 0.1 for n in (40, 60, 60))
    leaves = [x.detach().clone() for x in (q, k, v)]
    leaves[1][0, 0, 2, 0], leaves[2][0, 0, 2], leaves[0][0, 1, 5, 1] = -INF, NAN, -INF
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = op(*leaves, return_lse=True, backend=backend)
    assert out.isfinite().all() and lse[0, 1, 5] == -INF and (out[0, 1, 5] == 0).all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][0, 0, 2] == 0).all() and (grads[2][0, 0, 2] == 0).all() and (grads[0][0, 1, 5] == 0).all()
    rest = [torch.cat([x[:, :1, :2], x[:, :1, 3:]], 2) for x in (k, v)]
    torch.testing.assert_close(out[:, :1], op(q[:, :1], *rest, backend="reference"))
