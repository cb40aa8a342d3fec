"""No time without a right result: each rival's output and gradients, in one head, against the float64 oracle.

hivilt is held to the budgets of its tests, through its own indices.  The others must merely compute the same thing.
"""

from __future__ import annotations

import torch
from rivals import Case, hivilt_backend, judged
from torch import Tensor

import hivilt
from hivilt.testing import Truth, assert_topk, assert_within, oracle

VALUES = ("out", "query", "key", "value")
RIVAL_BUDGET = 16  # units of error a rival is granted, where hivilt has 1 to 4


class Gate:
    """The truth about one case; ``check(name, results)`` raises AssertionError or returns the largest errors."""

    def __init__(self, case: Case, x: dict[str, Tensor]):
        self.case, self.x = case, x
        self.head = {name: t.cpu() for name, t in judged(x).items()}
        self.truths: dict[str, Truth] = {}

    def truth(self, kind: str, indices: Tensor | None = None) -> Truth:
        if kind not in self.truths:
            topk = None if kind == "sdpa" else self.case.topk
            selection = {} if topk is None else {k: t for k, t in self.head.items() if k.startswith("select")}
            self.truths[kind] = oracle(
                self.head["query"], self.head["key"], self.head["value"], topk, axis=self.case.axis, indices=indices,
                grad_out=self.head.get("grad_out"), **selection,
            )  # fmt: skip
        return self.truths[kind]

    def check(self, name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        results = [t.detach()[-1:, -1:].cpu() for t in results]
        if name == "floor":
            product = self.head["query"].double() @ self.head["key"].double().mT
            error = (results[0].double() - product).abs().max()
            assert error <= 1e-2 * product.abs().max(), f"floor: largest error {error:.3g}"
            return {"scores": float(error)}
        dtype = results[0].dtype
        ours = name == "hivilt"
        if ours and self.case.topk is not None:
            truth = self.truth("hivilt", self.our_indices())
        else:
            truth = self.truth("sdpa" if name == "sdpa" else "all")
        errors = {}
        for what, got in zip(VALUES, results, strict=False):
            budget = truth.budget(what, dtype, None if ours else RIVAL_BUDGET)
            assert_within(got, truth.values[what], budget, f"{self.case}: {name}: {what}")
            errors[what] = float((got.double() - truth.values[what]).abs().max())
        return errors

    def our_indices(self) -> Tensor:
        """Those of the judged head, themselves judged."""
        case, x = self.case, self.x
        selection = {name: t for name, t in x.items() if name.startswith("select")}
        with torch.no_grad():
            _, indices = hivilt.ops.topk_attention(
                x["query"], x["key"], x["value"], case.topk, axis=case.axis, return_indices=True,
                backend=hivilt_backend(case.device), **selection,
            )  # fmt: skip
        indices, head = indices[-1:, -1:].cpu(), self.head
        selection = {name: head[name] for name in selection}
        assert_topk(indices, head["query"], head["key"], case.topk, axis=case.axis, **selection, repro=str(case))
        return indices
