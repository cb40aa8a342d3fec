"""Malformed calls of token_pool: ValueError or TypeError naming operation and argument; nothing written."""

import functools

import plain_token_pool as plain
import pytest
import torch
from malformed import refusal, said, wrong_tensors

import hivilt

pytestmark = pytest.mark.operation("token_pool")
op = hivilt.ops.token_pool


def good() -> dict:
    return plain.call(2, 9, 6, 4, masked=True)


VALUES = {
    "pools": ["mean", "", (), None, 3, ("mean", "mean", "max"), ("sum",), ("mean", "max", "Attention"), (0, 1, 2),
              ("mean", "max"), ("mean",), {"mean", "max", "attention"}, (None,), ("mean", "max", "attention", "max"),
              ("mean", "max", torch.zeros(3).numpy())],
    "mask": [1, "x", [[True]], torch.ones(2, 9), torch.ones(2, 9, dtype=torch.uint8), torch.ones(2, 8) > 0,
             torch.ones(9) > 0, torch.ones(2, 9, 1) > 0, torch.ones(1, 9) > 0, (torch.ones(2, 9) > 0).to("meta")],
    "backend": ["nope", "", 3, True], "features": [None], "proj_weight": [None], "score_weight": [None],
    "pool_weights": [None, (1.0, 1.0, 1.0), torch.ones(2), torch.ones(4), torch.ones(3, 1), torch.ones(3).bfloat16()],
}  # fmt: skip
PARTNERS = {
    "features": "features|proj_weight|mask",
    "proj_weight": "proj_weight|score_weight|proj_bias",
    "pools": "pools|pool_weights|proj_weight|score_weight|proj_bias|score_bias",
}


@functools.cache
def calls() -> dict[str, tuple[str, object]]:
    found = {f"{n}: value {i}": (n, wrong) for n, values in VALUES.items() for i, wrong in enumerate(values)}
    for name, value in plain.leaves(good()).items():
        for what, wrong in wrong_tensors(value).items():
            if not (name == "pool_weights" and what == "float64 alone" and value.dtype == torch.float64):
                found[f"{name}: {what}"] = (name, wrong)
    return found


CALLS = calls()


@pytest.mark.parametrize("call", CALLS)
def test_malformed(where, call):
    backend, device = where
    if device != "cpu":
        pytest.skip("the checks are the same for every device")
    name, wrong = CALLS[call]
    x = good()
    said("token_pool", PARTNERS.get(name, name), refusal("token_pool", x | {"backend": backend} | {name: wrong}))


def test_weights_without_attention():
    """Parameters that no pool uses are refused, not ignored."""
    x = good()
    for name in ("proj_weight", "proj_bias", "score_weight", "score_bias"):
        y = x | {n: None for n in plain.PARAMETERS[:4] if n != name}
        with pytest.raises(ValueError, match=rf"token_pool: {name}: expected None"):
            op(**y | {"pools": ("mean", "max"), "pool_weights": torch.ones(2)})


def test_good_calls_are_good(where):
    backend, device = where
    x = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in good().items()}
    assert op(**x, backend=backend).isfinite().all()
    assert op(**x | {"pools": list(plain.POOLS)}, backend=backend).isfinite().all()


def test_refusal_and_explanation(ask, capsys):
    for name in ("cpu", "triton", "cuda"):
        if ask(name, "cpu", "token_pool") is not None:
            with pytest.raises(hivilt.BackendError, match=f"token_pool: backend '{name}'"):
                op(**good(), backend=name)
    assert hivilt.explain("token_pool", **good())["reference"] is None
    assert "token_pool" in capsys.readouterr().out
