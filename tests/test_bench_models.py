"""The races of whole models: rivals agree with float64, and a wrong result is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # as bench/conftest.py does
pytest.importorskip("pytest_benchmark")

import model_rivals

CASES = [
    model_rivals.HiViT(B=2, image=32, patch=4, C=16, heads=2, layers=1, direction="training step"),
    model_rivals.HiViLT(B=2, image=16, patch=4, words=6, C=16, heads=2, layers=1, topk=3, direction="training step"),
    model_rivals.HiViLT(B=2, image=16, patch=4, words=6, C=16, heads=2, layers=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rivals_agree_and_a_wrong_result_is_refused(case):
    x = model_rivals.draw(case)
    gate = model_rivals.Gate(case, x)
    for name in ("eager", "hivilt"):
        results = model_rivals.runner(name, case, x)()
        errors = gate.check(name, results)
        assert list(errors) == ["out", "grads"][: 1 + case.training] and 0 < errors["out"] < 1e-5
        for wrong in (0, len(results) // 2)[: 1 + case.training]:
            planted = [None if t is None else t.detach().clone() for t in results]
            planted[wrong].view(-1)[0] += 0.01 * planted[wrong].abs().max()
            with pytest.raises(AssertionError, match=name):
                gate.check(name, planted)


def test_costs_grow_with_the_work():
    case = CASES[0]
    step, forward = (
        model_rivals.case_cost("eager", replace(case, direction=d)) for d in ("training step", "inference")
    )
    assert step.flops == 3 * forward.flops > 0 and step.bytes > forward.bytes
    assert model_rivals.case_cost("eager", case.smallest()).flops < step.flops
