"""The ways to a contrastive loss and its gradients that are raced against each other.

eager     plain PyTorch: logits, two cross entropies           compile   torch.compile of it
chunked   rows of logits a chunk at a time, each chunk checkpointed: what saves memory without a kernel; the column
          direction needs the transposed product
hivilt    hivilt.ops.contrastive_loss on this device's fastest backend
gemm      the matrix product of the logits alone, into memory that is there
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from device import LIKE_GPU, REHEARSED
from roofline import Cost
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hivilt
from hivilt.testing import UNIT

MAY_REFUSE = {"compile"}  # see rivals.MAY_REFUSE
DIRECTIONS = ("forward", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAVES = ("x", "y", "logit_scale")
OUR_FACTOR = {"fp32": 2, "bf16": 1}  # times the error of eager
RIVAL_FACTOR = 4
CHUNK = 512  # rows


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call, fully determined."""

    B: int
    C: int
    direction: str = "forward+backward"
    dtype: str = "fp32"
    device: str = "cpu"

    operation = "contrastive_loss"

    def __str__(self) -> str:
        return f"B{self.B}-C{self.C}-{self.dtype}-{self.device}"

    @property
    def backward(self) -> bool:
        return self.direction == "forward+backward"

    def smallest(self) -> Case:
        return replace(self, B=8, C=8)


def draw(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    y = torch.randn(case.B, case.C, generator=g)
    x = 0.3 * y + torch.randn(case.B, case.C, generator=g)
    x, y = (F.normalize(v, dim=1).to(case.device, DTYPES[case.dtype]) for v in (x, y))
    return {"x": x, "y": y, "logit_scale": torch.tensor(20.0, device=case.device)}


def hivilt_backend(device: str) -> str | None:
    """The backend with kernels for this device; None where only the reference would run."""
    names = ("cpu",) if device == "cpu" and not LIKE_GPU else ("cuda", "triton")
    x = torch.zeros(2, 8, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        verdicts = hivilt.explain("contrastive_loss", x, x, 1.0)
    return next((name for name in names if verdicts[name] is None), None)


def plain(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale.to(x.dtype) * x @ y.mT
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2


def direction_of(x: Tensor, y: Tensor, logit_scale: Tensor, first: int) -> Tensor:
    labels = torch.arange(first, first + len(x), device=x.device)
    return F.cross_entropy(logit_scale.to(x.dtype) * x @ y.mT, labels, reduction="sum")


def chunked(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    total = 0.0
    for a, b in ((x, y), (y, x)):
        for first in range(0, len(a), CHUNK):
            total = total + checkpoint(
                direction_of, a[first : first + CHUNK], b, logit_scale, first, use_reentrant=False
            )
    return total / (2 * len(x))


def compiled(case: Case) -> Callable:
    torch._dynamo.reset()
    return torch.compile(plain, fullgraph=True, dynamic=False, backend="eager" if REHEARSED else "inductor")


def ours(case: Case) -> Callable:
    return functools.partial(hivilt.ops.contrastive_loss, backend=hivilt_backend(case.device))


RIVALS = {"eager": lambda case: plain, "chunked": lambda case: chunked, "compile": compiled, "hivilt": ours}


def runner(name: str, case: Case, x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed: () -> (loss,), with backward also the gradients of x, y and the scale."""
    if name == "gemm":
        out = torch.zeros(case.B, case.B, dtype=x["x"].dtype, device=case.device)
        return lambda: (torch.mm(x["x"], x["y"].mT, out=out),)
    forward = RIVALS[name](case)
    leaves = [x[n].detach().requires_grad_(case.backward) for n in LEAVES]

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(case.backward):
            loss = forward(*leaves)
            return (loss, *torch.autograd.grad(loss, leaves)) if case.backward else (loss,)

    return run


def case_cost(name: str, case: Case) -> Cost:
    """Inputs and gradients once; the product of the logits, in backward again, and one for each side's gradient."""
    size = DTYPES[case.dtype].itemsize
    product = 2 * case.B * case.B * case.C
    sides = 2 * case.B * case.C * size
    if name == "gemm":
        return Cost(product, sides + case.B * case.B * size)
    return Cost((4 if name == "hivilt" else 3) * product, 3 * sides) if case.backward else Cost(product, sides)


class Gate:
    """Loss and gradients in float64, and the error that plain PyTorch makes."""

    def __init__(self, case: Case, x: dict[str, Tensor]):
        self.case = case
        wide = {n: v.double() for n, v in x.items()}
        product = runner("gemm", case, wide)()[0]
        self.product = product
        self.true = [v.detach() for v in runner("eager", case, wide)()]
        self.allowed = self.errors(runner("eager", case, x)())

    def errors(self, results: tuple[Tensor, ...]) -> list[float]:
        return [float((a.detach().double() - b).abs().max()) for a, b in zip(results, self.true, strict=True)]

    def check(self, name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        """Raises AssertionError, or returns the largest errors."""
        case, unit = self.case, UNIT[DTYPES[self.case.dtype]]
        if name == "gemm":
            error = float((results[0].double() - self.product).abs().max())
            assert error <= 4 * unit * case.C**0.5, f"{case}: gemm: largest error {error:.3g}"
            return {"scores": error}
        factor = OUR_FACTOR[case.dtype] if name == "hivilt" else RIVAL_FACTOR
        found = {}
        for what, error, eager, true in zip(
            ("loss", *LEAVES), self.errors(results), self.allowed, self.true, strict=False
        ):
            # A few units beside eager's error, which may happen to be tiny in a single number.
            allowed = factor * eager + 4 * unit * float(true.abs().max())
            assert error <= allowed, f"{case}: {name}: {what}: largest error {error:.3g}, allowed {allowed:.3g}"
            found[what] = error
        return found
