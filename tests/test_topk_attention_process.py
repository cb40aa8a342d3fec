"""What needs a process of its own: memory, fork, every instruction set, a watchdog."""

import json
import subprocess
import sys

import fresh
import pytest
import torch

import hivilt.testing as t

MiB = 2**20


def python(code: str, *args: str, timeout: int = 120, **environment: str) -> str:
    done = fresh.run(code, *args, timeout=timeout, **environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def needs_cpu(verdicts) -> None:
    if verdicts["cpu", "cpu"] is not None:
        pytest.skip(verdicts["cpu", "cpu"])


PEAK = """
import json, resource, sys, torch, hivilt
dtype = getattr(torch, sys.argv[1])
torch.set_num_threads(2)
B, H, Q, N, D = 1, 4, 4096, 4096, 64
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def inputs(kind, Q, N):
    x = {n: torch.randn(B, H, L, D).to(dtype).requires_grad_() for n, L in (("query", Q), ("key", N), ("value", N))}
    if kind == "shared":
        x |= {"select_query": torch.randn(B, Q, 16), "select_key": torch.randn(B, N, 16)}
    if kind == "masked":
        x |= {"key_mask": torch.rand(B, N) < 0.9, "attn_mask": torch.randn(B, 1, 1, N)}
    return x | {"topk": None if kind == "dense" else 64, "axis": "queries" if kind == "queries" else "keys"}
def run(kind, x):
    out = hivilt.ops.topk_attention(**x, dropout_p=0.1 if kind == "dropout" else 0.0, backend="cpu")
    out.backward(torch.ones_like(out))
kinds, extra = sys.argv[2:], {}
for kind in kinds:
    run(kind, inputs(kind, 64, 96))
x = [inputs(kind, Q, N) for kind in kinds]
before = peak()
for kind in kinds:
    run(kind, x.pop(0))
    extra[kind] = peak() - before
print(json.dumps(extra))
"""


@pytest.mark.parametrize(
    "dtype, kinds",
    [("float32", ["keys", "queries", "dense", "shared", "masked", "dropout"]), ("bfloat16", ["keys", "dense"])],
)
def test_no_matrix_of_queries_by_keys(verdicts, dtype, kinds):
    """4096 x 4096, 4 heads, forward and backward: all extra memory stays far under the 256 MiB of one matrix."""
    needs_cpu(verdicts)
    extra = json.loads(python(PEAK, dtype, *kinds))
    assert max(extra.values()) < 80 * MiB, {kind: f"{size / MiB:.0f} MiB" for kind, size in extra.items()}


def test_reference_walks_in_slices():
    """The reference never lets a temporary grow with Q x N beyond its slice."""
    code = """
import resource, torch, hivilt
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
q, k, v = (torch.randn(1, 2, 4096, 4) for _ in range(3))
hivilt.ops.topk_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], 4, backend="reference")
before = peak()
hivilt.ops.topk_attention(q, k, v, 4, backend="reference")
print(peak() - before)
"""
    # 34 M pairs: float64 scores alone would take 256 MiB, an argsort as much again; a slice of 2^21 pairs takes 16 MiB
    assert int(python(code)) < 250 * MiB


FORK = """
import os, sys, torch, hivilt
torch.set_num_threads(2)
q, k, v = (torch.randn(4, 8, 300, 32, requires_grad=True) for _ in range(3))
def run(topk, **more):
    out, lse = hivilt.ops.topk_attention(q, k, v, topk, return_lse=True, backend="cpu", **more)
    return out.detach(), lse.detach()
calls = [(None, {}), (9, {}), (9, {"axis": "queries"}), (9, {"dropout_p": 0.0})]
before = [run(topk, **more) for topk, more in calls]
hivilt.ops.topk_attention(q, k, v, 9, backend="cpu").sum().backward()
for _ in range(3):
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            same = all(a.numpy().tobytes() == b.numpy().tobytes() for (topk, more), old in zip(calls, before)
                       for a, b in zip(run(topk, **more), old))
        os._exit(0 if same else 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
run(9)
print("done")
"""


def test_fork_after_parallel_use(verdicts):
    """A child forked after the thread pool started finishes, with the same bits (torch's own operators hang there)."""
    needs_cpu(verdicts)
    assert python(FORK, timeout=60).strip() == "done"


HOSTILE = """
import math, torch, hivilt
for bad in (math.nan, -math.nan, math.inf, -math.inf, 3.4e38, 1e-45):
    for topk, axis in ((None, "keys"), (16, "keys"), (16, "queries")):
        q, k, v = (torch.full((1, 2, 300, 16), bad, requires_grad=True) for _ in range(3))
        bias = torch.full((300, 300), bad)
        for more in ({}, {"attn_mask": bias}):
            out = hivilt.ops.topk_attention(q, k, v, topk, axis=axis, backend="cpu", **more)
            torch.autograd.grad(out.sum(), (q, k, v))
print("done")
"""


def test_no_hang_on_special_values(verdicts):
    needs_cpu(verdicts)
    assert python(HOSTILE, timeout=60).strip() == "done"


ISA = """
import sys, torch, hivilt, hivilt.testing as t
op, select = hivilt.ops.topk_attention, hivilt.ops.topk_select
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    tally = t.Tally(dtype)
    for case in t.cases(45, dtype, seed=31):
        t.check(op, case, backend="cpu", backward=True, tally=tally)
    tally.assert_no_worse()
    for i, case in enumerate(t.cases(60, dtype, seed=32)):
        if case.topk is not None and case.mask != "float":
            t.check(op, t.case(case.seed, dtype, fill="integers", scale=(1.0, 0.25)[i % 2]), backend="cpu", exact=True)
for C in (1, 7, 8, 9, 31, 33, 512, 1025, 4099):
    g = torch.Generator().manual_seed(C)
    rows = torch.stack([torch.arange(C).float(), -torch.arange(C).float(), torch.zeros(C), torch.randn(C, generator=g),
                        torch.randint(0, 3, (C,), generator=g).float(), torch.randn(C, generator=g) * 1e-42])
    hot, keys = torch.eye(6)[None, None], rows.T.contiguous()[None, None]
    for topk in (1, 5, C // 2 + 1, C):
        for args, axis, lines in (((hot, keys), "keys", rows), ((keys, hot), "queries", rows)):
            got = t.pairs_from_indices(select(*args, topk, scale=1.0, axis=axis, backend="cpu"), 6, C, 1)[0, 0]
            assert torch.equal(got, t.best(lines, torch.ones_like(lines) > 0, topk)), (C, topk, axis)
print("done")
"""

FLAGS = {"scalar": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
         "avx512_bf16": ("avx512f", "avx512_bf16")}  # fmt: skip


@pytest.mark.parametrize("isa", FLAGS)
def test_each_instruction_set(verdicts, isa):
    """The compact parity run on every instruction set this processor has, each forced in a process of its own."""
    needs_cpu(verdicts)
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        flags = next(line for line in info if line.startswith("flags")).split()
    missing = [flag for flag in FLAGS[isa] if flag not in flags]
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    assert python(ISA, timeout=240, HIVILT_ISA=isa).strip() == "done"


def test_same_selection_on_every_instruction_set(verdicts):
    """Exact scores: the same indices bit for bit whatever the instruction set."""
    needs_cpu(verdicts)
    code = """
import hashlib, torch, hivilt
g = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for topk, axis in ((7, "keys"), (5, "queries")):
    q, k = (torch.randint(-4, 5, (2, 3, n, 24), generator=g).float() for n in (70, 530))
    digest.update(hivilt.ops.topk_select(q, k, topk, axis=axis, scale=1.0, backend="cpu").numpy().tobytes())
print(digest.hexdigest())
"""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        flags = next(line for line in info if line.startswith("flags")).split()
    able = [isa for isa, needs in FLAGS.items() if all(flag in flags for flag in needs)]
    assert len({python(code, HIVILT_ISA=isa) for isa in able}) == 1


def test_unknown_instruction_set_is_refused():
    done = fresh.run("import hivilt", HIVILT_ISA="mmx")
    assert done.returncode and "HIVILT_ISA" in done.stderr and "scalar" in done.stderr


def test_no_memory_grows(verdicts):
    """A thousand forward and backward calls leave the resident set where it was."""
    needs_cpu(verdicts)
    code = """
import gc, torch, hivilt
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096
q, k, v = (torch.randn(2, 4, 64, 32, requires_grad=True) for _ in range(3))
def run(count):
    for i in range(count):
        topk, axis = ((None, "keys"), (9, "keys"), (5, "queries"))[i % 3]
        out = hivilt.ops.topk_attention(q, k, v, topk, axis=axis, dropout_p=0.1 * (i % 2), backend="cpu")
        torch.autograd.grad(out.sum(), (q, k, v))
run(300)
gc.collect()
before = resident()
run(1000)
print(resident() - before)
"""
    assert int(python(code)) < 2 * MiB


def test_repro_line_runs():
    """The line in a failure message is a whole command."""
    case = t.case(5, torch.float32, topk=3)
    line = case.repro(backend="reference", backward=True)
    done = subprocess.run(["bash", "-c", line.replace("python", sys.executable, 1)], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
