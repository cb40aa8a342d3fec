"""No time without a right result: each rival's output and gradients, in one head, against the float64 oracle.

hivilt is held to the budgets of its tests, through its own indices.  The others must merely compute the same thing; in
half types, where plain PyTorch rounds the scores by which it selects, they too are judged through what they select.
"""

from __future__ import annotations

import torch
from rivals import DENSE, DTYPES, Case, hivilt_backend, judged, top_lists
from torch import Tensor

import hivilt
from hivilt.testing import UNIT, Truth, assert_topk, assert_within, oracle, pairs_from_indices

VALUES = ("out", "query", "key", "value")
RIVAL_BUDGET = 16  # units of error a rival is granted, where hivilt has 1 to 4


class Gate:
    """The truth about one case; ``check(name, results)`` raises AssertionError or returns the largest errors."""

    def __init__(self, case: Case, x: dict[str, Tensor]):
        self.case, self.x = case, x
        self.head = judged(x)
        self.truths: dict[str, Truth] = {}

    def truth(self, kind: str, indices: Tensor | None = None) -> Truth:
        if kind not in self.truths:
            topk = None if kind == "dense" else self.case.topk
            selection = {} if topk is None else {k: t for k, t in self.head.items() if k.startswith("select")}
            self.truths[kind] = oracle(
                self.head["query"], self.head["key"], self.head["value"], topk, axis=self.case.axis, indices=indices,
                grad_out=self.head.get("grad_out"), **selection,
            )  # fmt: skip
        return self.truths[kind]

    def check(self, name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        results = [t.detach()[-1:, -1:] for t in results]
        if name == "floor":
            product = self.head["query"].double() @ self.head["key"].double().mT
            error = (results[0].double() - product).abs().max()
            assert error <= 1e-2 * product.abs().max(), f"floor: largest error {error:.3g}"
            return {"scores": float(error)}
        dtype = results[0].dtype
        ours, selects = name == "hivilt", self.case.topk is not None and name not in DENSE
        if ours and selects:
            truth = self.truth("hivilt", self.our_indices())
        elif selects and self.case.dtype != "fp32" and name != "flex":
            truth = self.truth("rounded", self.rounded_indices())
        else:
            truth = self.truth("all" if selects else "dense")
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
        indices, head = indices[-1:, -1:], self.head
        selection = {name: head[name] for name in selection}
        assert_topk(indices, head["query"], head["key"], case.topk, axis=case.axis, **selection, repro=str(case))
        return indices

    def rounded_indices(self) -> Tensor:
        """What plain PyTorch keeps in the judged head: the best, as far as scores rounded to a half type can tell."""
        case, head = self.case, self.head
        with torch.no_grad():
            indices = top_lists(case, self.x)[-1:, -1:]
        a, b = ("select_query", "select_key") if case.shared else ("query", "key")
        scores = (head[a].double() @ head[b].double().mT).reshape(case.Q, case.N)
        kept = pairs_from_indices(indices, case.Q, case.N, 1, case.axis)[0, 0]
        if case.axis == "queries":
            scores, kept = scores.mT, kept.mT
        worst = scores.masked_fill(~kept, float("inf")).amin(1)
        slack = 4 * UNIT[DTYPES[case.dtype]] * scores.abs().amax(1)
        late = worst < scores.topk(case.topk).values[:, -1] - slack
        assert not late.any(), f"{case}: plain PyTorch keeps scores far below the best in {int(late.sum())} rows"
        return indices
