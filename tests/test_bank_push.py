"""Pushing rows into a ring, against a deque, and the memory that reading a large bank takes."""

import itertools
import json
import os
import subprocess
import sys
from collections import deque

import plain_bank as plain
import pytest
import torch

import hivilt
import hivilt.testing as t

push = hivilt.ops.bank_push_
MiB = 2**20
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Ring:
    """What a bank is to hold: the newest M rows, each in the slot of its number."""

    def __init__(self, M: int):
        self.M, self.pushed, self.skipped = M, 0, 0
        self.rows: deque = deque(maxlen=M)

    def push(self, features, rows, keep: bool) -> None:
        for i, feature in enumerate(features):
            row = () if rows is None else rows[i].tolist()
            if keep or (all(map(isfinite, feature.tolist())) and all(map(isfinite, row))):
                self.rows.append((self.pushed % self.M, feature.tolist(), row))
                self.pushed += 1
            else:
                self.skipped += 1

    def check(self, keys, values, pointer, count, skipped) -> None:
        assert int(pointer) == self.pushed % self.M and int(count) == min(self.M, self.pushed)
        assert skipped is None or int(skipped) == self.skipped
        wanted, wanted_rows = torch.full_like(keys, 7.0), None if values is None else torch.full_like(values, 7.0)
        for slot, feature, row in self.rows:
            wanted[slot] = torch.tensor(feature)
            if values is not None:
                wanted_rows[slot] = torch.tensor(row)
        assert torch.equal(keys.nan_to_num(99), wanted.nan_to_num(99))
        assert values is None or torch.equal(values.nan_to_num(99), wanted_rows.nan_to_num(99))


def isfinite(x: float) -> bool:
    return x - x == 0


def state(device, *shapes):
    return [torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mode", ["skip", "keep"])
@pytest.mark.parametrize("M", [1, 2, 5, 16])
def test_ring_is_a_deque(device, M, mode, own):
    """Batches of every size up to beyond 2 M one after the other, some rows not finite; untouched slots keep what
    they held."""
    g = torch.Generator().manual_seed(M)
    keys = torch.full((M, 3), 7.0, device=device)
    values = torch.full((M, 2), 7.0, device=device) if own else None
    pointer, count, skipped = state(device, 1, (), 1)
    ring = Ring(M)
    sizes = [0, 1, M - 1, M, M + 1, 2 * M, 2 * M + 1, 3 * M + 2, 0]
    for B in sizes + torch.randint(0, 2 * M + 2, (25,), generator=g).tolist():
        features = torch.randint(-9, 9, (B, 3), generator=g).float()
        rows = torch.randint(-9, 9, (B, 2), generator=g).float() if own else None
        for x in (features, rows):
            if x is not None:
                x[torch.rand(x.shape, generator=g) < 0.06] = (plain.NAN, plain.INF, -plain.INF)[B % 3]
        assert push(keys, pointer, count, features.to(device), values=values, skipped=skipped,
                    rows=None if rows is None else rows.to(device), on_nonfinite=mode) is keys  # fmt: skip
        ring.push(features, rows, mode == "keep")
        ring.check(keys, values, pointer, count, skipped)
    assert ring.skipped > 0 if mode == "skip" else ring.skipped == 0


@pytest.mark.parametrize("device", DEVICES)
def test_raise_writes_nothing(device):
    keys, values = torch.zeros(6, 3, device=device), torch.zeros(6, 2, device=device)
    pointer, count, skipped = state(device, 1, 1, 1)
    good, good_rows = torch.ones(4, 3, device=device), torch.ones(4, 2, device=device)
    for bad, where in itertools.product((plain.NAN, plain.INF), ("features", "rows")):
        x = {"features": good.clone(), "rows": good_rows.clone()}
        x[where][2, 1] = bad
        with pytest.raises(ValueError, match=f"bank_push_: {where}: expected finite rows"):
            push(keys, pointer, count, **x, values=values, skipped=skipped, on_nonfinite="raise")
        assert not any(v.any() for v in (keys, values, pointer, count, skipped))
    push(keys, pointer, count, good, values=values, rows=good_rows, skipped=skipped, on_nonfinite="raise")
    assert int(count) == int(pointer) == 4 and int(skipped) == 0 and (keys[:4] == 1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_are_rounded_to_the_bank(device, dtype):
    keys, (pointer, count) = torch.zeros(5, 4, dtype=dtype, device=device), state(device, 1, 1)
    for source in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        features = plain.numbers(3, 3, 4).to(source).to(device)
        at = int(pointer)
        push(keys, pointer, count, features)
        assert torch.equal(keys[(at + torch.arange(3, device=device)) % 5], features.to(dtype))


def test_rows_that_overflow_the_bank_are_skipped():
    keys, (pointer, count, skipped) = torch.zeros(4, 3, dtype=torch.float16), state("cpu", 1, 1, 1)
    push(keys, pointer, count, torch.full((2, 3), 1e6), skipped=skipped)
    assert keys.isfinite().all() and int(skipped) == 2


@pytest.mark.parametrize("name", ["keys", "values"])
def test_banks_whose_slots_share_memory_are_refused(name):
    banks = {"keys": torch.zeros(4, 3), "values": torch.zeros(4, 3)}
    banks[name] = torch.zeros(1, 3).expand(4, 3)
    pointer, count = state("cpu", 1, 1)
    with pytest.raises(ValueError, match=f"bank_push_: {name}"):
        push(banks["keys"], pointer, count, torch.ones(2, 3), values=banks["values"], rows=torch.ones(2, 3))


def test_pointer_and_count_are_two_tensors():
    (both,) = state("cpu", 1)
    with pytest.raises(ValueError, match=r"bank_push_: (pointer|count)"):
        push(torch.zeros(4, 3), both, both, torch.ones(2, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    """Banks, rows and counters that are views: the same bank, and nothing beside the views is written."""
    features, rows = plain.numbers(0, 7, 4).to(device), plain.numbers(1, 7, 3).to(device)
    start = {"keys": plain.numbers(2, 5, 4).to(device), "values": plain.numbers(3, 5, 3).to(device)}

    def result(features, rows, keys, values):
        pointer, count = state(device, 1, 1)
        pointer += 3
        push(keys, pointer, count, features, values=values, rows=rows)
        return keys.clone(), values.clone(), pointer, count

    want = result(features, rows, *(x.clone() for x in start.values()))
    for layout, view in t.layouts(features):
        if torch.equal(view, features):
            got = result(view, rows, *(x.clone() for x in start.values()))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), layout
    wide = torch.full((12, 9), 5.0, device=device)
    keys = wide[1:11:2, 2:6]
    keys.copy_(start["keys"])
    got = result(features, rows, keys, start["values"].clone().mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    wide[1:11:2, 2:6] = 5.0
    assert (wide == 5).all()
    counters = torch.full((3,), 9, dtype=torch.int64, device=device)
    counters[1] = 3
    push(start["keys"].clone(), counters[1:2], state(device, 1)[0], features)
    assert counters.tolist() == [9, (3 + 7) % 5, 9]


@pytest.mark.parametrize("device", DEVICES)
def test_features_of_the_bank_itself(device):
    """Rows that are read from the slots they go to: as they were before."""
    bank, (pointer, count) = plain.numbers(0, 6, 2).to(device), state(device, 1, 1)
    before = bank.clone()
    push(bank, pointer, count, bank[2:])
    assert torch.equal(bank, torch.cat([before[2:], before[4:]]))


@pytest.mark.parametrize("device", DEVICES)
def test_features_get_no_gradient(device):
    bank, (pointer, count) = torch.zeros(4, 3, device=device), state(device, 1, 1)
    features = torch.ones(2, 3, device=device, requires_grad=True)
    push(bank, pointer, count, features * 2)
    assert not bank.requires_grad and (bank[:2] == 2).all()
    version = bank._version
    push(bank, pointer, count, features)
    assert bank._version > version, "autograd could not notice the write"


def test_what_was_pushed_is_found():
    """A bank that is filled, wraps and is read with its own count, step by step, against one that is built anew."""
    bank, (pointer, count) = torch.zeros(40, 8), state("cpu", 1, ())
    everything = plain.numbers(0, 120, 8)
    for step in range(12):
        query = everything[10 * step : 10 * step + 10]
        got = hivilt.ops.bank_retrieval(query, bank, 6, count=count)
        plain.judge(got, query, bank, 6, count=count)
        newest = everything[max(0, 10 * step - 40) : 10 * step]
        rebuilt = hivilt.ops.bank_retrieval(query, newest, 6)
        assert torch.equal(got[1], rebuilt[1])  # the same scores; slots differ
        push(bank, pointer, count, query)


# Memory.

PEAK = """
import json, sys, torch, hivilt
from pathlib import Path
torch.set_num_threads(2)
import ctypes
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # freed blocks go back to the system at once
def status(field):
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) * 1024
def extra(run):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    results = run()
    return status("VmHWM") - before - sum(x.numel() * x.element_size() for x in results)
op, attend, found = hivilt.ops.bank_retrieval, hivilt.ops.bank_attention, {}
B, M, C = 512, 65536, 64
q, k = torch.randn(B, C), torch.randn(M, C)
for x in (q[:8], q[:70]):
    op(x, k[:3000], 100, backend="cpu"), attend(x, k[:3000], backend="cpu")
    attend(x.clone().requires_grad_(), k[:3000], backend="cpu")[0].sum().backward()
    op(x.clone().requires_grad_(), k[:3000], 100, backend="cpu")[0].sum().backward()
for precision in ("exact", "fp32", "bf16"):
    found[precision] = extra(lambda: op(q, k, 100, precision=precision, backend="cpu"))
found["masked"] = extra(lambda: op(q, k, 100, count=60000, mask=torch.ones(M) > 0, backend="cpu"))
found["half"] = extra(lambda: op(q, k.bfloat16(), 100, backend="cpu")) - 2 * M * C
found["one query"] = extra(lambda: op(q[:1], k, 100, backend="cpu"))
found["topk 2048"] = extra(lambda: op(q, k, 2048, backend="cpu"))
leaf = q.clone().requires_grad_()
def both():
    out, scores, indices = op(leaf, k, 100, backend="cpu")
    return out, scores, indices, *torch.autograd.grad(out.sum(), leaf)
found["with backward"] = extra(both) - B * 100 * C * 4  # the rows that are kept
found["dense"] = extra(lambda: attend(q, k, scale=0.1, backend="cpu"))
def both():
    out, lse = attend(leaf, k, scale=0.1, backend="cpu")
    return out, lse, *torch.autograd.grad(out.sum(), leaf)
found["dense with backward"] = extra(both)
print(json.dumps(found))
"""


def test_no_matrix_of_queries_by_rows(verdicts):
    """512 queries on 65536 rows, whose scores would take 128 MiB: beyond its results, and the rows that backward keeps,
    no call needs more than 32 MiB. Dense reading makes no gradients of the bank, 16 MiB each, where none is wanted."""
    if verdicts["cpu", "cpu"] is not None:
        pytest.skip(verdicts["cpu", "cpu"])
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("this system keeps no high-water mark of memory that can be reset")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    extra = json.loads(done.stdout)
    assert len(extra) == 10 and max(extra.values()) <= 32 * MiB, {n: f"{v / MiB:.1f} MiB" for n, v in extra.items()}
