"""The ways to retrieve from a feature bank that are raced against each other; gradients are those of the queries.

eager        plain PyTorch: q K^T, topk, softmax, gather, weighted sum           compile   torch.compile of it
faiss        IndexFlatIP.search alone, its threshold for BLAS as it comes; it neither weighs rows nor sums them
faiss_blas   the same with its threshold at 1, so that it always multiplies matrices
hivilt       hivilt.ops.bank_retrieval on this device's fastest backend; the case says in which precision
hivilt_int8  the same with a copy of the bank in bytes, made before the clock runs
floor        q K^T in float32 alone, into memory that is there
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from device import LIKE_GPU, REHEARSED
from roofline import Cost
from torch import Tensor

import hivilt
from hivilt.testing import UNIT

MAY_REFUSE = {"compile"}  # see rivals.MAY_REFUSE
DIRECTIONS = ("forward", "forward+backward")
FAISS = not LIKE_GPU and importlib.util.find_spec("faiss") is not None  # faiss-cpu
JUDGED = 32  # queries of a race that are held to float64
RIVAL_FACTOR = 4  # times the error of eager that others are granted; hivilt is granted OUR_FACTOR
OUR_FACTOR = 2
# Rounding both factors to 8 bits hides differences of 2^-7 of |q| |k|; among scores of normal rows those are a few
# places around the last one kept. "exact" and "fp32" must list what float64 lists.
APPROXIMATE_RECALL = 0.9


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call, fully determined."""

    B: int
    M: int
    C: int
    topk: int = 100
    direction: str = "forward"
    precision: str = "exact"  # of hivilt
    dtype: str = "fp32"
    device: str = "cpu"

    operation = "bank_retrieval"

    def __str__(self) -> str:
        return f"B{self.B}-M{self.M}-C{self.C}-top{self.topk}-{self.dtype}-{self.device}"

    @property
    def backward(self) -> bool:
        return self.direction == "forward+backward"

    @property
    def scale(self) -> float:
        return self.C**-0.5

    def smallest(self) -> Case:
        return replace(self, B=2, M=200, C=8, topk=min(self.topk, 4))


@functools.lru_cache(maxsize=1)
def numbers(B: int, M: int, C: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, bank and upstream gradient; cases that differ in precision alone share them."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=g).to(device) for shape in ((B, C), (M, C), (B, C)))


def draw(case: Case) -> dict[str, Tensor]:
    query, keys, grad_out = numbers(case.B, case.M, case.C, case.device)
    return {"query": query, "keys": keys} | ({"grad_out": grad_out} if case.backward else {})


def hivilt_backend(device: str) -> str | None:
    """The backend with kernels for this device; None where only the reference would run."""
    names = ("cpu",) if device == "cpu" and not LIKE_GPU else ("cuda", "triton")
    x = torch.zeros(2, 8, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        verdicts = hivilt.explain("bank_retrieval", x, x, 1)
    return next((name for name in names if verdicts[name] is None), None)


# The rivals: each takes the case and gives back query, keys -> retrieved, scores, indices.


def plain(query: Tensor, keys: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    scores, indices = (query @ keys.mT).topk(topk)
    shares = (scale * scores).softmax(-1)
    return (shares[..., None] * keys[indices]).sum(1), scores, indices


def eager(case: Case) -> Callable:
    return functools.partial(plain, topk=case.topk, scale=case.scale)


def compiled(case: Case) -> Callable:
    torch._dynamo.reset()
    return torch.compile(eager(case), fullgraph=True, dynamic=False, backend="eager" if REHEARSED else "inductor")


def ours(case: Case) -> Callable:
    return functools.partial(hivilt.ops.bank_retrieval, topk=case.topk, scale=case.scale, precision=case.precision,
                             backend=hivilt_backend(case.device))  # fmt: skip


def with_shadow(case: Case) -> Callable:
    shadow = hivilt.ops.bank_shadow(numbers(case.B, case.M, case.C, case.device)[1])
    return functools.partial(ours(case), shadow=shadow)


RIVALS = {"eager": eager, "compile": compiled, "hivilt": ours, "hivilt_int8": with_shadow}


def runner(name: str, case: Case, x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed: () -> (retrieved, scores, indices), with backward also the gradient of the queries."""
    if name == "floor":
        return floor(x)
    if name.startswith("faiss"):
        return faiss_search(case, x, always_blas=name == "faiss_blas")
    forward, keys = RIVALS[name](case), x["keys"]
    query = x["query"].detach().requires_grad_(case.backward)

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(case.backward):
            results = forward(query, keys)
            return (*results, *torch.autograd.grad(results[0], query, x["grad_out"])) if case.backward else results

    return run


def floor(x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    query, keys = x["query"], x["keys"]
    out = torch.zeros(query.shape[0], keys.shape[0], device=query.device)
    return lambda: (torch.mm(query, keys.mT, out=out),)


def faiss_search(case: Case, x: dict[str, Tensor], always_blas: bool) -> Callable[[], tuple[Tensor, ...]]:
    """The index holds the bank before the clock runs; its threads are torch's."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(case.C)
    index.add(x["keys"].numpy())
    query, threshold = x["query"].detach().numpy(), faiss.cvar.distance_compute_blas_threshold

    def run() -> tuple[Tensor, ...]:
        faiss.cvar.distance_compute_blas_threshold = 1 if always_blas else threshold
        try:
            scores, indices = index.search(query, case.topk)
        finally:
            faiss.cvar.distance_compute_blas_threshold = threshold
        return torch.from_numpy(scores), torch.from_numpy(indices)

    return run


def case_cost(name: str, case: Case) -> Cost:
    """The scores and, but for the floor and FAISS, the weighted sum; backward reads and weighs the kept rows again.
    Queries and bank read once, results written once."""
    B, M, C, kept = case.B, case.M, case.C, case.B * case.topk
    product = 2 * B * M * C
    if name == "floor":
        return Cost(product, 4 * (B * C + M * C + B * M))
    searched = Cost(product, 4 * (B * C + M * C) + 12 * kept)
    if name.startswith("faiss"):
        return searched
    summed = searched + Cost(2 * kept * C, 4 * B * C)
    return summed + Cost(4 * kept * C, 4 * (2 * B * C + kept * C)) if case.backward else summed


class Gate:
    """Holds some queries of a race to float64: their scores, what is listed, what is retrieved, and their gradient."""

    def __init__(self, case: Case, x: dict[str, Tensor]):
        self.case, self.x = case, x
        self.judged = torch.linspace(0, case.B - 1, min(JUDGED, case.B)).long()
        self.keys = x["keys"].double()
        self.query = x["query"][self.judged].double()
        self.true = self.query @ self.keys.mT
        size = self.query.abs() @ self.keys.abs().mT
        self.slack = (case.C + 2) * UNIT[torch.float32] * size.amax(1, keepdim=True)  # of a chain of multiply-adds
        top = self.true.topk(min(case.topk + 1, case.M))
        self.right = top.indices[:, : case.topk].sort().values
        # Places that float32 cannot tell apart excuse another list.
        self.clear = top.values[:, -2] - top.values[:, -1] > 2 * self.slack[:, 0] if case.M > case.topk else True
        single = [t[self.judged] for t in runner("eager", case, x)()]
        self.allowed = self.errors(single)

    def values(self, indices: Tensor) -> dict[str, Tensor]:
        """What retrieval of these rows owes."""
        query = self.query.clone().requires_grad_(self.case.backward)
        rows = self.keys[indices]
        scores = (query[:, None] * rows).sum(-1)
        out = ((self.case.scale * scores).softmax(1)[..., None] * rows).sum(1)
        true = {"out": out.detach(), "scores": scores.detach()}
        if self.case.backward:
            grad = self.x["grad_out"][self.judged].double()
            true["query"] = torch.autograd.grad(out, query, grad)[0]
        return true

    def errors(self, judged: list[Tensor]) -> dict[str, float]:
        retrieved, scores, indices, *grads = judged
        true = self.values(indices)
        got = {"out": retrieved, "scores": scores} | ({"query": grads[0]} if grads else {})
        return {name: float((t.detach().double() - true[name]).abs().max()) for name, t in got.items()}

    def recall(self, indices: Tensor) -> float:
        """Share of the right rows that are listed, of the queries whose right rows float32 can tell."""
        hits = (indices[:, :, None] == self.right[:, None]).any(1).double().mean(1)
        return float(torch.where(torch.as_tensor(self.clear), hits, 1.0).mean())

    def check(self, name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        """Raises AssertionError, or returns largest errors and, of what lists rows, the recall."""
        case = self.case
        judged = [t.detach()[self.judged] for t in results]
        if name == "floor":
            error = (judged[0].double() - self.true).abs()
            assert (error <= self.slack).all(), f"{case}: floor: largest error {float(error.max()):.3g}"
            return {"scores": float(error.max())}
        indices = judged[-1] if name.startswith("faiss") else judged[2]
        assert all(len(set(row)) == case.topk for row in indices.tolist()), f"{case}: {name}: a row twice"
        recall = self.recall(indices)
        least = APPROXIMATE_RECALL if name == "hivilt" and case.precision == "bf16" else 1.0
        assert recall >= least, f"{case}: {name}: recall {recall:.4f}, expected {least:g}"
        if name.startswith("faiss"):
            error = (judged[0].double() - self.true.gather(1, indices)).abs()
            assert (error <= self.slack).all(), f"{case}: {name}: largest error {float(error.max()):.3g}"
            return {"scores": float(error.max()), "recall": recall}
        errors = self.errors(judged)
        factor = OUR_FACTOR if name.startswith("hivilt") else RIVAL_FACTOR
        true = self.values(indices)
        for what, error in errors.items():
            # A few units beside eager's error, which may happen to be tiny among so few queries.
            allowed = factor * self.allowed[what] + 4 * UNIT[torch.float32] * float(true[what].abs().max())
            assert error <= allowed, f"{case}: {name}: {what}: largest error {error:.3g}, allowed {allowed:.3g}"
        return errors | {"recall": recall}
