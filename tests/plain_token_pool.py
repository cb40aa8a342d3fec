"""What tests of token_pool compare with: the pools in float64 with error budgets, and the plain module as it is written
today.  None of hivilt's own code."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from plain_scale_fusion import numbers
from torch import Tensor

import hivilt.testing as t

POOLS = ("mean", "max", "attention")
PARAMETERS = ("proj_weight", "proj_bias", "score_weight", "score_bias", "pool_weights")


def call(B, N, C, K, dtype=torch.float32, seed=0, pools=POOLS, masked=False, bias=True, wide_weights=False) -> dict:
    """Random arguments of hivilt.ops.token_pool."""
    x = {"features": numbers(seed, B, N, C, dtype=dtype), "proj_weight": None, "proj_bias": None,
         "score_weight": None, "score_bias": None}  # fmt: skip
    if "attention" in pools:
        x["proj_weight"] = numbers(seed + 1, K, C).div(max(C, 1) ** 0.5).to(dtype)
        x["score_weight"] = numbers(seed + 2, 1, K, dtype=dtype)
        if bias:
            x |= {"proj_bias": numbers(seed + 3, K, dtype=dtype), "score_bias": numbers(seed + 4, 1, dtype=dtype)}
    kind = torch.float32 if wide_weights and dtype != torch.float64 else dtype
    x |= {"pool_weights": numbers(seed + 5, len(pools), dtype=kind), "pools": pools}
    if masked:
        g = torch.Generator().manual_seed(seed)
        x["mask"] = (torch.rand(B, N, generator=g) < 0.7) & (torch.rand(B, 1, generator=g) < 0.8)
    return x


@dataclass(frozen=True)
class Case:
    """A random call, told apart by its seed."""

    seed: int
    dtype: torch.dtype

    def inputs(self) -> dict:
        r = random.Random(self.seed)
        N = r.choice((0, 1, 2, r.randint(1, 20), r.randint(1, 300), 64 * r.randint(1, 5) + r.randint(-1, 1)))
        C, K = (r.choice((1, r.randint(1, 9), r.randint(1, 130), 16, 24, 33, 96, 192)) for _ in range(2))
        pools = tuple(r.sample(POOLS, r.choice((1, 2, 3, 3))))
        return call(r.choice((0, 1, 1, 2, 5)), N, C, K, self.dtype, self.seed, pools, r.random() < 0.5,
                    r.random() < 0.7, r.random() < 0.3)  # fmt: skip


def leaves(x: dict) -> dict[str, Tensor]:
    return {n: x[n] for n in ("features", *PARAMETERS) if x[n] is not None}


def truth(x: dict, grad_out: Tensor | None = None) -> t.Truth:
    """Values in float64; beside each the sum of the absolute values that it was added up from."""
    f, pools = x["features"].double(), x["pools"]
    B, N, C = f.shape
    kept = torch.ones(B, N, dtype=torch.bool) if x.get("mask") is None else x["mask"]
    some, count = kept.any(1), kept.sum(1).clamp(min=1)[:, None].double()
    f = torch.where(kept[..., None], f, 0.0)
    mix = x["pool_weights"].double().softmax(0)
    pooled, sizes, found = {}, {}, {}
    pooled["mean"], sizes["mean"] = f.sum(1) / count, f.abs().sum(1) / count
    ranked = torch.where(kept[..., None], f, -torch.inf)
    first = ranked.argmax(1) if N else torch.zeros(B, C, dtype=torch.int64)  # the lowest index of equals
    if N:
        top = ranked == ranked.amax(1, keepdim=True)
        first = torch.where(top, torch.arange(N)[:, None], N).amin(1).clamp(max=N - 1)
    pooled["max"] = f.gather(1, first[:, None])[:, 0] if N else f.sum(1)
    sizes["max"] = torch.zeros_like(pooled["max"])
    if "attention" in pools:
        W, w = x["proj_weight"].double(), x["score_weight"].double()
        b = torch.zeros(len(W)).double() if x["proj_bias"] is None else x["proj_bias"].double()
        inner = f @ W.mT + b
        e_inner = f.abs() @ W.abs().mT + b.abs() + inner.abs()
        hidden = inner.tanh()
        e_hidden = (1 - hidden**2) * e_inner + hidden.abs()
        scores = (hidden @ w.mT)[..., 0]
        e_scores = ((e_hidden + hidden.abs()) @ w.abs().mT)[..., 0]
        if x["score_bias"] is not None:
            e_scores = e_scores + x["score_bias"].double().abs()
        a = torch.where(kept, scores, -torch.inf)
        a = torch.where(kept & some[:, None], torch.where(some[:, None], a, 0.0).softmax(1), 0.0)
        worst = (2 * torch.where(kept, e_scores, 0.0).amax(1) + 2 if N else torch.zeros(B))[:, None]
        e_a = a * (worst + torch.where(kept, scores, 0.0).abs())  # exp turns absolute errors into relative ones
        pooled["attention"] = (a[..., None] * f).sum(1)
        sizes["attention"] = ((a + e_a)[..., None] * f.abs()).sum(1)
    stack, size = (torch.stack([v[p] for p in pools], 1) * some[:, None, None] for v in (pooled, sizes))
    out = (mix[:, None] * stack).sum(1)
    e_mix = mix * (x["pool_weights"].double().abs().amax() + 2)
    found = t.Truth(kept, {"out": out}, {"out": (mix[:, None] * size + (mix + e_mix)[:, None] * stack.abs()).sum(1)})
    if grad_out is None:
        return found

    values, spread = found.values, found.spread
    g = grad_out.double() * some[:, None]
    share = {p: mix[i] * g for i, p in enumerate(pools)}  # what reaches each pool
    grad = torch.zeros_like(f)
    e_grad = torch.zeros_like(f)
    if "mean" in pools:
        grad = grad + kept[..., None] * (share["mean"] / count)[:, None]
        e_grad = e_grad + 3 * (kept[..., None] * (share["mean"] / count)[:, None]).abs()
    if "max" in pools and N:
        one = torch.zeros_like(f).scatter(1, first[:, None], share["max"][:, None])
        grad, e_grad = grad + one, e_grad + 2 * one.abs()
    if "attention" in pools:
        da = (share["attention"][:, None] * f).sum(-1)
        e_da = 3 * (share["attention"][:, None] * f).abs().sum(-1)
        centred = da - (a * da).sum(1, keepdim=True)
        ds = a * centred
        e_ds = e_a * centred.abs() + a * (e_da + ((a + e_a) * (e_da + da.abs())).sum(1, keepdim=True))
        dh = ds[..., None] * w
        di = dh * (1 - hidden**2)
        e_di = e_ds[..., None] * w.abs() * (1 - hidden**2) + dh.abs() * (2 * hidden.abs() * e_hidden + 2)
        grad = grad + a[..., None] * share["attention"][:, None] + di @ W
        e_grad = e_grad + ((a + e_a)[..., None] * share["attention"][:, None].abs()) * 2 + (e_di + di.abs()) @ W.abs()
        flat = di.flatten(0, 1), e_di.flatten(0, 1), f.flatten(0, 1)
        values["proj_weight"], spread["proj_weight"] = flat[0].mT @ flat[2], 2 * flat[1].mT @ flat[2].abs()
        values["proj_bias"], spread["proj_bias"] = flat[0].sum(0), 2 * flat[1].sum(0)
        values["score_weight"] = (ds[..., None] * hidden).sum((0, 1))[None]
        spread["score_weight"] = (e_ds[..., None] * hidden.abs() + ds.abs()[..., None] * e_hidden).sum((0, 1))[None]
        values["score_bias"], spread["score_bias"] = torch.zeros(1).double(), e_ds.sum()[None]
    values["features"], spread["features"] = grad, e_grad
    per_pool = (stack * g[:, None]).sum((0, 2))
    e_pool = ((size + 2 * stack.abs()) * g[:, None].abs()).sum((0, 2))
    values["pool_weights"] = mix * (per_pool - (mix * per_pool).sum())
    spread["pool_weights"] = e_mix * (per_pool.abs() + (mix * per_pool.abs()).sum()) + mix * (
        e_pool + (mix * e_pool).sum() + (e_mix * per_pool.abs()).sum()
    )
    return found


def eager(x: dict, grad_out: Tensor | None = None) -> dict[str, Tensor]:
    """The plain module in the inputs' own precision; padding set to -inf, 0 or left out of the mean."""
    dtype, pools, mask = x["features"].dtype, x["pools"], x.get("mask")
    named = {n: v.detach().to(dtype).clone().requires_grad_(grad_out is not None) for n, v in leaves(x).items()}
    f = named["features"]
    every = f if mask is None else torch.where(mask[..., None], f, 0.0)
    results = []
    for pool in pools:
        if pool == "mean":
            results.append(every.mean(1) if mask is None else every.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
        elif pool == "max":
            results.append((f if mask is None else f.masked_fill(~mask[..., None], -torch.inf)).max(1)[0])
        else:
            hidden = torch.tanh(F.linear(every, named["proj_weight"], named.get("proj_bias")))
            scores = F.linear(hidden, named["score_weight"], named.get("score_bias"))
            scores = scores if mask is None else scores.masked_fill(~mask[..., None], -torch.inf)
            results.append((every * scores.softmax(1)).sum(1))
    out = (torch.stack(results) * named["pool_weights"].softmax(0).view(-1, 1, 1)).sum(0)
    if mask is not None:
        out = torch.where(mask.any(1)[:, None], out, 0.0)
    got = {"out": out.detach()}
    if grad_out is not None:
        got |= dict(zip(named, torch.autograd.grad(out, list(named.values()), grad_out), strict=True))
    return got


def judge(op, x: dict, backend: str, device="cpu", tally=None, what="", backward=True) -> dict[str, Tensor]:
    """Calls ``op`` (token_pool), holds output and gradients to their budgets and returns them on the CPU."""
    named = {n: v.detach().clone().to(device).requires_grad_(backward) for n, v in leaves(x).items()}
    mask = {} if x.get("mask") is None else {"mask": x["mask"].to(device)}
    before = {n: v.detach().clone() for n, v in named.items()}
    out = op(**x | named | mask, backend=backend)
    got = {"out": out.detach().cpu()}
    g = None
    if backward:
        g = numbers(11, *out.shape).to(out.dtype)
        grads = torch.autograd.grad(out, list(named.values()), g.to(device))
        got |= {n: v.cpu() for n, v in zip(named, grads, strict=True)}
    for n, v in before.items():
        assert torch.equal(named[n].detach(), v), f"{what}: {n} was written"
        assert n not in got or got[n].dtype == v.dtype, f"{what}: gradient of {n} is {got[n].dtype}"
    assert out.dtype == x["features"].dtype and out.is_contiguous()
    true = truth(x, g)
    for name, value in got.items():
        t.assert_within(value, true.values[name], true.budget(name, out.dtype), f"{what}: {name}")
    whole = x.get("mask") is None or bool(x["mask"].any(1).all())
    if tally is not None and x["features"].numel() and whole:
        rival = eager(x, g)
        tally.add(t.Truth(true.kept, {n: true.values[n] for n in got}, true.spread), got, rival)
    return got


def representative(name: str, device: str = "cpu") -> list[tuple]:
    """Arguments of an operator, without its backend, that between the calls set every optional one."""
    x, y = call(2, 9, 6, 4, masked=True), call(2, 9, 6, 4, pools=("max", "mean"))
    found = []
    for z in (x, y):
        z = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in z.items()}
        pools = [POOLS.index(p) for p in z["pools"]]
        args = (z["features"], *(z[n] for n in PARAMETERS), z.get("mask"), pools)
        if name == "token_pool":
            found.append(args)
        elif name == "token_pool_backward":
            saved = torch.ops.hivilt.token_pool(*args, "reference")
            without_bias = (*args[:4], *args[5:7])
            found.append((numbers(5, 2, 6).to(device), *without_bias, *saved[1:], pools))
    return found
