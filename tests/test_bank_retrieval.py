"""Retrieval from a bank: scores, selection, order and sums against float64, whatever the call and its layouts."""

import itertools
import math

import plain_bank as plain
import pytest
import torch
from guard_pages import survives

import hivilt
import hivilt.testing as t

pytestmark = pytest.mark.operation("bank_retrieval")
op, attend = hivilt.ops.bank_retrieval, hivilt.ops.bank_attention
INF, NAN = plain.INF, plain.NAN


def same(a, b) -> bool:
    """Bit for bit, NaN included."""
    return all(p.shape == q.shape and p.cpu().numpy().tobytes() == q.cpu().numpy().tobytes()
               for p, q in zip(a, b, strict=True))  # fmt: skip


def bits(x):
    return tuple(v.view(torch.int16) if v.dtype == torch.bfloat16 else v for v in x)


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_calls(where, first):
    backend, device = where
    for seed in range(first, first + 10):
        x = plain.placed(plain.draw(seed), device)
        plain.judge(op(**x, backend=backend), **x, repro=f"plain_bank.draw({seed})")


@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_order_on_exact_scores(where, precision):
    """Integers: the one right list, ties by index, against numpy's lexsort."""
    backend, device = where
    for seed, (B, M, C, topk) in enumerate([(3, 40, 5, 7), (70, 1500, 6, 30), (66, 2500, 33, 200), (1, 9, 1, 12)]):
        q, k = plain.integers(seed, B, C), plain.integers(100 + seed, M, C)
        mask = torch.rand(B, M, generator=torch.Generator().manual_seed(seed)) < 0.7
        truth = q.double() @ k.double().mT
        for allowed in (None, mask):
            valid = plain.valid_pairs(truth, mask=allowed)
            got = op(q.to(device), k.to(device), topk, mask=None if allowed is None else allowed.to(device),
                     precision=precision, backend=backend)  # fmt: skip
            wanted = torch.from_numpy(plain.best_rows(truth, valid, topk))
            assert torch.equal(got[2].cpu(), wanted)
            scores = torch.where(wanted >= 0, truth.gather(1, wanted.clamp(min=0)), -INF)
            assert torch.equal(got[1].cpu().double(), scores)


def test_zeros_of_both_signs_are_equal(where):
    backend, device = where
    keys = torch.tensor([[-0.0], [0.0], [-0.0], [-1.0], [0.0]], device=device)
    for B in (1, 64):
        _, scores, indices = op(torch.ones(B, 1, device=device), keys, 4, backend=backend)
        assert torch.equal(indices.cpu(), torch.tensor([[0, 1, 2, 4]]).expand(B, 4)) and (scores == 0).all()


def test_against_faiss():
    """The same scores as an exhaustive index, up to what float32 excuses on both sides."""
    faiss = pytest.importorskip("faiss")
    q, k = plain.numbers(0, 80, 64), plain.numbers(1, 5000, 64)
    index = faiss.IndexFlatIP(64)
    index.add(k.numpy())
    theirs, slots = (torch.from_numpy(x) for x in index.search(q.numpy(), 50))
    _, _, slack = plain.dots(q, k)
    for backend in ("auto", "reference"):
        got = op(q, k, 50, scale=0.1, backend=backend)
        assert ((got[1] - theirs).abs() <= 2 * slack.amax(1, keepdim=True)).all()
        # Of 4000 places a few may hold neighbours whose scores float32 cannot tell apart.
        assert (got[2] == slots).double().mean() > 0.99


def test_padding_and_few_rows(where):
    """topk beyond the bank, beyond count, and nothing at all."""
    backend, device = where
    q, k = plain.numbers(0, 5, 6).to(device), plain.numbers(1, 4, 6).to(device)
    for topk, count in itertools.product((1, 3, 4, 9, 1000), (None, 0, 2, 4, 7, -1)):
        got = op(q, k, topk, count=count, scale=0.5, backend=backend)
        plain.judge(got, q, k, topk, scale=0.5, count=count)
        if count in (0, -1):
            assert not got[0].any()


@pytest.mark.parametrize(
    "B, M, C, E", [(0, 7, 5, 3), (0, 0, 5, 3), (4, 0, 5, 3), (4, 7, 0, 3), (4, 7, 5, 0), (70, 0, 5, 3)]
)
def test_empty_sizes(where, B, M, C, E):
    backend, device = where
    q, k, v = (plain.numbers(0, *shape).to(device).requires_grad_() for shape in ((B, C), (M, C), (M, E)))
    for values in (None, v):
        got = op(q, k, 3, values=values, backend=backend)
        plain.judge(got, q.detach(), k.detach(), 3, values=values if values is None else v.detach())
        grads = torch.autograd.grad(got[0].sum() + got[1].nan_to_num(neginf=0).sum(), [q, k], allow_unused=True)
        assert all(g.shape == x.shape and g.isfinite().all() for g, x in zip(grads, (q, k), strict=True))
    rows, lse = attend(q, k, values=v, backend=backend)
    assert rows.shape == (B, E) and lse.shape == (B,)
    if M == 0:
        assert not rows.any() and (lse == -INF).all()


def test_nothing_valid(where):
    """Zeros, -inf and -1 for every way in which no row is left; other queries are as they were."""
    backend, device = where
    B, M = 66, 300
    q, k = plain.numbers(0, B, 9).to(device), plain.numbers(1, M, 9).to(device)
    whole = op(q, k, 4, backend=backend)
    mask = torch.ones(B, M, dtype=torch.bool, device=device)
    mask[3] = False
    got = op(q, k, 4, mask=mask, backend=backend)
    assert not got[0][3].any() and (got[1][3] == -INF).all() and (got[2][3] == -1).all()
    others = torch.arange(B, device=device) != 3
    assert same([x[others] for x in got], [x[others] for x in whole])
    single = op(q, k[:1], 4, exclude=0, backend=backend)
    assert not single[0].any() and (single[2] == -1).all()
    # -inf is a score like that of a masked row
    low = k.clone()
    low[5:] = -INF
    got = op(q.abs() + 0.1, low, 9, backend=backend)
    assert (got[2][:, 5:] == -1).all() and (got[2][:, :5] < 5).all() and got[0].isfinite().all()


def test_masks_agree(where):
    """The same rows by count, by a mask of the bank, by one of all pairs, and by leaving them out of the bank."""
    backend, device = where
    q, k = plain.numbers(0, 70, 24).to(device), plain.numbers(1, 2100, 24).to(device)
    mask = torch.arange(2100, device=device) < 1234
    want = op(q, k[:1234].clone(), 20, backend=backend)
    ways = ({"count": 1234}, {"count": torch.tensor(1234, device=device)}, {"mask": mask},
            {"mask": mask.expand(70, -1)}, {"count": 1500, "mask": mask})  # fmt: skip
    for more in ways:
        assert same(op(q, k, 20, **more, backend=backend), want), list(more)
    # Rows that are not valid are never looked at.
    k[1234:] = NAN
    for more in ways:
        assert same(op(q, k, 20, **more, backend=backend), want), list(more)


def test_exclude(where):
    """Without itself every query finds the others in the order it found them before."""
    backend, device = where
    k = plain.numbers(0, 90, 16).to(device)
    k = k / k.norm(dim=1, keepdim=True)  # so that each row is its own best
    own = torch.arange(90, device=device)
    whole, other = op(k, k, 11, backend=backend), op(k, k, 10, exclude=own, backend=backend)
    assert torch.equal(whole[2][:, 0], own)
    assert same([x[:, 1:] for x in whole[1:]], other[1:])
    assert same(op(k, k, 10, exclude=own.int(), backend=backend), other)
    assert same(op(k, k, 10, exclude=-1, backend=backend), op(k, k, 10, backend=backend))
    assert not (op(k, k, 10, exclude=4, backend=backend)[2] == 4).any()


def test_scale(where):
    """A number, tensors of one element; 0 weighs alike, a negative one prefers the worst of the kept rows."""
    backend, device = where
    q, k = plain.numbers(0, 6, 8).to(device), plain.numbers(1, 50, 8).to(device)
    for scale in (0.0, -0.75, 0.25, 40.0):  # numbers of float32, as a tensor becomes one
        got = op(q, k, 8, scale=scale, backend=backend)
        plain.judge(got, q, k, 8, scale=scale)
        for like in (torch.tensor(scale), torch.tensor([[scale]]), torch.tensor(scale, dtype=torch.float64)):
            assert same(op(q, k, 8, scale=like.to(device), backend=backend), got)
    assert torch.equal(op(q, k, 8, scale=0.0, backend=backend)[2], op(q, k, 8, scale=9.0, backend=backend)[2])
    lost = op(q, k, 8, scale=torch.tensor(NAN, device=device), backend=backend)
    assert lost[0].isnan().all() and same(lost[1:], op(q, k, 8, backend=backend)[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(where, dtype):
    backend, device = where
    q, k, v = (
        plain.numbers(i, n, c, dtype=dtype).to(device) for i, (n, c) in enumerate(((65, 19), (1100, 19), (1100, 5)))
    )
    if dtype == torch.float64:
        if backend != "reference":
            with pytest.raises(hivilt.BackendError, match="float64"):
                op(q, k, 9, backend=backend)
            backend = None
        got = op(q, k, 9, values=v, scale=0.2, backend=backend)
        plain.judge(got, q, k, 9, values=v, scale=0.2)
        return
    got = op(q, k, 9, values=v, scale=0.2, backend=backend)
    plain.judge(got, q, k, 9, values=v, scale=0.2)
    # float32 queries on a half bank: numbers of a half type are numbers of float32, so nothing else can come out
    wide = op(q.float(), k, 9, values=v, scale=0.2, backend=backend)
    plain.judge(wide, q.float(), k, 9, values=v, scale=0.2)
    assert same(wide[1:], got[1:]) and same(bits([wide[0].to(dtype)]), bits(got[:1]))
    all_wide = op(q.float(), k.float(), 9, values=v.float(), scale=0.2, backend=backend)
    assert same(all_wide, wide)


@pytest.mark.parametrize("B", [3, 65])
def test_layouts(where, B):
    """Strides, offsets, expanded and transposed views of every argument: the bits of contiguous ones."""
    backend, device = where
    x = {"query": plain.numbers(0, B, 17), "keys": plain.numbers(1, 130, 17), "values": plain.numbers(2, 130, 6),
         "mask": plain.numbers(3, B, 130) > -1, "exclude": torch.randint(-1, 130, (B,))}  # fmt: skip
    x = plain.placed(x, device)
    for name in x:
        for layout, view in t.layouts(x[name]):
            clone = x | {name: view.clone(memory_format=torch.contiguous_format)}
            want = op(**clone, topk=7, scale=0.3, backend=backend)
            assert same(op(**x | {name: view}, topk=7, scale=0.3, backend=backend), want), (name, layout)


GUARDED = """
import itertools, plain_bank as plain
for B, M, C, E in ((1, 13, 5, 3), (9, 300, 24, 8), (67, 1001, 17, 9), (64, 2049, 31, 33)):
    parts = (plain.numbers(0, B, C), plain.numbers(1, M, C), plain.numbers(2, M, E))
    mask = plain.numbers(3, B, M) > -0.5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (t.guarded(x.to(dtype), at).requires_grad_() for x in parts)
        got = ops.bank_retrieval(q, k, 10, values=v, mask=t.guarded(mask, at), backend=backend)
        with torch.no_grad():
            plain.judge(got, q, k, 10, values=v, mask=mask)
        got[0].sum().backward()
        if backend == "cpu":
            k = k.detach()
            shadow = ops.bank_shadow(k, shadow=t.guarded(torch.zeros_like(ops.bank_shadow(k)), at))
            few = q[:9].detach()
            with torch.no_grad():
                plain.judge(ops.bank_retrieval(few, k, 2, shadow=shadow, backend=backend), few, k, 2)
        count += 1
"""


@pytest.mark.kernels
@pytest.mark.parametrize("at", ["end", "start"])
def test_reads_and_writes_nothing_beyond_its_tensors(where, at):
    """Banks and queries that end, or begin, at a page that faults when touched."""
    survives(GUARDED, 12, where, at)


def test_nothing_uninitialised(where, nan_filled_memory):
    backend, device = where
    for seed in range(8):
        x = plain.placed(plain.draw(seed), device)
        plain.judge(op(**x, backend=backend), **x, repro=f"plain_bank.draw({seed})")


def test_inputs_stay_as_they_are(where):
    backend, device = where
    x = plain.placed(plain.draw(4), device)
    copies = {n: v.clone() for n, v in x.items() if isinstance(v, torch.Tensor)}
    op(**x, backend=backend)
    assert all(torch.equal(x[n], v) for n, v in copies.items())


def test_same_bits_for_any_threads_and_neighbours(where):
    """One thread or two, run to run, and a query alone or among others."""
    backend, device = where
    for seed in range(12):
        x = plain.placed(plain.draw(seed, mixed=seed % 2 == 0), device)
        x |= {"query": x["query"].repeat(-(-70 // len(x["query"])), 1)}
        B = len(x["query"])
        x["mask"] = (
            None
            if x["mask"] is None
            else x["mask"].expand(B, -1)
            if x["mask"].dim() == 1
            else x["mask"][:1].expand(B, -1)
        )
        x["exclude"] = None
        want = bits(op(**x, backend=backend))
        assert same(bits(op(**x, backend=backend)), want)
        torch.set_num_threads(1)
        assert same(bits(op(**x, backend=backend)), want), seed
        torch.set_num_threads(2)
        for some in (slice(0, 1), slice(5, 38), slice(B - 3, B)):
            mask = None if x["mask"] is None else x["mask"][some]
            part = bits(op(**x | {"query": x["query"][some], "mask": mask}, backend=backend))
            assert same(part, [v[some] for v in want]), (seed, some)


def test_approximate_mode_is_close(where):
    """What "bf16" lists is listed with its float32 score, in order, and is as good as bfloat16 scores can tell."""
    backend, device = where
    q, k = plain.numbers(0, 70, 64).to(device), plain.numbers(1, 3000, 64).to(device)
    retrieved, scores, indices = op(q, k, 30, scale=0.1, precision="bf16", backend=backend)
    true, size, slack = plain.dots(q, k)
    assert ((scores - true.gather(1, indices)).abs() <= slack.gather(1, indices)).all()
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert all(len(set(row)) == 30 for row in indices.tolist())
    # Two factors rounded to 8 bits: each score within 2^-7 of the sum of its absolute terms, and a bit of float32.
    best = true.topk(30).values[:, -1:]
    assert (scores >= best - 2 * 2.0**-7 * size.amax(1, keepdim=True)).all()
    rows = k[indices]
    want = (torch.softmax(0.1 * scores.double(), 1)[..., None] * rows).sum(1)
    assert (retrieved - want).abs().max() < 1e-5  # numbers below 4, 30 summands: 2^-24 each


# Special values.


@pytest.mark.parametrize("B", [2, 70])
@pytest.mark.parametrize("bad", [NAN, -NAN, INF])
def test_a_bad_row_spoils_exactly_who_may_read_it(where, B, bad):
    backend, device = where
    q, k = plain.numbers(0, B, 20).to(device), plain.numbers(1, 700, 20).to(device)
    q = q + (0.1 * (q == 0))
    k[123, 4] = bad
    mask = torch.ones(B, 700, dtype=torch.bool, device=device)
    mask[1, 123] = False
    retrieved, scores, indices = op(q, k, 6, mask=mask, backend=backend)
    clean = k.clone()
    clean[123] = 0
    good = op(q, clean, 6, mask=torch.arange(700, device=device) != 123, backend=backend)
    assert ((indices >= 0) & (indices < 700)).all()
    for b in range(B):
        score = bad * q[b, 4] if bad == INF else bad
        if b == 1 or score == -INF:  # not valid
            assert same([x[b] for x in (retrieved, scores, indices)], [x[b] for x in good]), b
        elif score == INF:
            assert scores[b, 0] == INF and indices[b, 0] == 123 and retrieved[b].isnan().all()
            assert same([scores[b, 1:], indices[b, 1:]], [x[b, :5] for x in good[1:]])
        else:
            assert retrieved[b].isnan().all() and scores[b].isnan().all()
            assert torch.equal(indices[b], good[2][b]), "numbers come before NaN"


@pytest.mark.parametrize("B", [2, 70])
def test_a_bad_query_spoils_itself_alone(where, B):
    backend, device = where
    q, k = plain.numbers(0, B, 20).to(device), plain.numbers(1, 700, 20).to(device)
    want = op(q, k, 6, backend=backend)
    for bad in (NAN, INF, 1e30):
        worse = q.clone()
        worse[1, 3] = bad
        got = op(worse, k, 6, backend=backend)
        others = torch.arange(B, device=device) != 1
        assert same([x[others] for x in got], [x[others] for x in want])
        assert ((got[2] >= 0) & (got[2] < 700)).all()
        if bad != 1e30:
            assert got[0][1].isnan().all()
    lost = op(torch.full_like(q, NAN), k, 6, backend=backend)
    assert lost[0].isnan().all() and lost[1].isnan().all()
    assert torch.equal(lost[2].cpu(), torch.arange(6).expand(B, 6)), "the first rows, as all NaN are alike"


def test_a_bad_value_reaches_who_keeps_its_row(where):
    backend, device = where
    q, k, v = (plain.numbers(i, n, 8).to(device) for i, n in ((0, 70), (1, 400), (2, 400)))
    v[17] = NAN
    want = op(q, k, 5, values=v.nan_to_num(), backend=backend)
    got = op(q, k, 5, values=v, backend=backend)
    hit = (got[2] == 17).any(1)
    assert same(got[1:], want[1:]) and 0 < hit.sum() < 70
    assert got[0][hit].isnan().all() and torch.equal(got[0][~hit], want[0][~hit])


def test_large_scaled_scores(where):
    """Logits far beyond the range of exp, on both sides."""
    backend, device = where
    q, k = plain.integers(0, 6, 8).to(device), plain.integers(1, 60, 8).to(device)
    for scale in (1e4, -1e4, 1e-30):
        plain.judge(op(q, k, 7, scale=scale, backend=backend), q, k, 7, scale=scale)


# Dense retrieval.


def dense(q, k, v, scale, valid):
    """In float64: retrieved, lse, and the terms of their budgets."""
    true, size, _ = plain.dots(q, k)
    v, factor = v.double(), plain.number_of(scale)
    logits = torch.where(valid, factor * true, -INF)
    lse = torch.logsumexp(logits, 1)
    p = torch.where(valid, (logits - lse[:, None]).exp(), 0.0)
    truth = t.Truth(valid, {"out": p @ v, "lse": lse})
    weight = 2 * abs(factor) * torch.where(valid, size, 0.0).amax(1) + 2
    truth.spread = {"out": weight[:, None] * ((p + t.TINY * valid) @ v.abs()), "lse": weight}
    return truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("what", ["plain", "count", "mask", "pairs", "all"])
def test_bank_attention(where, dtype, what):
    backend, device = where
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    B, M = 33, 250
    q, k, v = (plain.numbers(i, n, c, dtype=dtype).to(device) for i, (n, c) in enumerate(((B, 16), (M, 16), (M, 11))))
    more = {}
    if what in ("count", "all"):
        more["count"] = torch.tensor(200, device=device)
    if what in ("mask", "all"):
        more["mask"] = plain.numbers(3, M).to(device) > 0
    if what == "pairs":
        more["mask"] = plain.numbers(3, B, M).to(device) > 0
        more["mask"][4] = False
    valid = plain.valid_pairs(torch.zeros(B, M, device=device), **more)
    for scale in (0.25, torch.tensor(-0.4, device=device)):
        out, lse = attend(q, k, values=v, scale=scale, **more, backend=backend)
        # A scale that is a tensor multiplies the query first, which rounds once more.
        truth = dense(q, k, v, scale, valid)
        assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if what == "pairs":
            assert not out[4].any() and lse[4] == -INF
            truth.values["out"][4] = 0.0
        t.assert_within(out, truth.values["out"], truth.budget("out", dtype), "out")
        t.assert_within(lse, truth.values["lse"], truth.budget("lse", dtype), "lse")


def test_bank_attention_of_halves_merges_to_the_whole(where):
    """By their lse, as shards of a bank would be."""
    backend, device = where
    q, k, v = (plain.numbers(i, n, c).to(device) for i, (n, c) in enumerate(((20, 16), (300, 16), (300, 11))))
    whole, whole_lse = attend(q, k, values=v, scale=0.3, backend=backend)
    for at in (1, 133, 300):  # the last leaves an empty half
        parts = [attend(q, k[s], values=v[s], scale=0.3, backend=backend) for s in (slice(0, at), slice(at, 300))]
        lse = torch.logsumexp(torch.stack([p[1].double() for p in parts]), 0)
        merged = sum(p[0].double() * (p[1].double() - lse).exp()[:, None] for p in parts)
        truth = dense(q, k, v, 0.3, torch.ones(20, 300, dtype=torch.bool, device=device))
        # Two results, each within the budget of the whole.
        t.assert_within(merged, whole.double(), 2 * truth.budget("out", torch.float32), "merged")
        t.assert_within(lse, whole_lse.double(), 2 * truth.budget("lse", torch.float32), "lse")


def test_bank_attention_is_retrieval_of_everything(where):
    backend, device = where
    q, k = plain.numbers(0, 9, 12).to(device), plain.numbers(1, 80, 12).to(device)
    dense_rows, _ = attend(q, k, scale=0.3, count=70, backend=backend)
    rows = op(q, k, 80, scale=0.3, count=70, backend=backend)[0]
    truth = dense(q, k, k, 0.3, plain.valid_pairs(torch.zeros(9, 80, device=device), 70))
    t.assert_within(rows, dense_rows.double(), 2 * truth.budget("out", torch.float32), "rows")


def test_bank_attention_never_reads_what_is_not_valid(where):
    backend, device = where
    q, k, v = (plain.numbers(i, n, 8).to(device) for i, n in ((0, 5), (1, 40), (2, 40)))
    want = attend(q, k[:30].clone(), values=v[:30].clone(), backend=backend)
    k[30:], v[30:] = NAN, INF
    for more in ({"count": 30}, {"mask": torch.arange(40, device=device) < 30}):
        assert same(attend(q, k, values=v, **more, backend=backend), want)
    lost, lse = attend(q, k, values=v, backend=backend)
    assert lost.isnan().all() and lse.isnan().all()
    assert math.isfinite(float(want[1].sum()))
