"""The ways to compute top-k attention that are raced against each other, and the inputs they are raced on.

eager    plain PyTorch: scores, torch.topk, mask, softmax, matmul        compile   torch.compile of it
sdpa     dense scaled_dot_product_attention, which keeps everything      sdpa_masked   the same with the top-k mask
hivilt   hivilt.ops.topk_attention on this device's fastest backend      floor     Q K^T alone into memory that is there

More of them, for the GPU alone, are in gpu_rivals.py.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import roofline
import torch
import torch.nn.functional as F
from device import LIKE_GPU, REHEARSED
from torch import Tensor

import hivilt

INF = float("inf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DENSE = ("sdpa", "flash", "efficient", "cudnn", "math")  # rivals that keep every pair
CLOSE = 4e-6  # scores of fp32 implementations differ by less, relative to the spread of the scores


@dataclass(frozen=True)
class Case:
    """One call, fully determined; H query heads and as many key heads."""

    B: int
    H: int
    Q: int
    N: int
    D: int
    topk: int | None
    backward: bool = False
    dtype: str = "fp32"
    axis: str = "keys"
    shared: int = 0  # channels of a selection source shared by the heads; 0: each head selects by its scores
    data: str = "normal"
    device: str = "cpu"

    def __str__(self) -> str:
        kept = "dense" if self.topk is None else f"top{self.topk}"
        variant = ("-queries" if self.axis == "queries" else "") + ("-shared" if self.shared else "")
        return f"B{self.B}-H{self.H}-Q{self.Q}-N{self.N}-D{self.D}-{kept}{variant}-{self.dtype}-{self.device}"

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    def cost(self, dense: bool = False) -> roofline.Cost:
        """What the operation, or dense attention on the same inputs, must at least do."""
        item = DTYPES[self.dtype].itemsize
        sizes = self.B, self.H, self.Q, self.N, self.D
        if dense or self.topk is None:
            rest = {"kept": None, "listed": 0}
        else:
            rows = self.Q if self.axis == "keys" else self.N
            rest = {"kept": rows * self.topk, "listed": rows * self.topk, "C": self.shared}
        cost = roofline.topk_attention_forward(*sizes, **rest, item=item)
        return cost + roofline.topk_attention_backward(*sizes, **rest, item=item) if self.backward else cost

    def scores_cost(self) -> roofline.Cost:
        """What Q K^T alone must at least do."""
        return roofline.scores(self.B, self.H, self.Q, self.N, self.D, DTYPES[self.dtype].itemsize)

    def smallest(self) -> Case:
        """A tiny call of the same kind, to wake up everything that is loaded or compiled on first use."""
        topk = None if self.topk is None else min(self.topk, 4)
        return replace(self, B=1, H=1, Q=8, N=8, topk=topk)


def hivilt_backend(device: str) -> str | None:
    """The backend with a kernel for this device; None where only the reference would run.  A rehearsal interprets the
    GPU's kernels; nothing else does, wherever Triton's interpreter is switched on."""
    names = ("cuda", "triton") if device == "cuda" or REHEARSED else ("cpu",)
    x = torch.zeros(1, 1, 2, 8, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        verdicts = hivilt.explain("topk_attention", x, x, x, topk=1)
    return next((name for name in names if verdicts[name] is None), None)


# The inputs.


def draw(case: Case) -> dict[str, Tensor]:
    """Keyword arguments of the call, and ``grad_out``.

    In the head that is judged, no row has its topk-th and next score closer than fp32 can tell apart; rows in which
    they are get drawn anew.  So all implementations must keep the same pairs there, and are held to one truth.
    """
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    B, H, Q, N, D = case.B, case.H, case.Q, case.N, case.D
    x = {"query": normal(B, H, Q, D), "key": normal(B, H, N, D), "value": normal(B, H, N, D)}
    if case.data == "clustered":  # eight topics, little noise: scores come in tight groups
        topics = 2 * normal(8, D)
        for name, tokens in (("query", Q), ("key", N)):
            x[name] = topics[torch.randint(8, (B, H, tokens), generator=g)] + 0.05 * normal(B, H, tokens, D)
    elif case.data == "heavy":  # a few huge values
        x |= {name: x[name] * normal(*x[name].shape).exp() for name in ("query", "key")}
    elif case.data == "tied":  # every score occurs many times
        x |= {name: x[name].mul(0.7).round() for name in ("query", "key")}
    elif case.data == "ascending":  # each key beats all before it: the threshold is never right
        line = torch.linspace(-2, 2, N)[:, None] * torch.ones(D)
        x |= {"query": x["query"].abs(), "key": line.expand(B, H, N, D) + 0.01 * normal(B, H, N, D)}
    if case.shared:
        x |= {"select_query": normal(B, Q, case.shared), "select_key": normal(B, N, case.shared)}
    if case.topk is not None and case.data == "normal" and (case.dtype == "fp32" or LIKE_GPU):
        separate(case, x, normal)
    if case.backward:
        x["grad_out"] = normal(B, H, Q, D)
    return {name: t.to(case.device, DTYPES[case.dtype]) for name, t in x.items()}


def separate(case: Case, x: dict[str, Tensor], normal: Callable) -> None:
    """Draws the selecting rows of the judged head anew until all its selections are clear."""
    at = judged(x)
    a, b = (at["select_query"][0], at["select_key"][0]) if case.shared else (at["query"][0, 0], at["key"][0, 0])
    if case.axis == "queries":
        a, b = b, a
    for _ in range(50):
        scores = a.to(DTYPES[case.dtype]).double() @ b.to(DTYPES[case.dtype]).double().T
        best = scores.topk(min(case.topk + 1, scores.shape[1])).values
        unclear = best[:, case.topk - 1 : -1].sub(best[:, case.topk :]).lt(CLOSE * scores.std()).any(1)
        if not unclear.any():
            return
        a[unclear] = normal(int(unclear.sum()), a.shape[1])
    raise AssertionError(f"{case}: no inputs with clear selections found")


def judged(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of the last batch and head, the last being where a wrong offset shows."""
    return {name: t[-1:] if name.startswith("select") else t[-1:, -1:] for name, t in x.items()}


# The rivals: each takes the call and gives back a function of query, key and value.


def eager(case: Case, x: dict[str, Tensor]) -> Callable:
    scale = 1 / math.sqrt(case.D)

    def topk_by_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.mT) * scale
        if case.topk is None:
            return scores.softmax(-1) @ value
        kept = top_pairs(case, x, scores)
        if case.axis == "keys":
            return scores.masked_fill(~kept, -INF).softmax(-1) @ value
        # A query may keep nothing, of which softmax would make NaN.
        return scores.masked_fill(~kept, -1e30).softmax(-1).masked_fill(~kept, 0.0) @ value

    return topk_by_mask


def selecting(case: Case, x: dict[str, Tensor], scores: Tensor) -> Tensor:
    """The scores by which plain PyTorch selects, as it rounds them."""
    return (x["select_query"] @ x["select_key"].mT).unsqueeze(1) if case.shared else scores


def top_pairs(case: Case, x: dict[str, Tensor], scores: Tensor) -> Tensor:
    """What plain PyTorch keeps."""
    dim = -1 if case.axis == "keys" else -2
    scores = selecting(case, x, scores)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, scores.topk(case.topk, dim).indices, True)


def top_lists(case: Case, x: dict[str, Tensor]) -> Tensor:
    """The same as indices, laid out like those of hivilt."""
    scores = selecting(case, x, (x["query"] @ x["key"].mT) * (1 / math.sqrt(case.D)))
    return scores.topk(case.topk).indices if case.axis == "keys" else scores.topk(case.topk, -2).indices.mT


def compiled(case: Case, x: dict[str, Tensor]) -> Callable:
    torch._dynamo.reset()
    return torch.compile(eager(case, x), fullgraph=True, dynamic=False, backend="eager" if REHEARSED else "inductor")


def sdpa(case: Case, x: dict[str, Tensor]) -> Callable:
    return F.scaled_dot_product_attention


def sdpa_masked(case: Case, x: dict[str, Tensor]) -> Callable:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, top_pairs(case, x, query))

    return attend


def ours(case: Case, x: dict[str, Tensor]) -> Callable:
    options = {name: t for name, t in x.items() if name.startswith("select")}
    options |= {"axis": case.axis, "backend": hivilt_backend(case.device)}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return hivilt.ops.topk_attention(query, key, value, case.topk, **options)

    return attend


def floor(case: Case, x: dict[str, Tensor]) -> Callable:
    scores = torch.empty(case.B, case.H, case.Q, case.N, dtype=DTYPES[case.dtype], device=case.device)
    scores.zero_()  # so that its pages are there
    return lambda query, key, value: torch.matmul(query, key.mT, out=scores)


RIVALS = {
    "eager": eager, "compile": compiled, "sdpa": sdpa, "sdpa_masked": sdpa_masked, "hivilt": ours, "floor": floor,
}  # fmt: skip
MAY_REFUSE = {"compile"}  # rivals that some machines or shapes have no kernel for: left out, with the reason


def case_cost(name: str, case: Case) -> roofline.Cost:
    """What the rival's own operation must at least do: dense attention for sdpa, the matrix product for the floor."""
    return case.scores_cost() if name == "floor" else case.cost(dense=name in DENSE)


def runner(name: str, case: Case, x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed: () -> (out,), with backward (out, grad_query, grad_key, grad_value)."""
    forward = RIVALS[name](case, x)
    leaves = [x[name].detach().requires_grad_(case.backward) for name in ("query", "key", "value")]
    if not case.backward:
        return lambda: (forward(*leaves),)

    def run() -> tuple[Tensor, ...]:
        out = forward(*leaves)
        return (out, *torch.autograd.grad(out, leaves, x["grad_out"]))

    return run
