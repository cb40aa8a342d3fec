"""FeatureBank, plain and fast, against deques, dictionaries and float64: writing, reading, checkpoints, compilation,
processes and threads."""

import collections
import copy
import itertools
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import hivilt
from hivilt.reference import modules as plain
from hivilt.reference.modules._read_write_lock import ReadWriteLock

KINDS = {"plain": plain.FeatureBank, "fast": hivilt.nn.FeatureBank}
INF, NAN = float("inf"), float("nan")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def numbered(first: int, count: int, width: int = 3) -> torch.Tensor:
    """Rows that hold their number."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, width).clone()


def truth(query, rows, topk=None, scale=1.0, valid=None):
    """retrieved, scores and slots in float64, one query at a time, from the rows as they are; autograd works on it."""
    scores = query.double() @ rows.double().T
    retrieved, kept, slots = [], [], []
    for b in range(len(query)):
        order = [j for j in range(len(rows)) if valid is None or valid.expand(len(query), -1)[b, j]]
        order.sort(key=lambda j: (-scores[b, j].item(), j))
        order = torch.tensor(order[: len(rows) if topk is None else topk], dtype=torch.long)
        shares = torch.softmax(scale * scores[b, order], 0)
        retrieved.append(shares @ rows[order].double())
        kept.append(scores[b, order])
        slots.append(order)
    return torch.stack(retrieved), kept, slots


def assert_near(found, true, dtype, of=1.0, rounded=0.0):
    """Within 32 roundings to float32 of what is summed, and 2 of the result to its dtype; with ``rounded``, what is
    summed has been through that dtype too, as the output has that backward starts from."""
    true = true.detach()
    wide = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    budget = 32 * wide * max(of, float(true.abs().max())) + 2 * UNIT[dtype] * (true.abs() + rounded)
    assert ((found.detach().double() - true).abs() <= budget).all(), float((found.detach() - true).abs().max())


# Writing.


def test_ring_is_a_deque(kind):
    """All small M, places of the pointer and batches, empty ones and those longer than twice the bank."""
    for M in range(1, 5):
        for before, B in itertools.product(range(2 * M + 1), range(2 * M + 3)):
            bank, rows = kind(M, 3), collections.deque(maxlen=M)
            start = 0
            for count in (before, B, 1):
                bank.update(numbered(start, count))
                rows.extend(range(start, start + count))
                start += count
                assert bank.ptr.tolist() == [start % M]
                assert int(bank.filled) == len(rows) == min(start, M)
                for number in rows:
                    assert bank.bank[number % M].tolist() == [number] * 3
            assert int(bank.skipped) == 0


def test_moving_average_runs_over_the_ring(kind):
    for M, before, B in itertools.product((1, 2, 4), range(6), range(10)):
        bank, held, at = kind(M, 3, 0.25, update_mode="ema"), {}, 0
        for count, first in ((before, 100), (B, 0), (3, 50)):
            rows = numbered(first, count)
            bank.update(rows)
            for i in range(max(0, count - M), count):  # of more than M rows the last M
                slot = (at + i) % M
                held[slot] = 0.25 * held[slot] + 0.75 * float(rows[i, 0]) if slot in held else float(rows[i, 0])
            at = (at + count) % M
            assert bank.ptr.tolist() == [at] and int(bank.filled) == len(held)
            assert set(bank.written.nonzero().flatten().tolist()) == set(held)
            for slot, value in held.items():
                torch.testing.assert_close(
                    bank.bank[slot].double(), torch.full((3,), value).double(), rtol=1e-6, atol=0
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_moving_average_by_slot(kind, dtype):
    """Duplicates count as their mean, what was never written takes it, other slots keep their bits."""
    M, C = 7, 5
    bank, held = kind(M, C, 0.7, update_mode="ema", dtype=dtype), {}
    for step in range(8):
        rows = torch.randn(11, C, dtype=torch.float64).to(dtype)
        slots = torch.randint(0, M - 1 if step < 4 else M, (11,), dtype=torch.int32 if step % 2 else torch.int64)
        before, groups = bank.bank.clone(), collections.defaultdict(list)
        bank.update(rows, slots)
        for slot, row in zip(slots.tolist(), rows.double(), strict=True):
            groups[slot].append(row)
        for slot in range(M):
            if slot not in groups:
                assert torch.equal(bank.bank[slot], before[slot])
                continue
            mean = torch.stack(groups[slot]).mean(0)
            true = 0.7 * before[slot].double() + 0.3 * mean if slot in held else mean
            held[slot] = True
            assert_near(bank.bank[slot], true, dtype, of=3.0)
        assert int(bank.filled) == len(held) and bank.ptr.tolist() == [0]


def test_moving_average_has_the_same_bits_every_time(kind):
    rows, slots = torch.randn(300, 16), torch.randint(0, 9, (300,))
    banks = [kind(9, 16, update_mode="ema") for _ in range(3)]
    for threads, bank in zip((1, 2, 2), banks, strict=True):
        torch.set_num_threads(threads)
        bank.update(rows, slots)
        bank.update(rows.flip(1), slots)
    assert torch.equal(banks[0].bank, banks[1].bank) and torch.equal(banks[1].bank, banks[2].bank)


@pytest.mark.parametrize("momentum, expected", [(0.0, 8.0), (1.0, 2.0)])
def test_momentum_at_its_ends(kind, momentum, expected):
    bank = kind(2, 1, momentum, update_mode="ema")
    bank.update(torch.tensor([[2.0]]), torch.tensor([1]))
    bank.update(torch.tensor([[8.0]]), torch.tensor([1]))
    assert bank.bank.tolist() == [[0.0], [expected]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("mode", ["ring", "average", "slots"])
def test_rows_that_are_not_finite_are_left_out(kind, mode, bad):
    """Every pattern of bad rows in a batch of 4, in a bank of 3."""
    for pattern in itertools.product([False, True], repeat=4):
        bank, held, at = kind(3, 2, 0.5, update_mode="fifo" if mode == "ring" else "ema"), {}, 0
        for first in (10, 20):
            rows = numbered(first, 4, 2)
            rows[torch.tensor(pattern), 1] = bad
            slots = torch.tensor([0, 1, 1, 2])
            bank.update(rows, slots if mode == "slots" else None)
            good = [i for i in range(4) if not pattern[i]]
            if mode == "slots":
                for slot in range(3):
                    new = [float(rows[i, 0]) for i in good if slots[i] == slot]
                    if new:
                        mean = sum(new) / len(new)
                        held[slot] = 0.5 * held[slot] + 0.5 * mean if slot in held else mean
                continue
            for n, i in list(enumerate(good))[-3:]:
                slot, new = (at + n) % 3, float(rows[i, 0])
                held[slot] = 0.5 * held[slot] + 0.5 * new if slot in held and mode == "average" else new
            at = (at + len(good)) % 3
        assert int(bank.skipped) == 2 * sum(pattern) and int(bank.filled) == len(held)
        assert bank.ptr.tolist() == [at]
        assert {slot: bank.bank[slot].tolist() for slot in held} == {slot: [x, x] for slot, x in held.items()}
        assert bank.bank.isfinite().all()


def test_other_rules_for_rows_that_are_not_finite(kind):
    rows = torch.tensor([[1.0, 2.0], [NAN, 0.0], [3.0, 4.0]])
    keeps, refuses = kind(4, 2, on_nonfinite="keep"), kind(4, 2, on_nonfinite="raise")
    keeps.update(rows)
    assert torch.equal(keeps.bank[:3], rows) or keeps.bank[1].isnan().any()
    assert int(keeps.filled) == 3 and int(keeps.skipped) == 0
    with pytest.raises(ValueError, match=r"features: expected rows that are finite .* got NaN or infinity"):
        refuses.update(rows)
    assert int(refuses.filled) == 0 and not refuses.bank.any()
    refuses.update(rows[:1])
    assert int(refuses.filled) == 1


@pytest.mark.parametrize("mode", ["fifo", "ema"])
def test_a_row_too_large_for_the_banks_dtype_is_left_out(kind, mode):
    bank = kind(4, 2, update_mode=mode, dtype=torch.float16)
    bank.update(torch.tensor([[1.0, 1e6], [2.0, 2.0]]))
    assert int(bank.skipped) == 1 and bank.bank.tolist() == [[2.0, 2.0]] + [[0.0, 0.0]] * 3


def test_normalize_makes_rows_of_length_1(kind):
    rows = torch.tensor([[3e38, 3e38], [3e-30, 4e-30], [0.0, 0.0], [-3.0, 4.0]])
    true = torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8], [0.0, 0.0], [-0.6, 0.8]])
    for mode in ("fifo", "ema"):
        bank = kind(4, 2, update_mode=mode, normalize=True)
        bank.update(rows)
        torch.testing.assert_close(bank.bank, true, rtol=1e-6, atol=0)
    bank.update(torch.tensor([[0.8, 0.6]]), torch.tensor([1]))
    assert bank.bank[1].norm().item() == pytest.approx(1.0, abs=1e-6)
    bank = kind(4, 3, normalize=True, dtype=torch.float64)
    bank.update(torch.randn(4, 3))  # float32 rows are divided as exactly as the bank can hold
    torch.testing.assert_close(bank.bank.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-15)


def test_rows_are_stored_without_gradients(kind):
    for mode in ("fifo", "ema"):
        rows = torch.ones(2, 3, requires_grad=True)
        bank = kind(4, 3, update_mode=mode)
        bank.update(rows * 2)
        assert not bank.bank.requires_grad and bank.bank.grad_fn is None


def test_reset(kind):
    bank = kind(3, 2, update_mode="ema", compat="seed")
    bank.update(torch.tensor([[NAN, 1.0]]))
    bank.reset()
    assert not any(buffer.any() for buffer in bank.buffers())


def test_seed_start(kind):
    """compat="seed": random rows that all count, read as softmax(query bank^T) bank."""
    bank, query = kind(20, 4, compat="seed"), torch.randn(3, 4)
    assert int(bank.filled) == 20 and bank.bank.std() > 0.5
    assert_near(bank(query), truth(query, bank.bank)[0], torch.float32, of=4.0)


# Reading.


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("topk", [None, 1, 5, 40])
def test_reading_is_the_formula(kind, dtype, topk):
    """Half filled and full banks, with masks and slots left out, scale a number or learned: results and gradients."""
    M, C, B = 24, 12, 6
    for case in range(8):
        full, masked, learned = case & 1, case & 2, case & 4
        mode = "ema" if case % 3 == 0 else "fifo"
        scale = nn.Parameter(torch.tensor([0.7], dtype=dtype)) if learned else 0.7
        bank = kind(M, C, update_mode=mode, topk=topk, scale=scale, dtype=dtype)
        bank.update(torch.randn(30 if full else 11, C))
        valid = (torch.arange(M) < (M if full else 11)).expand(B, M).clone()
        query = torch.randn(B, C).to(dtype).requires_grad_()
        options = {}
        if masked:
            options["mask"] = torch.rand(B, M) < 0.7
            options["mask"][:, 3] = True
            valid &= options["mask"]
        if topk is not None and not learned:
            options["exclude"] = torch.tensor([0, 1, -1, 2, -1, 0])
            for b, slot in enumerate(options["exclude"].tolist()):
                valid[b, slot] &= slot < 0
        rows = bank.bank.clone()
        bank.bank.masked_fill_(~bank._valid(None)[:, None], NAN)  # what a slot holds that was never written
        query_true = query.detach().double().requires_grad_()
        scale_true = torch.tensor(scale.item() if learned else scale, dtype=torch.float64, requires_grad=True)
        true, kept, slots = truth(query_true, rows, topk, scale_true, valid)
        grad = torch.randn(B, C).to(dtype)
        of = float((rows.abs().max() * query.abs().max() * C).detach())
        if topk is None:
            out, lse = bank(query, return_lse=True, **options)
            lse_true = torch.stack([torch.logsumexp(scale_true * x, 0) for x in kept])
            assert_near(lse, lse_true, torch.float64 if dtype == torch.float64 else torch.float32, of=of)
        else:
            out, scores, found = bank(query, return_scores=True, **options)
            assert found.dtype == torch.int64 and scores.shape == found.shape == (B, topk)
            for b in range(B):
                n = len(slots[b])
                assert found[b].tolist() == slots[b].tolist() + [-1] * (topk - n)
                assert_near(scores[b, :n], kept[b], scores.dtype, of=of)
                assert (scores[b, n:] == -INF).all()
        assert out.dtype == dtype
        assert_near(out, true, dtype, of=of)
        out.backward(grad)
        true.backward(grad.double())
        assert_near(query.grad, query_true.grad, dtype, 16 * of, float(query_true.grad.abs().max()))
        if learned:
            assert_near(scale.grad.reshape(()), scale_true.grad, dtype, 64 * of, of)


def test_equal_scores_are_taken_by_slot(kind):
    bank = kind(6, 2, topk=4)
    bank.update(torch.tensor([[1.0, 0.0], [2.0, 5.0], [2.0, 7.0], [1.0, 9.0], [-0.0, 1.0], [2.0, -3.0]]))
    _, scores, slots = bank(torch.tensor([[1.0, 0.0]]), return_scores=True)
    assert slots.tolist() == [[1, 2, 5, 0]] and scores.tolist() == [[2.0, 2.0, 2.0, 1.0]]


@pytest.mark.parametrize("topk", [None, 2])
def test_an_empty_bank_gives_zeros_and_no_gradient(kind, topk):
    bank = kind(5, 3, topk=topk)
    bank.bank.fill_(NAN)
    query = torch.randn(2, 3, requires_grad=True)
    out, *rest = bank(query, **{"return_lse" if topk is None else "return_scores": True})
    assert out.tolist() == [[0.0] * 3] * 2 and (rest[0] == -INF).all()
    out.sum().backward()
    assert query.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("topk", [None, 3])
def test_nan_stays_with_its_query(kind, topk):
    bank = kind(6, 3, topk=topk, on_nonfinite="keep")
    bank.update(torch.randn(6, 3))
    bank.bank[2, 1] = NAN
    query = torch.randn(3, 3)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1:, 2] = False
    rows, asked = bank.bank.clone(), query.clone().requires_grad_()
    out = bank(asked, mask=mask)
    assert out[0].isnan().all()
    assert_near(out[1:], truth(query[1:], rows.nan_to_num(0.0), topk, valid=mask[1:])[0], torch.float32, of=4.0)
    out[1:].sum().backward()
    assert asked.grad[1:].isfinite().all()


@pytest.mark.parametrize("topk", [None, 3])
def test_queries_of_any_shape(kind, topk):
    bank = kind(9, 4, topk=topk, normalize=True)
    bank.update(torch.randn(7, 4))
    query = torch.randn(2, 3, 5, 4)
    mask = torch.rand(2, 3, 5, 9) < 0.8
    flat = bank(query.reshape(-1, 4), mask=mask.reshape(-1, 9))
    assert torch.equal(bank(query, mask=mask), flat.view(2, 3, 5, 4))
    assert bank(query[0, 0, 0]).shape == (4,) and bank(query[:0]).shape == (0, 3, 5, 4)
    unit = nn.functional.normalize(query.reshape(-1, 4).double(), dim=1)
    true = truth(unit, bank.bank, topk, valid=(torch.arange(9) < 7) & mask.reshape(-1, 9))[0]
    assert_near(flat, true, torch.float32, of=4.0)


def test_sample_from_bank(kind):
    """Top k whatever the module's own topk is; more than there are rows gives all."""
    query = torch.randn(4, 6)
    for topk in (None, 2):
        bank = kind(150, 6, topk=topk)
        bank.update(torch.randn(140, 6))
        for k in (1, 7, 100, 400):
            true = truth(query, bank.bank[:140], k)[0]
            assert_near(bank.sample_from_bank(query, k), true, torch.float32, of=8.0)
        assert torch.equal(bank.sample_from_bank(query), bank.sample_from_bank(query, 100))
        assert bank.sample_from_bank(query, 7, return_scores=True)[2].shape == (4, 7)


def test_scale_of_a_call(kind):
    bank = kind(9, 4, scale=5.0, topk=4)
    bank.update(torch.randn(9, 4))
    query, scale = torch.randn(2, 4), torch.tensor(0.3, requires_grad=True)
    out = bank(query, scale=scale)
    assert_near(out, truth(query, bank.bank, 4, 0.3)[0], torch.float32, of=4.0)
    out.square().sum().backward()
    assert scale.grad.abs() > 0
    kept = kind(9, 4, scale=torch.tensor([2.0]))
    assert "scale" in kept.state_dict() and not list(kept.parameters())


def test_autocast_leaves_the_bank_alone(kind):
    for topk in (None, 3):
        bank = kind(9, 4, topk=topk)
        bank.update(torch.randn(9, 4))
        query = torch.randn(3, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(bank(query), bank(query.clone()))
            out = bank(query)
            half = bank(query.bfloat16())
        assert torch.equal(out, bank(query)) and bank.bank.dtype == torch.float32
        assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bank_of_halves(kind, dtype):
    bank = kind(9, 4, topk=3)
    bank.update(torch.randn(12, 4))
    bank.to(dtype)
    assert bank.bank.dtype == dtype and bank.ptr.dtype == bank.filled.dtype == torch.int64
    bank.update(torch.randn(2, 4))
    query = torch.randn(3, 4)
    for x in (query, query.to(dtype)):
        assert_near(bank(x), truth(x, bank.bank, 3)[0], x.dtype, of=8.0)


# Updates between forward and backward.


def test_update_before_backward(kind):
    """Reading topk rows keeps them; reading all gives the old gradient or an error, never a wrong one."""
    query, rows, later = torch.randn(4, 6), torch.randn(10, 6), torch.randn(10, 6)
    for topk in (3, None):
        grads = []
        for between in (False, True):
            bank = kind(10, 6, topk=topk, scale=0.5)
            bank.update(rows)
            x = query.clone().requires_grad_()
            out = bank(x)
            if between:
                bank.update(later)
            try:
                out.square().sum().backward()
            except RuntimeError as error:
                assert topk is None and between and "modified by an inplace operation" in str(error)
                continue
            grads.append(x.grad)
        assert len(grads) == 2 or topk is None
        assert all(torch.equal(grads[0], g) for g in grads)


# Checkpoints and copies.


def test_state_dict(kind):
    bank = kind(5, 3)
    assert {k: (tuple(v.shape), v.dtype) for k, v in bank.state_dict().items()} == {
        "bank": ((5, 3), torch.float32),
        "ptr": ((1,), torch.int64),
        "filled": ((), torch.int64),
        "skipped": ((), torch.int64),
    }
    for mode in ("fifo", "ema"):
        bank = nn.ModuleDict({"inner": kind(5, 3, update_mode=mode)})
        bank["inner"].update(torch.tensor([[1.0, 2.0, 3.0], [NAN, 0.0, 0.0], [4.0, 5.0, 6.0]]))
        for assign in (False, True):
            other = nn.ModuleDict({"inner": kind(5, 3, update_mode=mode)})
            other.load_state_dict(copy.deepcopy(bank.state_dict()), assign=assign)
            bank["inner"].update(torch.ones(1, 3))
            other["inner"].update(torch.ones(1, 3))
            for name, x in bank.state_dict().items():
                assert torch.equal(x, other.state_dict()[name])


@pytest.mark.parametrize("change", ["size", "width", "ptr", "negative", "filled", "skipped", "shape of ptr"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(kind, change):
    model, other = nn.ModuleDict({"b": kind(5, 3)}), kind(5, 3)
    model["b"].update(torch.randn(2, 3))
    other.update(torch.randn(4, 3))
    wrong = {"b." + k: v.clone() for k, v in other.state_dict().items()}
    if change in ("size", "width"):
        wrong["b.bank"] = torch.zeros(6, 3) if change == "size" else torch.zeros(5, 4)
    elif change == "shape of ptr":
        wrong["b.ptr"] = torch.zeros(2, dtype=torch.int64)
    else:
        name = {"negative": "ptr"}.get(change, change)
        wrong["b." + name].fill_(-1 if change in ("negative", "skipped") else 6)
    before = copy.deepcopy(model.state_dict())
    message = "size mismatch" if change in ("size", "width", "shape of ptr") else "expected a number from 0 to"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(wrong)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("mode", ["fifo", "ema"])
def test_a_checkpoint_without_counts(kind, mode):
    """Of the seeds: bank and ptr, which may stand one past the end; every row counts as written."""
    rows = torch.randn(5, 3)
    model = nn.ModuleDict({"feature_bank": kind(5, 3, update_mode=mode)})
    model.load_state_dict({"feature_bank.bank": rows, "feature_bank.ptr": torch.tensor([5])})
    bank = model["feature_bank"]
    assert int(bank.filled) == 5 and int(bank.skipped) == 0 and bank.ptr.tolist() == [0]
    query = torch.randn(2, 3)
    assert_near(bank(query), truth(query, rows)[0], torch.float32, of=4.0)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"feature_bank.ptr": torch.tensor([1])})


def test_copies_are_of_their_own(kind):
    bank = kind(5, 3, scale=nn.Parameter(torch.tensor(2.0)))
    bank.update(torch.randn(4, 3))
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert type(other) is kind and torch.equal(other.bank, bank.bank)
        other.update(torch.randn(1, 3))
        assert int(other.filled) == 5 and int(bank.filled) == 4
        assert other._lock is not bank._lock
        with bank.writing():
            other.update(torch.randn(1, 3))


# Compilation, and that nothing waits for the device.


@pytest.mark.parametrize("topk, mode", [(None, "fifo"), (3, "fifo"), (3, "ema"), (None, "slots")])
def test_compiled_whole(kind, topk, mode):
    """Reading and writing in one graph, compiled once, however far the pointer is."""
    torch.compiler.reset()
    update_mode = "fifo" if mode == "fifo" else "ema"
    eager, compiled = (kind(7, 4, update_mode=update_mode, topk=topk, normalize=True) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")

    def step(bank, query, rows, slots):
        out = bank(query)
        bank.update(rows, slots)
        return out

    fast = torch.compile(step, fullgraph=True, backend=counter, dynamic=False)
    for i in range(5):
        query, rows = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4)
        rows[i % 4, 0] = NAN
        slots = torch.randint(0, 7, (4,)) if mode == "slots" else None
        out, true = fast(compiled, query, rows, slots), step(eager, query, rows, slots)
        torch.testing.assert_close(out, true, rtol=1e-6, atol=1e-6)
        for name, x in eager.state_dict().items():
            torch.testing.assert_close(compiled.state_dict()[name], x, rtol=1e-6, atol=1e-6)
        if topk is not None:
            (of_compiled,) = torch.autograd.grad(out.square().sum(), query)
            (of_eager,) = torch.autograd.grad(true.square().sum(), query)
            torch.testing.assert_close(of_compiled, of_eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_compiled_slots_outside_are_left_out(kind):
    bank = kind(3, 2, update_mode="ema")
    update = torch.compile(bank.update, fullgraph=True, backend="aot_eager")
    for slots in ([-1, 3, 1], [-1, 3, 99]):
        update(torch.full((3, 2), 5.0), torch.tensor(slots))
    assert bank.bank.tolist() == [[0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]
    assert int(bank.skipped) == 5 and int(bank.filled) == 1


@pytest.mark.parametrize("topk", [None, 3])
def test_nothing_asks_the_device(topk):
    """On the meta device no number can be asked for."""
    for mode in ("fifo", "ema"):
        bank = plain.FeatureBank(7, 4, update_mode=mode, topk=topk, normalize=True, device="meta")
        rows = torch.randn(9, 4, device="meta")
        bank.update(rows)
        if mode == "ema":
            bank.update(rows, torch.zeros(9, dtype=torch.int64, device="meta"))
        assert bank(rows).shape == (9, 4)
        bank.reset()


# Processes.


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.norm, self.bank = nn.Linear(2, 2), nn.BatchNorm1d(2), kind(4, 2)

    def forward(self, x):
        self.bank.update(x.detach())
        return self.norm(self.layer(x)) + self.bank(x)


def test_names_that_ddp_leaves_out(kind):
    bank = kind(4, 2, update_mode="ema", scale=nn.Parameter(torch.ones(1)))
    own = ["bank", "ptr", "filled", "skipped", "written"]
    assert bank._ddp_params_and_buffers_to_ignore == own
    model = nn.Sequential(nn.Linear(2, 2), bank)
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]
    for _ in range(2):
        assert hivilt.nn.keep_banks_local(model) is model
    assert model._ddp_params_and_buffers_to_ignore == ["0.bias", *(f"1.{name}" for name in own)]
    assert all(bank.get_buffer(name)._ddp_ignored for name in own)
    with pytest.raises(TypeError, match=r"keep_banks_local: model: expected a torch\.nn\.Module"):
        hivilt.nn.keep_banks_local("model")


def test_ddp_of_one_process(tmp_path, kind):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model(kind)
        wrapped = nn.parallel.DistributedDataParallel(hivilt.nn.keep_banks_local(model))
        for _ in range(2):
            wrapped(torch.randn(3, 2)).sum().backward()
        assert set(wrapped.named_module_buffers) == {f"norm.{name}" for name, _ in model.norm.named_buffers()}
        assert int(model.bank.filled) == 4
    finally:
        torch.distributed.destroy_process_group()


TWO_PROCESSES = """
import datetime, os, sys, torch, hivilt
from torch import nn

rank, store = int(sys.argv[1]), sys.argv[2]
wait = datetime.timedelta(seconds=60)
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=wait)
for keep in (True, False):
    model = nn.Sequential(nn.Linear(2, 2), hivilt.nn.FeatureBank(4, 2))
    wrapped = nn.parallel.DistributedDataParallel(hivilt.nn.keep_banks_local(model) if keep else model)
    for step in range(2):
        model[1].update(torch.full((1, 2), 1.0 + rank))
        wrapped(torch.ones(1, 2)).sum().backward()
    expected = 1.0 + rank if keep else 1.0  # what rank 0 holds overwrites all others
    assert model[1].bank[:2].unique().tolist() == [expected], (keep, rank, model[1].bank)
torch.distributed.barrier()
os._exit(0)  # without the interpreter's farewell, in which threads of gloo's sometimes abort the process
"""


def test_ddp_of_two_processes(tmp_path):
    """Each keeps its bank; without keep_banks_local torch overwrites that of rank 1."""
    commands = [[sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path / "store")] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=90)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors


# Threads.


@pytest.mark.parametrize("topk", [None, 4])
def test_readers_see_whole_updates(kind, topk):
    """Every update writes all rows with one number, so what a reader gets is that number in every channel."""
    M, C = 512, 32
    bank, stop, seen, wrong = kind(M, C, topk=topk, scale=0.0), threading.Event(), set(), []
    bank.update(torch.zeros(M, C))

    def read():
        torch.set_num_threads(1)
        query = torch.randn(2, C)
        while not stop.is_set():
            out = bank(query)
            seen.add(round(float(out[0, 0])))
            if (out - out[0, 0].round()).abs().max() > 1e-3:
                wrong.append(out)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    end = time.monotonic() + 0.5
    number = 0
    while time.monotonic() < end:
        number += 1
        bank.update(torch.full((M, C), float(number % 1000)))
    stop.set()
    for reader in readers:
        reader.join(30)
    assert not wrong and number > 3 and len(seen) > 1


def test_lock_lets_readers_in_together_and_writers_alone():
    lock, inside, most, wrong = ReadWriteLock(), [0, 0], [0, 0], []
    guard = threading.Lock()

    def work(i):
        for _ in range(60):
            with lock.writing() if i == 0 else lock.reading():
                with guard:
                    inside[i > 0] += 1
                    most[i > 0] = max(most[i > 0], inside[i > 0])
                    if inside[0] > 1 or (inside[0] and inside[1]):
                        wrong.append(list(inside))
                time.sleep(0.0005)
                with guard:
                    inside[i > 0] -= 1

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 0, 1, 2, 3)]
    threads[0]._args = threads[1]._args = (0,)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads) and not wrong
    assert most[0] == 1 and most[1] > 1


def test_lock_nests_but_does_not_turn_reading_into_writing():
    bank = plain.FeatureBank(4, 2)
    with bank.writing(), bank.writing(), bank.reading():
        bank.update(torch.ones(1, 2))
        bank(torch.ones(1, 2))
    with bank.reading(), bank.reading():
        bank(torch.ones(1, 2))
        with pytest.raises(RuntimeError, match="done reading"):
            bank.update(torch.ones(1, 2))
    done = threading.Thread(target=bank.update, args=(torch.ones(1, 2),))
    done.start()
    done.join(10)
    assert int(bank.filled) == 2


def test_nested_reading_does_not_wait_for_a_waiting_writer():
    lock, entered = ReadWriteLock(), threading.Event()

    def write():
        with lock.writing():
            entered.set()

    with lock.reading():
        writer = threading.Thread(target=write)
        writer.start()
        while not lock._waiting_writers:
            time.sleep(0.001)
        with lock.reading():
            assert not entered.is_set()
    writer.join(10)
    assert entered.is_set()


# Arguments, and accelerate.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"bank_size": 0}, ValueError, "bank_size: expected an int of at least 1; got 0"),
        ({"feature_dim": 2.0}, TypeError, "feature_dim: expected an int"),
        ({"momentum": 1.1}, ValueError, "momentum: expected a number from 0 to 1; got 1.1"),
        ({"momentum": NAN}, ValueError, "momentum"),
        ({"momentum": 10**400}, ValueError, "momentum: expected a number that a float can hold"),
        ({"momentum": "0.9"}, TypeError, "momentum"),
        ({"update_mode": "lifo"}, ValueError, "update_mode: expected one of 'fifo', 'ema'; got 'lifo'"),
        ({"topk": 0}, ValueError, "topk: expected an int of at least 1; got 0"),
        ({"topk": 1 << 31}, ValueError, "topk"),
        ({"topk": True}, TypeError, "topk"),
        ({"scale": NAN}, ValueError, "scale: expected a finite number; got nan"),
        ({"scale": torch.ones(2)}, ValueError, "scale: expected a number or a tensor of one element"),
        ({"scale": torch.ones(1, dtype=torch.int64)}, TypeError, "scale"),
        ({"scale": torch.ones(1, requires_grad=True) * 2}, ValueError, "scale: expected a torch.nn.Parameter"),
        ({"normalize": 1}, TypeError, "normalize: expected a bool; got 1"),
        ({"on_nonfinite": "drop"}, ValueError, "on_nonfinite"),
        ({"compat": "seeds"}, ValueError, "compat"),
        ({"dtype": torch.int64}, TypeError, "dtype"),
    ],
)
def test_malformed_constructors(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**{"bank_size": 4, "feature_dim": 2} | options)


CALLS = [
    (lambda b, x: b.update(x[:, :2]), ValueError, "features: expected 3 channels"),
    (lambda b, x: b.update(x[None]), ValueError, "features: expected 2 dimensions"),
    (lambda b, x: b.update(x.long()), TypeError, "features: expected float32"),
    (lambda b, x: b.update([1.0]), TypeError, "features: expected a tensor"),
    (lambda b, x: b.update(x.to("meta")), ValueError, "features: expected a tensor on the bank's device"),
    (lambda b, x: b.update(x, torch.tensor([0, 1])), ValueError, r"slots: expected shape \(4,\)"),
    (lambda b, x: b.update(x, torch.zeros(4)), TypeError, "slots: expected an int32 or int64"),
    (lambda b, x: b.update(x, torch.tensor([0, 1, 2, 5])), ValueError, "slots: expected values from 0 to 4; got 5"),
    (lambda b, x: b.update(x, torch.tensor([0, 1, 2, -1])), ValueError, "slots: expected values from 0 to 4; got -1"),
    (lambda b, x: b(x[:, :2]), ValueError, r"query: expected shape \(..., 3\)"),
    (lambda b, x: b(x.double()), TypeError, "query: expected float64 exactly when the bank"),
    (lambda b, x: b(x.long()), TypeError, "query: expected float32"),
    (lambda b, x: b(None), TypeError, "query: expected a tensor"),
    (lambda b, x: b(x.to("meta")), ValueError, "query: expected a tensor on the bank's device"),
    (lambda b, x: b(x, scale=INF), ValueError, "scale: expected a finite number; got inf"),
    (lambda b, x: b(x, scale=torch.ones(3)), ValueError, "scale: expected a number or a tensor of one element"),
    (lambda b, x: b(x, mask=torch.ones(5)), TypeError, "mask: expected a bool tensor"),
    (lambda b, x: b(x, mask=torch.ones(3, 5) > 0), ValueError, r"mask: expected shape \(5,\) or \(4, 5\)"),
    (lambda b, x: b(x, exclude=1), TypeError, "exclude: expected an int32 or int64 tensor"),
    (lambda b, x: b(x, exclude=torch.tensor([1])), ValueError, r"exclude: expected shape \(4,\)"),
    (
        lambda b, x: b(x, exclude=torch.tensor([1, 0, -1, 5])),
        ValueError,
        "exclude: expected values from -1 to 4; got 5",
    ),
    (lambda b, x: b(x, return_lse=True), ValueError, "return_lse: expected False, because topk is 2"),
    (lambda b, x: b(x, return_scores=1), TypeError, "return_scores: expected a bool"),
    (lambda b, x: b.sample_from_bank(x, 0), ValueError, "k: expected an int of at least 1; got 0"),
    (lambda b, x: b.sample_from_bank(x, 1.5), TypeError, "k: expected an int"),
]


@pytest.mark.parametrize("call, error, message", CALLS, ids=[str(i) for i in range(len(CALLS))])
def test_malformed_calls_change_nothing(kind, call, error, message):
    bank = kind(5, 3, update_mode="ema", topk=2)
    bank.update(torch.randn(2, 3))
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(error, match=message):
        call(bank, torch.randn(4, 3))
    assert all(torch.equal(x, before[name]) for name, x in bank.state_dict().items())


def test_options_of_the_other_reading(kind):
    with pytest.raises(ValueError, match="return_scores: expected False, because topk is None"):
        kind(5, 3)(torch.ones(1, 3), return_scores=True)
    with pytest.raises(ValueError, match="exclude: expected None, because topk is None"):
        kind(5, 3)(torch.ones(1, 3), exclude=torch.tensor([0]))
    with pytest.raises(ValueError, match="slots: expected None, because update_mode is 'fifo'"):
        kind(5, 3).update(torch.ones(1, 3), torch.tensor([0]))


def test_accelerate_swaps_a_bank_and_gives_it_back():
    model = nn.Sequential(plain.FeatureBank(9, 4, topk=3))
    model[0].update(torch.randn(7, 4))
    query, before = torch.randn(2, 4), copy.deepcopy(model.state_dict())
    true = model(query)
    report = hivilt.accelerate(model)
    assert [entry.path for entry in report.replaced] == ["0"] and type(model[0]) is hivilt.nn.FeatureBank
    torch.testing.assert_close(model(query), true, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert hivilt.restore(model) == ["0"] and type(model[0]) is plain.FeatureBank


def test_fast_reads_through_the_operators(monkeypatch):
    """Where a kernel takes the call; and the plain twin where none does, as in float64."""
    called = []
    from hivilt.nn import bank_retrieval as module

    for name in ("bank_retrieval", "bank_attention", "bank_push_"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real, **k: called.append(name) or real(*a, **k))
    for dtype in (torch.float32, torch.float64):
        bank = hivilt.nn.FeatureBank(5, 3, dtype=dtype)
        bank.update(torch.ones(2, 3))
        bank(torch.ones(1, 3, dtype=dtype))
        bank.sample_from_bank(torch.ones(1, 3, dtype=dtype))
    with hivilt.use_backend("reference"):
        bank.sample_from_bank(torch.ones(1, 3, dtype=dtype))
    built = hivilt.info.build_record().get("isas")
    first = ["bank_push_", "bank_attention", "bank_retrieval"] if built else ["bank_push_"]
    assert called == [*first, "bank_push_", "bank_retrieval"]
