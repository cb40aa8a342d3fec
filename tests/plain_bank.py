"""Retrieval from a bank in float64, its error budgets, and banks that a scan in low precision would get wrong.

Scores are judged against float64, the selection by what the errors of float32 scores can excuse, and what is retrieved
through the scores and indices that came with it.  Written independently of ``hivilt.reference``.
"""

import random

import numpy as np
import torch
from torch import Tensor

import hivilt.testing as t

INF, NAN = float("inf"), float("nan")
HALVES = (torch.bfloat16, torch.float16)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(seed: int, *shape: int, most: int = 4) -> Tensor:
    """Whose dot products are exact in every precision; many of them are equal."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=g).float()


def draw(seed: int, mixed: bool = True) -> dict:
    """A random call; ``mixed``: dtypes of query, keys and values of their own, else all float32."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    B, M = r.choice((1, 2, 5, 31, 33, 64, 65, 97, 131)), r.choice((1, 2, 11, 12, 13, 96, 97, 500, 1025, 2300))
    C, E = r.choice((1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 40, 64, 65)), r.choice((1, 3, 8, 17, 33, 64))
    dtypes = (torch.float32, torch.float32, *HALVES) if mixed else (torch.float32,)
    x = {"query": torch.randn(B, C, generator=g).to(r.choice(dtypes)), "topk": r.choice((1, 2, 5, 16, 100, M, M + 3)),
         "keys": torch.randn(M, C, generator=g).to(r.choice(dtypes))}  # fmt: skip
    if r.random() < 0.5:
        x["values"] = torch.randn(M, E, generator=g).to(r.choice(dtypes))
    scale = r.choice((-1.0, 0.5, 1.0, 3.0)) / C**0.5
    x["scale"] = r.choice((scale, torch.tensor(scale), torch.tensor([scale])))
    count = r.randrange(M + 2)
    x["count"] = r.choice((None, count, torch.tensor(count), torch.tensor([count], dtype=torch.int32)))
    keep = r.choice((0.02, 0.5, 0.95))
    x["mask"] = r.choice((None, torch.rand(M, generator=g) < keep, torch.rand(B, M, generator=g) < keep))
    rows = torch.randint(-1, M, (B,), generator=g)
    x["exclude"] = r.choice((None, r.randrange(-1, M), rows, rows.int()))
    return x


def placed(x: dict, device: str) -> dict:
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in x.items()}


def dots(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 dot products [B, M], the sums of their absolute terms, and how far float32 (float64) may be off.

    A chain of C multiply-adds is off by at most C u times that sum, and by half of the smallest subnormal at each step;
    one more for a rounding at the end.  Float64 is judged by float64, which errs as much itself.
    """
    q, k = query.double(), keys.double()
    size, double = q.abs() @ k.abs().mT, query.dtype == torch.float64
    steps = (2 if double else 1) * (query.shape[1] + 2)
    return q @ k.mT, size, steps * (t.UNIT[torch.float64 if double else torch.float32] * size + 2.0**-150)


def valid_pairs(scores: Tensor, count=None, mask: Tensor | None = None, exclude=None) -> Tensor:
    """Bool [B, M]."""
    slots = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    valid = scores != -INF
    if count is not None:
        valid = valid & (slots < int(count))
    if mask is not None:
        valid = valid & mask
    if exclude is not None:
        valid = valid & (slots != torch.as_tensor(exclude, device=scores.device).reshape(-1, 1))
    return valid


def best_rows(scores: Tensor, valid: Tensor, topk: int) -> np.ndarray:
    """The best valid rows of every query, best first, ties by index, -1 where they run out; by numpy's lexsort."""
    found = np.full((scores.shape[0], topk), -1)
    for b, (line, allowed) in enumerate(zip(scores.cpu().numpy(), valid.cpu().numpy(), strict=True)):
        slots = np.flatnonzero(allowed)
        order = slots[np.lexsort((slots, -(line[slots] + 0.0)))][:topk]
        found[b, : len(order)] = order
    return found


def shares_of(logits: Tensor, listed: Tensor) -> Tensor:
    top = (
        torch.where(listed, logits, -INF).amax(1, keepdim=True) if logits.shape[1] else logits.new_zeros(len(logits), 1)
    )
    power = torch.where(listed, (logits - torch.where(top > -INF, top, 0.0)).exp(), 0.0)
    return power / power.sum(1, keepdim=True).clamp_min(1e-300)


def number_of(scale) -> float:
    return float(scale.detach()) if isinstance(scale, Tensor) else float(scale)


def judge(got, query, keys, topk, *, values=None, scale=1.0, count=None, mask=None, exclude=None, one_sign=False,
          repro="") -> None:  # fmt: skip
    """Forms, number and order of what is listed, every score, that nothing better was left out, and what was retrieved.

    ``one_sign``: summands of one sign, whose roundings may add up over all topk of them.
    """
    retrieved, scores, indices = (x.detach() for x in got)
    B, M = query.shape[0], keys.shape[0]
    values = keys if values is None else values
    double = query.dtype == torch.float64
    assert (retrieved.shape, retrieved.dtype) == ((B, values.shape[1]), query.dtype), repro
    assert (scores.shape, scores.dtype) == ((B, topk), torch.float64 if double else torch.float32), repro
    assert (indices.shape, indices.dtype) == ((B, topk), torch.int64), repro
    true, size, slack = dots(query, keys)
    valid = valid_pairs(true, count, mask, exclude)
    listed = indices >= 0
    wanted = torch.arange(topk, device=indices.device) < valid.sum(1, keepdim=True)
    assert torch.equal(listed, wanted), f"wrong number of rows {repro}"
    assert (indices[~listed] == -1).all() and (scores[~listed] == -INF).all(), f"padding {repro}"
    assert (indices < M).all(), f"index out of range {repro}"
    marks = torch.zeros(B, M + 1, dtype=torch.bool, device=indices.device)
    marks = marks.scatter(1, torch.where(listed, indices, M), True)[:, :M]
    assert torch.equal(marks.sum(1), listed.sum(1)), f"a row twice {repro}"
    assert not (marks & ~valid).any(), f"a row that is not valid {repro}"
    a, b, i, j = scores[:, :-1], scores[:, 1:], indices[:, :-1], indices[:, 1:]
    assert ((a > b) | ((a == b) & (i < j)) | ~listed[:, 1:]).all(), f"order {repro}"
    at = indices.clamp(min=0)
    if M:
        mine, excuse = true.gather(1, at), slack.gather(1, at)
        assert ((scores.double() - mine).abs() <= excuse)[listed].all(), f"scores {repro}"
        worst = torch.where(listed, mine + excuse, INF).amin(1, keepdim=True) if topk else None
        late = valid & ~marks & (true - slack > worst)
        assert not late.any(), f"{int(late.any(1).sum())} queries miss better rows {repro}"
    factor = number_of(scale)
    logits = torch.where(listed, factor * scores.double(), 0.0)
    shares = shares_of(logits, listed)
    rows = values.double()[at] if M else values.new_zeros(B, topk, values.shape[1]).double()
    weight = 2 * logits.abs().amax(1, keepdim=True) + 2 + (topk if one_sign else 0)
    truth = t.Truth(marks)
    truth.values["out"] = (shares[..., None] * rows).sum(1)
    truth.spread["out"] = weight * ((shares + t.TINY * listed)[..., None] * rows.abs()).sum(1)
    budget = truth.budget("out", query.dtype, tight=True)
    if not double:
        budget = (
            budget + topk * 2.0**-150
        )  # among subnormals each of the topk sums rounds by up to half of the smallest
    t.assert_within(retrieved, truth.values["out"], budget, "retrieved", repro)


def plain(query, keys, values, indices, scale) -> tuple[Tensor, Tensor]:
    """retrieved and scores in plain PyTorch over given indices; what autograd makes of it is the truth of gradients."""
    listed = indices >= 0
    at = indices.clamp(min=0)
    scores = (query[:, None] * keys[at]).sum(-1)
    some = listed.any(1, keepdim=True)
    shares = torch.where(listed, scale * scores, torch.where(some, -INF, 0.0)).softmax(1)
    return (torch.where(listed, shares, 0.0)[..., None] * values[at]).sum(1), torch.where(listed, scores, 0.0)


def gradients(query, keys, values, indices, scale, of_retrieved: Tensor | None, of_scores: Tensor | None) -> t.Truth:
    """Float64 gradients of query, keys, values (where given) and scale, and sums of their absolute contributions."""
    own = values is not None
    q, k, s = (x.detach().double().requires_grad_() for x in (query, keys, torch.as_tensor(scale).reshape(())))
    v = values.detach().double().requires_grad_() if own else k
    out, scores = plain(q, k, v, indices, s)
    listed = indices >= 0
    dO = torch.zeros_like(out) if of_retrieved is None else of_retrieved.double()
    dS = torch.zeros_like(scores) if of_scores is None else torch.where(listed, of_scores.double(), 0.0)
    leaves = {"query": q, "keys": k, "scale": s} | ({"values": v} if own else {})
    grads = torch.autograd.grad((out * dO).sum() + (scores * dS).sum(), list(leaves.values()))
    truth = t.Truth(listed, dict(zip(leaves, grads, strict=True)))
    with torch.no_grad():
        at = indices.clamp(min=0)
        rows, rows_v = k[at].abs(), v[at].abs()
        sizes = torch.where(listed, (q.abs()[:, None] * rows).sum(-1), 0.0)
        weight = 2 * s.abs() * sizes.amax(1, keepdim=True) + 2
        p = shares_of(torch.where(listed, s * scores, 0.0), listed) + t.TINY * listed
        along = (dO.abs()[:, None] * rows_v).sum(-1)
        through = weight * p * (along + (p * along).sum(1, keepdim=True))
        ds = s.abs() * through + dS.abs()
        flat = at.flatten()

        def spread(x: Tensor, width: int) -> Tensor:
            return x.new_zeros(keys.shape[0], width).index_add_(0, flat, (x * listed[..., None]).flatten(0, 1))

        of_keys = spread(ds[..., None] * q.abs()[:, None], q.shape[1])
        of_values = spread((weight * p)[..., None] * dO.abs()[:, None], v.shape[1])
        truth.spread = {"query": (ds[..., None] * rows).sum(1), "scale": (through * sizes).sum()}
        truth.spread |= {"keys": of_keys, "values": of_values} if own else {"keys": of_keys + of_values}
    return truth


def hard_banks(B: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Name -> (query, keys, topk): what a scan in bfloat16 without a margin, or with too small a one, gets wrong.

    Small banks of several blocks and, with two threads, several splits.
    """
    M, C = 2600, 48
    r = np.random.default_rng(seed)

    def tensor(x) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))

    def normal(*shape) -> np.ndarray:
        return r.standard_normal(shape)

    q, banks = normal(B, C), {}
    # Rounding midpoints: decoys just above one, all rounded up, outscore in bfloat16 the few rows just below one, which
    # are better by their last element.  Once for keys, once for queries, once for both.
    signs, eps = np.sign(normal(C)), 2.0**-20
    up, down = 1 + 2.0**-8 + eps, 1 + 2.0**-8 - eps
    better = np.sort(r.choice(M, 10, replace=False))
    keys = np.where(np.isin(np.arange(M), better)[:, None], down, up) * signs
    keys[:, -1], keys[better, -1] = 0.0, signs[-1] * 4 * C * eps
    banks["midpoints of keys"] = (tensor(np.tile(signs, (B, 1))), tensor(keys), 10)
    half = np.arange(C) < C // 2  # the first half of every query is rounded up, the second down
    queries = np.tile(np.where(half, up, down) * signs, (B, 1))
    keys = np.where(np.isin(np.arange(M), better)[:, None] == half, 0.0, 1.0) * signs
    keys[better, -1] *= 1 + 2.0**-7
    banks["midpoints of queries"] = (tensor(queries), tensor(keys), 10)
    midpoints = (
        (1 + (2 * r.integers(0, 64, (M, C)) + 1) * 2.0**-8) * np.sign(normal(M, C)) * 2.0 ** r.integers(-3, 4, (M, C))
    )
    banks["midpoints of both"] = (tensor(midpoints[:B]), tensor(midpoints), 37)
    # Far more rows within the margin than are kept.
    centre = normal(1, C)
    banks["clusters"] = (tensor(q), tensor(centre + 1e-4 * normal(M, C)), 20)
    banks["tight cluster"] = (tensor(q), tensor(centre * (1 + 2.0**-22 * r.integers(-4, 5, (M, C)))), 100)
    banks["all equal"] = (tensor(q), tensor(np.tile(centre, (M, 1))), 50)
    banks["duplicates"] = (tensor(q), tensor(np.repeat(normal(M // 20, C), 20, 0)[r.permutation(M)]), 33)
    banks["zeros"] = (tensor(q), tensor(np.zeros((M, C))), 7)
    # The cut moves at every row, or at none.
    one, step = np.ones((B, C)), np.linspace(0.5, 1.5, M)[:, None]
    banks["ascending"] = (tensor(one * np.exp(normal(B, 1))), tensor(step * np.ones(C)), 60)
    banks["descending"] = (tensor(one), tensor(step[::-1] * np.ones(C)), 60)
    banks["slowly ascending"] = (tensor(one), tensor(1 + 1e-6 * step * np.ones(C)), 60)
    # Norms of all sizes beside each other: the margin of a block is that of its largest row.
    spread = 10.0 ** r.uniform(-6, 6, (M, 1))
    banks["norms 1e-6 to 1e6"] = (tensor(q * 10.0 ** r.uniform(-6, 6, (B, 1))), tensor(normal(M, C) * spread), 40)
    norms = r.choice([1e-20, 1.0, 1e18], (M, 1), p=[0.4, 0.5, 0.1])
    banks["norms 1e-20 to 1e18"] = (tensor(q), tensor(normal(M, C) * norms), 300)
    banks["norms of queries"] = (tensor(q * r.choice([1e-20, 1.0, 1e18], (B, 1))), tensor(normal(M, C)), 30)
    banks["1e-20 alone"] = (tensor(q), tensor(normal(M, C) * 1e-20), 30)
    banks["beyond bfloat16"] = (tensor(np.full((B, C), 1.0)), tensor(normal(M, C) * 1e36), 30)
    banks["subnormals"] = (tensor(q), tensor(normal(M, C) * 1e-41), 30)
    banks["products that vanish"] = (tensor(q * 1e-22), tensor(normal(M, C) * 1e-22), 30)
    # Where bfloat16 of a finite row is infinite; norms on both sides of what low precision may score; subnormals that
    # large queries make count.
    rows = normal(M, C)
    rows[::7, 3] = 3.4e38 * np.sign(rows[::7, 3])
    banks["infinite in bfloat16"] = (tensor(q * 1e-3), tensor(rows), 30)
    edge = 1e15 * r.choice([0.5, 0.999, 1.0, 1.001, 2.0], (M, 1)) * np.sign(normal(M, 1))
    unit = normal(M, C) / 48
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    banks["norms about 1e15"] = (tensor(unit[:B] * edge[:B]), tensor(unit[::-1] * edge), 30)
    banks["subnormals of large queries"] = (
        tensor(q * 1e13),
        tensor(normal(M, C) * 10.0 ** r.uniform(-45, -37, (M, C))),
        30,
    )
    # Nothing but ties, whose order the index decides: exact in every precision, zeros of both signs among them.
    banks["signs"] = (tensor(np.sign(q)), tensor(np.sign(normal(M, C))), 45)
    thin = np.where(normal(M, C) > 1.8, np.sign(normal(M, C)), 0.0) * np.sign(normal(M, C))
    banks["zeros of both signs"] = (tensor(np.where(normal(B, C) > 1, np.sign(q), 0.0 * q)), tensor(thin), 300)
    # All scores negative; cancellation, where the score is far smaller than its terms.
    banks["negative"] = (tensor(np.abs(q)), tensor(-np.abs(normal(M, C))), 25)
    cancel = normal(M, C // 2) * 1e3
    banks["cancellation"] = (
        tensor(np.tile(normal(B, C // 2), 2)),
        tensor(np.hstack([cancel, -cancel + normal(M, C // 2) * 1e-3])),
        45,
    )
    return banks


def representative(name: str, device: str) -> list[tuple]:
    """Argument tuples of an operator that between them set every optional argument, without the backend."""
    query, keys, values = (numbers(i, *shape).to(device) for i, shape in enumerate(((4, 6), (15, 6), (15, 5))))
    scale, counter = torch.tensor(0.4, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    if name == "bank_push_":
        return [
            (keys, counter, counter.clone(), None, None, query, None, False),
            (keys, counter, counter.clone(), values, counter.clone(), query, values[:4].clone(), True),
        ]
    shadow = torch.zeros(15, 32, dtype=torch.int8, device=device)
    if name == "bank_shadow":
        return [(keys, shadow, None), (keys, shadow, torch.tensor([3, 14], device=device))]
    mask, exclude = numbers(3, 4, 15).to(device) > -1, torch.tensor([-1, 0, 3, 14], device=device)
    forward = [
        (query, keys, None, 3, None, 0.7, None, None, None, shadow, "exact", False),
        (query, keys, values, 3, scale, 1.0, torch.tensor(12, device=device), mask, exclude, None, "fp32", True),
        (query, keys, None, 20, scale, 1.0, None, mask[0], None, None, "bf16", True),
    ]
    if name == "bank_retrieval":
        return forward
    backward = []
    for args in forward[1:]:
        retrieved, scores, indices, rows, value_rows = torch.ops.hivilt.bank_retrieval(*args, "")
        value_rows, grad_scores = (None, None) if args[2] is None else (value_rows, torch.ones_like(scores))
        saved = (rows, value_rows, scores, indices, scale, 1.0, 15)
        backward += [(query, torch.ones_like(retrieved), grad_scores, *saved, wanted) for wanted in (True, False)]
    return backward
