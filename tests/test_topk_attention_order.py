"""Exact selection: wherever scores are exact in float32, indices equal the lexicographic top-k bit for bit."""

import math

import pytest
import torch

import hivilt
import hivilt.testing as t

CASES = 250  # integer cases per dtype and backend
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 479, 481, 511, 512, 513, 1023, 1024, 1025, 4095,
         4096, 4097, 5003]  # fmt: skip
op, select = hivilt.ops.topk_attention, hivilt.ops.topk_select


def rows_of(C: int) -> dict[str, torch.Tensor]:
    """Named score rows of length C in which a threshold search, a tile merge or a tie rule may slip."""
    g = torch.Generator().manual_seed(C)
    ramp, noise = torch.arange(C, dtype=torch.float32), torch.randn(C, generator=g)
    late = torch.zeros(C)
    late[-3:] = 1.0
    spikes = torch.where(torch.rand(C, generator=g) < 0.02, 1000.0 + noise, noise)
    return {
        "ascending": ramp,
        "descending": -ramp,
        "equal": torch.full((C,), -3.25),
        "zeros": torch.zeros(C),
        "signed zeros": torch.where(ramp % 2 == 0, 0.0, -0.0),
        "best last": late,
        "bimodal": spikes,
        "four values": (noise * 2).round().clamp(-2, 1),
        "two values": (noise > 1).float(),
        "gaussian": noise,
        "permutation": torch.randperm(C, generator=g).float() - C // 2,
        "denormal": (ramp % 37 - 18) * 2.0**-149,
        "denormal and zero": torch.where(noise > 0, noise.sign() * 2.0**-140, torch.where(ramp % 3 == 0, 0.0, -0.0)),
        "adjacent floats": 1.0 + (torch.randperm(C, generator=g) % 97).float() * 2.0**-23,
        "very negative": -7e4 - 3e4 * torch.rand(C, generator=g),
        "huge": noise * 1e37,
        "lowest": torch.full((C,), torch.finfo(torch.float32).min),
        "lse below -100": -150.0 + noise,
        "log scale": noise.sign() * (noise * 20).clamp(-80, 80).exp(),
        "sawtooth": ramp % 16,
    }


def counts_of(C: int) -> list[int]:
    return sorted({n for n in (1, 2, 5, 16, 64, C // 3, C - 1, C, C + 1) if n >= 1})


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("C", SIZES)
def test_adversarial_rows(where, C, axis):
    """Each row is produced by a one-hot query times the keys, and again as a float bias on zero scores."""
    backend, device = where
    rows = torch.stack(list(rows_of(C).values())).to(device)
    R = len(rows)
    hot = torch.eye(R, device=device)[None, None]
    zero_r, zero_c = torch.zeros(1, 1, R, 3, device=device), torch.zeros(1, 1, C, 3, device=device)
    by_dot = {"query": hot, "key": rows.T.contiguous()[None, None], "scale": 1.0}
    by_bias = {"query": zero_r, "key": zero_c, "attn_mask": rows}
    if axis == "queries":
        by_dot = {"query": by_dot["key"], "key": hot, "scale": 1.0}
        by_bias = {"query": zero_c, "key": zero_r, "attn_mask": rows.T}
    for topk in counts_of(C):
        kept = t.best(rows, torch.ones_like(rows, dtype=torch.bool), topk)
        for kind, x in (("dot", by_dot), ("bias", by_bias)):
            indices = select(**x, topk=topk, axis=axis, backend=backend)
            assert indices.shape == (1, 1, R, topk) and indices.dtype == torch.int32
            got = t.pairs_from_indices(indices, R, C, 1)[0, 0]
            wrong = [name for name, a, b in zip(rows_of(C), got, kept, strict=True) if not torch.equal(a, b)]
            assert not wrong, f"{kind}, C={C}, topk={topk}: {wrong}"
            ordered = torch.where(indices < 0, C, indices)
            assert (ordered.diff() > 0).logical_or(ordered[..., 1:] == C).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integer_cases(where, dtype):
    """Integer inputs and a power-of-two scale: scores exact, ties everywhere, every mask and both axes."""
    backend, device = where
    for i, case in enumerate(t.cases(CASES, dtype, seed=6)):
        if case.topk is None or case.mask == "float":
            continue
        case = t.case(case.seed, dtype, fill="integers", scale=(1.0, 0.25, -0.5, 0.0)[i % 4])
        x = case.inputs(device)
        repro = case.repro(backend=backend, exact=True)
        indices = select(**{n: v for n, v in x.items() if n != "value"}, backend=backend)
        _, again = op(**x, return_indices=True, backend=backend)
        assert torch.equal(indices, again), f"topk_select and topk_attention disagree\n  repro: {repro}"
        t.assert_topk(indices, **{n: v for n, v in x.items() if n != "value"}, exact=True, repro=repro)


@pytest.mark.parametrize("D", [1, 2, 5, 16, 31, 64, 100, 129, 256])
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_integer_widths(where, D, axis):
    backend, device = where
    for dtype in (torch.float32, torch.bfloat16):
        for fan, topk in ((1, 7), (3, 40)):
            case = t.case(3 * D, dtype, shape=(1, 2 * fan, 2, 67, 130, D, 8), axis=axis, topk=topk, scale=1.0,
                          fill="integers", mask="", select=0)  # fmt: skip
            t.check(op, case, backend=backend, device=device, exact=True)


@pytest.mark.parametrize("kept", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_scores_average_exactly(where, kept, dtype):
    """Equal scores, a power of two of them kept, integer values: the mean is exact, whatever the order of the sum."""
    backend, device = where
    g = torch.Generator().manual_seed(kept)
    value = torch.randint(-8, 9, (2, 2, 67, 5), generator=g).to(device, dtype)
    query, key = (
        torch.zeros(2, 4, 13, 6, device=device, dtype=dtype),
        torch.ones(2, 2, 67, 6, device=device, dtype=dtype),
    )
    out, lse, indices = op(query, key, value, kept, return_lse=True, return_indices=True, backend=backend)
    assert torch.equal(indices, torch.arange(kept, dtype=torch.int32, device=device).expand(2, 4, 13, kept))
    mean = value[:, :, :kept].double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 13, 5)
    assert torch.equal(out, mean.to(dtype))
    assert (lse - math.log(kept)).abs().max() <= 2.0**-22
    dense = op(query, key[:, :, :kept], value[:, :, :kept], backend=backend)
    assert torch.equal(dense, mean.to(dtype))


def test_score_is_never_rounded_before_selection(where):
    """Scores that agree in bfloat16 and TF32 but differ in float32 keep their float32 order."""
    backend, device = where
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        query = torch.ones(1, 1, 3, 2, dtype=dtype, device=device)
        key = torch.stack([torch.full((40,), 1024.0), torch.arange(40) / 64], -1)[None, None].to(device, dtype)
        indices = select(query, key, 5, scale=1.0, backend=backend)
        assert indices[0, 0].tolist() == [[35, 36, 37, 38, 39]] * 3


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_shared_selection_uses_its_own_scores(where, axis):
    """The selection follows select_query . select_key, unscaled and without the bias; the softmax does not."""
    backend, device = where
    g = torch.Generator().manual_seed(1)
    ints = lambda *shape: torch.randint(-3, 4, shape, generator=g).float().to(device)  # noqa: E731
    x = {"query": ints(2, 4, 21, 8), "key": ints(2, 2, 33, 8), "value": ints(2, 2, 33, 6), "topk": 5, "axis": axis,
         "select_query": ints(2, 21, 11), "select_key": ints(2, 33, 11)}  # fmt: skip
    for extra in ({}, {"attn_mask": 50 * ints(2, 1, 21, 33)}, {"scale": -2.0}):
        got = t.judge(op, x | extra, backend=backend, exact=True)
        assert got["indices"].shape[1] == 1
        t.assert_topk(got["indices"], **{n: v for n, v in x.items() if n != "value"}, exact=True)
