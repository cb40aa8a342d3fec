"""What may come where a tensor should, and what a refusal owes; for the tests of malformed calls of every family."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor

import hivilt


def wrong_kinds(x: Tensor) -> dict[str, object]:
    """Other types, layouts, devices and ranks, and dtypes that no operator takes."""
    bad: dict[str, object] = {"list": x.tolist(), "float": 1.5, "string": "x", "numpy": x.numpy(), "rank + 1": x[None]}
    bad |= {"complex": x.to(torch.complex64), "meta": x.to("meta"), "float8": x.to(torch.float8_e4m3fn)}
    bad |= {"sparse": x.to_sparse(), "nested": torch.nested.nested_tensor([x.float()] * 2, layout=torch.jagged)}
    return bad


def wrong_dtypes(x: Tensor) -> dict[str, object]:
    """Of a tensor of numbers with a fraction: other dtypes, some of them wrong only beside the other arguments."""
    bad: dict[str, object] = {
        "int": x.int(),
        "bool": x > 0,
        "float64 alone": x.double(),
        "bfloat16 alone": x.bfloat16(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bad["quantised"] = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    return bad


def wrong_sizes(x: Tensor, any_size: tuple[int, ...] = ()) -> dict[str, object]:
    """Along every axis but those where any size is legal: one more, one less, none, and 2^40 that take no memory."""
    bad: dict[str, object] = {}
    for dim in set(range(x.dim())) - set(any_size):
        bad[f"dim {dim} + 1"] = torch.cat([x, x.narrow(dim, 0, 1)], dim)
        bad[f"dim {dim} - 1"] = x.narrow(dim, 0, x.shape[dim] - 1)
        bad[f"dim {dim} empty"] = x.narrow(dim, 0, 0)
        shape = [2**40 if i == dim else n for i, n in enumerate(x.shape)]
        bad[f"dim {dim} 2^40"] = x.flatten()[:1].as_strided(shape, [0] * x.dim())
    return bad


def wrong_tensors(x: Tensor, any_size: tuple[int, ...] = ()) -> dict[str, object]:
    """All of these, and lower ranks."""
    return {**wrong_kinds(x), **wrong_dtypes(x), **wrong_sizes(x, any_size), "rank - 1": x[0], "scalar": x.flatten()[0]}


def refusal(op: str, x: dict) -> str:
    """What the public operator ``op`` says to these arguments."""
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(hivilt.ops, op)(**x)
    return str(caught.value)


def said(op: str, names: str, text: str) -> None:
    """A refusal names the operator, one of ``names`` (a pattern), what was expected and what came."""
    assert text.startswith(f"{op}: ") and "expected" in text and "got" in text, text
    assert re.search(rf"\b({names})\b", text[len(op) :].split(": expected")[0]), text
    assert len(text) < 600, "errors print shapes and dtypes, never data"
