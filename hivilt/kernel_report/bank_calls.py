"""The calls of bank retrieval whose kernels are compiled; see ``calls.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..triton_kernels import bank_retrieval_launch
from .fusion_calls import DTYPES, blank


@dataclass(frozen=True)
class Bank:
    """One call of bank_retrieval, forward and backward."""

    queries: int = 256
    rows: int = 100_000
    width: int = 192
    topk: int = 100
    dtype: str = "fp32"  # of keys and values
    query_dtype: str = ""  # "": the same
    precision: str = "exact"
    mask: int = 0  # its dimensions
    count: bool = True
    exclude: bool = False
    values: int = 0  # their width; 0: the keys
    scale: bool = False  # a tensor
    rows_grad: bool = False
    kernel: str = ""

    def __str__(self) -> str:
        words = [f"bank-B{self.queries}-M{self.rows}-C{self.width}-top{self.topk}", self.precision]
        words += [f"q{self.query_dtype}"] if self.query_dtype else []
        words += [f"mask{self.mask}d"] if self.mask else []
        words += [word for word in ("exclude", "scale", "rows_grad") if getattr(self, word)]
        words += [] if self.count else ["whole"]
        return "-".join(words + ([f"E{self.values}"] if self.values else []))

    def run(self) -> None:
        """Makes the call, to be written down by ``launch.recording``."""
        B, M, C, dtype = self.queries, self.rows, self.width, DTYPES[self.dtype]
        query, keys = blank(B, C, dtype=DTYPES[self.query_dtype or self.dtype]), blank(M, C, dtype=dtype)
        values = blank(M, self.values, dtype=dtype) if self.values else None
        mask = blank(*((M,) if self.mask == 1 else (B, M)), dtype=torch.bool) if self.mask else None
        count = blank(1, dtype=torch.int64).reshape(()) if self.count else None
        exclude = blank(B, dtype=torch.int64) if self.exclude else None
        scale = blank(1, dtype=torch.float32).reshape(()) if self.scale else None
        out, scores, indices, key_rows, value_rows = bank_retrieval_launch.bank_retrieval(
            query, keys, values, self.topk, scale, 0.5, count, mask, exclude, None, self.precision, True
        )
        bank_retrieval_launch.bank_retrieval_backward(
            query, torch.empty_like(out), torch.empty_like(scores) if self.scale else None, key_rows,
            value_rows if self.values else None, scores, indices, scale, 0.5, M, self.rows_grad,
        )  # fmt: skip


def bank_calls() -> Iterator[Bank]:
    """The table; what is told apart first comes first."""
    wide = Bank(1024, 100_000, 256)
    for dtype in DTYPES:
        yield Bank(dtype=dtype)
        yield replace(wide, dtype=dtype, rows_grad=True, kernel="" if dtype == "bf16" else "_bank_rows")
        yield replace(wide, dtype=dtype, kernel="_maxima")
    yield Bank(64, 10_000, kernel="_maxima")
    yield from (replace(call, precision="fp32", kernel="_maxima") for call in (Bank(), wide))
    yield from (Bank(queries, kernel="_maxima") for queries in (1, 2, 8, 16, 32))
    # Larger groups; smaller ones; a bank of which every row is scored.
    yield from (Bank(rows=rows, topk=topk, kernel="_maxima") for rows, topk in ((1_000_000, 10), (10_000, 200)))
    yield Bank(rows=2_000, kernel="_search_all")
    yield Bank(topk=1000, kernel="_candidates")
    for width in (64, 100, 768):
        yield Bank(width=width, kernel="_maxima")
        yield Bank(width=width, precision="fp32", kernel="_maxima")
    yield Bank(dtype="bf16", query_dtype="fp32", kernel="_candidate")
    given = replace(Bank(), mask=2, exclude=True, scale=True, values=64, rows_grad=True)
    yield given
    yield from (replace(given, queries=queries, kernel="_maxima") for queries in (1, 4))
    yield replace(given, queries=1024, width=256, dtype="bf16", kernel="_maxima")
    yield replace(given, mask=1, count=False, kernel="_maxima")
