"""Top-k attention, every backend against the float64 oracle: random parity forward and backward, sizes, GQA, E != D."""

import math

import pytest
import torch

import hivilt
import hivilt.testing as t

FORWARD, BACKWARD = 150, 120  # random cases per dtype and backend
HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
op = hivilt.ops.topk_attention


def number_of(cases: int, where: tuple[str, str]) -> int:
    """Fewer of what other tests have more of: test_triton_kernels.py of interpreted kernels, at sizes made for them,
    and test_random_float64 of the reference, which has one line of code for all dtypes."""
    return cases // 10 if where == ("triton", "cpu") else cases // 3 if where[0] == "reference" else cases


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_random_forward(where, dtype):
    backend, device = where
    tally = t.Tally(dtype)
    for case in t.cases(number_of(FORWARD, where), dtype, seed=1):
        t.check(op, case, backend=backend, device=device, tally=tally)
    tally.assert_no_worse()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_random_backward(where, dtype):
    backend, device = where
    tally = t.Tally(dtype)
    for case in t.cases(number_of(BACKWARD, where), dtype, seed=2):
        t.check(op, case, backend=backend, device=device, backward=True, tally=tally)
    tally.assert_no_worse()


def test_random_float64():
    for case in t.cases(BACKWARD, torch.float64, seed=3):
        t.check(op, case, backend="reference", backward=True)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_nan_filled_memory_changes_nothing(where, dtype, nan_filled_memory):
    """Whatever fresh memory holds, nothing unwritten is read and nothing unwritten is returned."""
    backend, device = where
    for case in t.cases(number_of(40, where), dtype, seed=4):
        t.check(op, case, backend=backend, device=device, backward=True)


@pytest.mark.parametrize("topk", [None, 5])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 63, 65, 100, 127, 129, 160, 200, 255, 256])
def test_every_head_width(where, width, topk):
    backend, device = where
    for i, (dtype, E) in enumerate(((torch.float32, width), (torch.bfloat16, 257 - width), (torch.float16, width))):
        shape = (1, 2, 1, 19, 35, width, E)
        plain = {"mask": "", "select": 0, "topk": topk, "scale": None, "fill": "normal"}
        t.check(op, t.case(i, dtype, shape=shape, **plain), backend=backend, device=device, backward=True)


# One token, and one more or less than whole tiles, key chunks and query blocks.
EDGES = [(1, 1), (1, 3000), (3000, 1), (5, 1025), (513, 33), (129, 511), (16, 4097), (257, 257), (47, 479), (48, 480),
         (49, 481), (191, 961), (193, 960), (385, 63), (3, 8193), (50, 4099), (97, 128), (192, 2)]  # fmt: skip


@pytest.mark.pairwise
@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("topk", [None, 1, 24])
@pytest.mark.parametrize("Q, N", EDGES, ids=str)
def test_long_and_thin(where, Q, N, topk, axis):
    backend, device = where
    plain = {"mask": "", "select": 0, "topk": topk, "axis": axis, "scale": None, "fill": "normal"}
    case = t.case(Q + N, torch.float32, shape=(1, 2, 2, Q, N, 24, 20), **plain)
    t.check(op, case, backend=backend, device=device, backward=True)


BLOCKS = [
    (2, 4, 2, 130, 513, 64, 64),
    (1, 2, 1, 1030, 257, 32, 48),
    (1, 2, 2, 260, 1025, 33, 31),
    (3, 4, 1, 65, 700, 16, 16),
]


@pytest.mark.parametrize("topk, axis", [(None, "keys"), (33, "keys"), (200, "keys"), (20, "queries")])
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_across_blocks(where, shape, topk, axis):
    """Sizes that span several tiles, key chunks and query blocks at once, with several batches and heads."""
    backend, device = where
    B, H, _, Q, N, _, _ = shape
    plain = {"mask": "bool", "mask_shape": (1, 1, Q, N), "select": 0, "topk": topk, "axis": axis, "scale": None}
    for dtype in (torch.float32, torch.bfloat16) if backend != "reference" else (torch.float32,):
        case = t.case(B * H, dtype, shape=shape, fill="normal", key_mask=True, query_mask=False, **plain)
        t.check(op, case, backend=backend, device=device, backward=True)


def test_reference_in_small_slices(monkeypatch):
    """The reference cuts its work into slices of pairs; tiny slices must give what one slice gives."""
    from hivilt.ops import _topk_attention_reference as walked

    for pairs in (1, 60, 700):
        monkeypatch.setattr(walked, "PAIRS", pairs)
        for case in t.cases(30, torch.float32, seed=8):
            if case.shape[0] * case.shape[1] * case.shape[3] * case.shape[4] < 50 * pairs:  # else too many slices
                t.check(op, case, backend="reference", backward=True)


@pytest.mark.parametrize("repeats", [1, 2, 3, 8])
@pytest.mark.parametrize("select", [0, 12])
def test_grouped_heads(where, repeats, select):
    backend, device = where
    for axis in ("keys", "queries"):
        plain = {"mask": "float", "mask_shape": (2, 1, 37, 41), "select": select, "topk": 6, "axis": axis}
        case = t.case(repeats, torch.float32, shape=(2, 2 * repeats, 2, 37, 41, 16, 24), **plain)
        t.check(op, case, backend=backend, device=device, backward=True)


@pytest.mark.parametrize("N", [300, 2000])
@pytest.mark.parametrize("topk", [None, 128])
def test_long_sums_of_one_sign(where, N, topk):
    """The budget does not grow with the row; there the error is held against plain PyTorch's own."""
    backend, device = where
    tally = t.Tally(torch.float32)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.rand(1, 4, n, 32, generator=g).to(device) for n in (48, N, N))
        out, lse, *indices = op(q, k, v, topk, return_lse=True, return_indices=topk is not None, backend=backend)
        truth = t.oracle(q, k, v, topk, indices=indices[0] if indices else None)
        tally.add(truth, {"out": out, "lse": lse}, t.eager(q, k, v, truth.kept))
    tally.assert_no_worse()


def test_by_hand(where):
    """Two queries, three keys, two kept: small enough to read."""
    backend, device = where
    query = torch.tensor([[[[1.0], [-1.0]]]], device=device)
    key = torch.tensor([[[[0.0], [math.log(2.0)], [math.log(4.0)]]]], device=device)
    value = torch.tensor([[[[1.0, 0.0], [0.0, 6.0], [3.0, 3.0]]]], device=device)
    out, lse, indices = op(query, key, value, 2, return_lse=True, return_indices=True, backend=backend)
    assert indices.tolist() == [[[[1, 2], [0, 1]]]]
    expected = torch.tensor([[[[2.0, 4.0], [2 / 3, 2.0]]]], device=device)  # weights 1/3, 2/3 and 2/3, 1/3
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, torch.tensor([[[math.log(6.0), math.log(1.5)]]], device=device))
    out, lse, indices = op(query, key, value, 1, axis="queries", return_lse=True, return_indices=True, backend=backend)
    assert indices.tolist() == [[[[0], [0], [0]]]]  # key 0 ties (+0 and -0): the lower query wins
    torch.testing.assert_close(out[0, 0], torch.tensor([[13 / 7, 24 / 7], [0.0, 0.0]], device=device))
    assert lse[0, 0, 1] == -math.inf


def test_topk_beyond_every_size(where):
    """Huge topk means dense; nothing of that size is allocated."""
    backend, device = where
    x = t.case(5, torch.float32, shape=(2, 2, 1, 33, 47, 16, 16), mask="", select=0, topk=None).inputs(device)
    for axis in ("keys", "queries"):
        dense = op(**x | {"axis": axis}, return_lse=True, backend=backend)
        for topk in (47, 48, 2**31, 2**40, 2**63 - 1):
            got = op(**x | {"axis": axis, "topk": topk}, return_lse=True, backend=backend)
            if not (axis == "queries" and topk < 33):
                assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))


def test_backend_that_ran_is_named(where):
    backend, device = where
    x = torch.randn(1, 1, 4, 8, device=device)
    op(x, x, x, 2, backend=backend)
    assert hivilt.last_backend() == backend
    with hivilt.use_backend(backend):
        op(x, x, x, 2)
    assert hivilt.last_backend() == backend


def test_cpu_library_is_there_if_a_compiler_is(verdicts):
    """A checkout on a machine with a C++ compiler must have its CPU library; without one it may do without."""
    import os
    import shutil

    if verdicts["cpu", "cpu"] is not None and not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++"))):
        pytest.skip(f"no C++ compiler here: {verdicts['cpu', 'cpu']}")
    assert verdicts["cpu", "cpu"] is None
