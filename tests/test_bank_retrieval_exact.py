"""The promise of precision="exact": the top-k of the float32 dot products, to the last bit, whatever the data.

Every bank here is searched three ways: "exact", which on the CPU scans in bfloat16 with a margin where there are 128
queries or more; "fp32", which does not; and float64.  A margin that is too small loses rows on these banks.
"""

import json
from pathlib import Path

import fresh
import plain_bank as plain
import pytest
import torch

import hivilt

pytestmark = pytest.mark.operation("bank_retrieval")
op = hivilt.ops.bank_retrieval
INF, NAN = plain.INF, plain.NAN
HARD = plain.hard_banks(160)  # enough for the scan in low precision


def same(a, b) -> bool:
    return all(p.cpu().numpy().tobytes() == q.cpu().numpy().tobytes() for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("name", HARD)
def test_hard_banks(where, name):
    backend, device = where
    q, k, topk = (x.to(device) if isinstance(x, torch.Tensor) else x for x in HARD[name])
    got = op(q, k, topk, scale=1e-3, backend=backend)
    assert same(got, op(q, k, topk, scale=1e-3, precision="fp32", backend=backend))
    plain.judge(got, q, k, topk, scale=1e-3, one_sign=True)
    if backend != "reference":
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert same(op(q, k, topk, scale=1e-3, backend=backend), got), threads
        for some in (slice(0, 1), slice(9, 41), slice(20, 160)):  # below and above where low precision is used
            assert same(op(q[some], k, topk, scale=1e-3, backend=backend), [x[some] for x in got]), some


@pytest.mark.parametrize("name", HARD)
def test_hard_banks_with_masks(where, name):
    """Where few of the rows that pass the cut are valid."""
    backend, device = where
    q, k, topk = (x.to(device) if isinstance(x, torch.Tensor) else x for x in HARD[name])
    B, M = q.shape[0], k.shape[0]
    best = op(q, k, 1, backend=backend)[2][:, 0]
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(0)).to(device) < 0.3
    more = {"mask": mask, "exclude": best, "count": M - 100, "scale": 1e-3}
    got = op(q, k, topk, **more, backend=backend)
    assert same(got, op(q, k, topk, **more, precision="fp32", backend=backend))
    plain.judge(got, q, k, topk, **more, one_sign=True)


def bfloat16_lists(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the sets that bfloat16 scores choose are the right ones; in float64 otherwise."""
    q, k, topk = HARD[name]
    rounded = (q.bfloat16().double() @ k.bfloat16().double().mT).topk(topk).indices
    return rounded.sort().values, (q.double() @ k.double().mT).topk(topk).indices.sort().values


@pytest.mark.parametrize(
    "name", ["midpoints of keys", "midpoints of queries", "clusters", "cancellation", "slowly ascending"]
)
def test_hard_banks_are_hard(name):
    """Without a margin these would be wrong."""
    a, b = bfloat16_lists(name)
    assert (a != b).any(1).double().mean() > 0.9


@pytest.mark.parametrize("name", ["midpoints of keys", "midpoints of queries"])
def test_half_a_margin_would_lose_rows(name):
    """The errors of these banks come close to the bound by norms: |q| |k - bf16(k)| + |q - bf16(q)| |bf16(k)|."""
    q, k, _ = (x.double() if isinstance(x, torch.Tensor) else x for x in HARD[name])
    low_q, low_k = HARD[name][0].bfloat16().double(), HARD[name][1].bfloat16().double()
    error = (low_q @ low_k.mT - q @ k.mT).abs().amax(1)
    bound = q.norm(dim=1) * (k - low_k).norm(dim=1).max() + (q - low_q).norm(dim=1) * low_k.norm(dim=1).max()
    assert (error > 0.5 * bound).all() and (error <= bound).all()


@pytest.mark.parametrize("first", [0, 30])
def test_random_calls_at_every_precision(where, first):
    """Also with half banks and queries, masks, counts and excluded rows; integers make many ties."""
    backend, device = where
    for seed in range(first, first + 30):
        x = plain.placed(plain.draw(1000 + seed), device)
        if seed % 3 == 0:
            x |= {name: x[name].float().mul(2).round().to(x[name].dtype) for name in ("query", "keys")}
        got = op(**x, backend=backend)
        want = op(**x, precision="fp32", backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), seed
        plain.judge(got, **x, repro=f"draw({1000 + seed}), {seed % 3}")


@pytest.mark.parametrize("topk", [1, 31, 1000, 2600, 2601])
def test_any_topk(where, topk):
    backend, device = where
    q, k = plain.integers(0, 140, 11).to(device), plain.integers(1, 2600, 11).to(device)
    got = op(q, k, topk, scale=0.1, backend=backend)
    truth = q.double().cpu() @ k.double().cpu().mT
    wanted = torch.from_numpy(plain.best_rows(truth, torch.ones_like(truth) > 0, topk))
    assert torch.equal(got[2].cpu(), wanted)
    assert same(got, op(q, k, topk, scale=0.1, precision="fp32", backend=backend))


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF, 3e38, -3e38, 1e16])
def test_wild_rows_among_tame_ones(where, bad):
    """A row whose norm is no number, or whose products overflow, changes only its own place."""
    backend, device = where
    q, k = plain.numbers(0, 140, 24).to(device), plain.numbers(1, 2200, 24).to(device)
    rows = [0, 95, 96, 1099, 1100, 2199]  # first and last of blocks and of splits
    k[rows] = bad * torch.sign(k[rows])
    for mask in (None, torch.rand(140, 2200, generator=torch.Generator().manual_seed(0)).to(device) < 0.5):
        got = op(q, k, 12, mask=mask, backend=backend)
        want = op(q, k, 12, mask=mask, precision="fp32", backend=backend)
        assert torch.equal(got[2], want[2])
        assert all(a.nan_to_num(7).equal(b.nan_to_num(7)) for a, b in zip(got[:2], want[:2], strict=True))
        assert torch.equal(got[0].isnan(), want[0].isnan()) and torch.equal(got[1].isnan(), want[1].isnan())
        # In float64, where nothing but the infinities themselves overflows; a NaN arises only where float32 has one.
        tame = torch.ones(2200, dtype=torch.bool, device=device)
        tame[rows] = False
        clean = op(q, k, 12, mask=tame if mask is None else mask & tame, precision="fp32", backend="reference")
        ours = got[2]
        for b in range(140):
            mine = [j for j in ours[b].tolist() if j not in rows]
            assert mine == clean[2][b, : len(mine)].tolist() or not got[1][b].isfinite().any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38, 1e16])
def test_wild_queries_among_tame_ones(where, bad):
    backend, device = where
    q, k = plain.numbers(0, 150, 24).to(device), plain.numbers(1, 2200, 24).to(device)
    want = op(q, k, 12, backend=backend)
    worse = q.clone()
    hit = torch.zeros(150, dtype=torch.bool, device=device)
    hit[[0, 33, 99]] = True
    worse[hit, 7] = bad
    got = op(worse, k, 12, backend=backend)
    assert same([x[~hit] for x in got], [x[~hit] for x in want])
    assert ((got[2] >= 0) & (got[2] < 2200)).all()
    fp32 = op(worse, k, 12, precision="fp32", backend=backend)
    assert torch.equal(got[2], fp32[2]) and torch.equal(got[1].nan_to_num(7), fp32[1].nan_to_num(7))


def test_a_bfloat16_bank_is_searched_exactly(where):
    """Its rows have no rounding error, so the margin is that of the queries alone."""
    backend, device = where
    for name in ("midpoints of both", "clusters", "norms 1e-6 to 1e6", "ascending"):
        q, k, topk = HARD[name]
        for half in plain.HALVES:
            bank = k.clamp(-6e4, 6e4).to(half).to(device)
            got = op(q.to(device), bank, topk, scale=1e-3, backend=backend)
            assert same(got, op(q.to(device), bank, topk, scale=1e-3, precision="fp32", backend=backend))
            plain.judge(got, q.to(device), bank, topk, scale=1e-3, one_sign=True)


def test_wide_rows(where):
    """Long dot products, where the margin's share of plain rounding is largest, and widths beside whole vectors."""
    backend, device = where
    for C in (767, 2048):
        q = plain.numbers(C, 128, C).abs().to(device)
        k = (1 + 1e-6 * plain.numbers(C + 1, 300, C)).to(device)  # scores that differ by less than float32's errors
        got = op(q, k, 17, scale=1e-3, backend=backend)
        assert same(got, op(q, k, 17, scale=1e-3, precision="fp32", backend=backend))
        plain.judge(got, q, k, 17, scale=1e-3, one_sign=True)


def test_budget_of_scores_is_not_idle():
    """A wrong neighbour is noticed: on the clustered bank the excuse is smaller than most gaps between scores."""
    q, k, topk = HARD["clusters"]
    true, _, slack = plain.dots(q, k)
    best = true.sort(1, descending=True).values
    gaps = best[:, 0] - best[:, topk]
    assert (gaps > 4 * slack.amax(1)).all()
    wrong = list(op(q, k, topk, backend="reference"))
    worst = true.argmin(1)
    wrong[2][:, -1], wrong[1][:, -1] = worst, true.gather(1, worst[:, None])[:, 0].float()
    with pytest.raises(AssertionError, match="miss better rows"):
        plain.judge(wrong, q, k, topk)


# Every instruction set.

ISA = """
import hashlib, json, os, sys, torch
sys.path.insert(0, sys.argv[1])
import plain_bank as plain, hivilt
from test_bank_shadow import read
op, shadow_of, digest = hivilt.ops.bank_retrieval, hivilt.ops.bank_shadow, hashlib.sha256()
def same(a, b):
    return all(p.numpy().tobytes() == q.numpy().tobytes() for p, q in zip(a, b, strict=True))
torch.set_num_threads(2)
assert torch.ops.hivilt.isa() == os.environ["HIVILT_ISA"]
for name, (q, k, topk) in plain.hard_banks(130, seed=1).items():
    got = op(q, k, topk, scale=1e-3, backend="cpu")
    assert same(got, op(q, k, topk, scale=1e-3, precision="fp32", backend="cpu")), name
    assert same([x[5:9] for x in got], op(q[5:9], k, topk, scale=1e-3, backend="cpu")), name
    assert same([x[:14] for x in got], op(q[:14], k, topk, scale=1e-3, shadow=shadow_of(k), backend="cpu")), name
    plain.judge(got, q, k, topk, scale=1e-3, one_sign=True, repro=name)
    codes, step, norm, residue, _ = read(shadow_of(k), k.shape[1])
    assert ((k.double() - step[:, None] * codes).norm(dim=1) <= residue)[norm < 1e15].all(), name
for seed in range(40):
    x = plain.draw(seed)
    plain.judge(op(**x, backend="cpu"), **x, repro=str(seed))
for B, topk in ((3, 7), (70, 40), (130, 500)):
    q, k = plain.integers(B, B, 13), plain.integers(topk, 2300, 13)
    for precision in ("exact", "fp32", "bf16"):  # small integers are exact in each
        scores, indices = op(q, k, topk, precision=precision, backend="cpu")[1:]
        digest.update(scores.numpy().tobytes() + indices.numpy().tobytes())
q, k, v = (plain.numbers(i, n, 19).requires_grad_() for i, n in enumerate((132, 500, 500)))
out, scores, indices = op(q, k, 9, values=v, scale=0.2, backend="cpu")
up = plain.numbers(4, *out.shape), plain.numbers(5, *scores.shape)
truth = plain.gradients(q, k, v, indices, 0.2, *up)
for name, grad in zip(("query", "keys", "values"), torch.autograd.grad((out, scores), (q, k, v), up)):
    plain.t.assert_within(grad, truth.values[name], truth.budget(name, grad.dtype), name)
print(json.dumps(digest.hexdigest()))
"""

FLAGS = {"scalar": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
         "avx512_bf16": ("avx512f", "avx512_bf16", "avx512_vnni")}  # fmt: skip
DIGESTS: dict[str, str] = {}


@pytest.mark.parametrize("isa", FLAGS)
def test_each_instruction_set(verdicts, isa):
    """The hard banks and some of everything else on every instruction set this processor has; on integers, the same
    scores and rows bit for bit."""
    if verdicts["cpu", "cpu"] is not None:
        pytest.skip(verdicts["cpu", "cpu"])
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        flags = next(line for line in info if line.startswith("flags")).split()
    missing = [flag for flag in FLAGS[isa] if flag not in flags]
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    done = fresh.run(ISA, str(Path(__file__).parent), timeout=240, HIVILT_ISA=isa)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    DIGESTS[isa] = json.loads(done.stdout)
    assert len(set(DIGESTS.values())) == 1, DIGESTS
