"""Malformed calls of the losses: ValueError or TypeError naming operation and argument; nothing written."""

import functools
import re

import plain_contrastive_loss as plain
import pytest
import torch
from test_scale_fusion_errors import wrong_tensors

import hivilt

pytestmark = pytest.mark.operation("contrastive_loss")
op = hivilt.ops.contrastive_loss
GOOD = {
    "clip": plain.call(5, 6, bias=True),
    "queries": plain.call(5, 6, 2),
    "labels": plain.call(5, 6, N=7, symmetric=False),
    "siglip": plain.call(5, 6, kind="siglip"),
}
NUMBER = [None, "1", True, [1.0], float("nan"), float("inf"), torch.ones(2), torch.ones(0),
          torch.ones((), dtype=torch.int64), torch.ones((), device="meta"), 1j]  # fmt: skip
VALUES = {
    "logit_scale": NUMBER, "logit_bias": NUMBER[1:], "kind": [None, "clip", "InfoNCE", 3, ("infonce",)],
    "symmetric": [None, 1, "yes", torch.tensor(True)], "backend": ["nope", "", 3, True], "x": [None, [[1.0]]],
    "y": [None, torch.ones(4, 6), torch.ones(6, 6)], "labels": [torch.arange(5)],
}  # fmt: skip
LABELS = [torch.arange(4), torch.arange(6), torch.arange(5.0), torch.arange(5)[None], [0, 1, 2, 3, 4],
          torch.arange(5).to("meta"), torch.tensor([0, 1, 2, 3, 7]), torch.tensor([-1, 1, 2, 3, 4]),
          torch.tensor([0, 1, 2, 3, -100]), 3, torch.ones(5) > 0]  # fmt: skip


@functools.cache
def calls() -> dict[str, tuple[str, dict]]:
    found = {}
    for argument, wrong in VALUES.items():
        found |= {f"{argument}: value {i}": (argument, GOOD["clip"] | {argument: w}) for i, w in enumerate(wrong)}
    found |= {f"labels: value {i}": ("labels", GOOD["labels"] | {"labels": w}) for i, w in enumerate(LABELS)}
    for argument, base in (("x", "clip"), ("y", "clip"), ("x", "queries"), ("y", "labels")):
        any_size = {("x", "queries"): (1,), ("y", "labels"): (0,)}.get((argument, base), ())
        for what, wrong in wrong_tensors(GOOD[base][argument], any_size).items():
            if (argument, base, what) not in FINE:
                found[f"{base}: {argument}: {what}"] = (argument, GOOD[base] | {argument: wrong})
    for name, change in {"x": GOOD["queries"]["x"], "labels": torch.arange(5), "symmetric": False}.items():
        found[f"siglip: {name}"] = (name, GOOD["siglip"] | {name: change})
    return found


# Of three dimensions x may be [1, B, C]: then y has the wrong number of rows, and is named.
FINE = {("x", "queries", "rank - 1")}
CALLS = calls()
PARTNERS = {"x": "x|y|labels", "y": "y|x", "kind": "kind|x"}


@pytest.mark.parametrize("call", CALLS)
def test_malformed(where, call):
    backend, device = where
    if device != "cpu":
        pytest.skip("the checks are the same for every device")
    name, x = CALLS[call]
    with pytest.raises((ValueError, TypeError)) as caught:
        op(**{"backend": backend} | x)
    text = str(caught.value)
    assert text.startswith("contrastive_loss: ") and "expected" in text and "got" in text, text
    assert re.search(rf"\b({PARTNERS.get(name, name)})\b", text[18:].split(": expected")[0]), text
    assert len(text) < 600, "errors print shapes and dtypes, never data"


def test_no_rows(where):
    backend, _ = where
    for x, y in ((torch.ones(0, 4), torch.ones(0, 4)), (torch.ones(2, 0, 4), torch.ones(2, 4))):
        with pytest.raises(ValueError, match=r"contrastive_loss: x: expected at least one"):
            op(x, y, 1.0, backend=backend)


def test_good_calls_are_good(where):
    backend, device = where
    for x in GOOD.values():
        x = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in x.items()}
        assert op(**x, backend=backend).isfinite()
    labels = GOOD["labels"]["labels"].int().to(device)
    assert (
        op(**GOOD["labels"] | {n: GOOD["labels"][n].to(device) for n in "xy"} | {"labels": labels}, backend=backend) > 0
    )


def test_refusal_and_explanation(ask, capsys):
    for name in ("cpu", "triton", "cuda"):
        if ask(name, "cpu", "contrastive_loss") is not None:
            with pytest.raises(hivilt.BackendError, match=f"contrastive_loss: backend '{name}'"):
                op(**GOOD["clip"], backend=name)
    assert hivilt.explain("contrastive_loss", **GOOD["clip"])["reference"] is None
    assert "contrastive_loss" in capsys.readouterr().out
