"""The calls whose kernels are compiled: every path through the launch functions, at sizes that people use, on tensors
without memory.  A call that only one kernel sees differently names it, so that the others are not compiled again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..triton_kernels import topk_attention_backward_launch as backward
from ..triton_kernels import topk_attention_launch as topk_attention
from ..triton_kernels.topk_attention_plan import Packed
from .bank_calls import Bank, bank_calls
from .contrastive_calls import Contrast, contrastive_calls
from .fusion_calls import DTYPES, Fusion, Interpolation, Pool, fusion_calls


@dataclass(frozen=True)
class Call:
    """One call of family A, forward and backward."""

    queries: int
    keys: int
    topk: int  # -1: all pairs
    width: int = 64
    dtype: str = "bf16"
    batch: int = 8
    heads: int = 12
    groups: int = 12
    axis: int = 0
    channels: int = 0  # of a selection that all heads share; 0: each head its own
    mask: str = ""  # "", "bool" or "bias"
    mask_shape: tuple[int, ...] = ()  # (): [B, H, Q, N]
    token_masks: bool = False
    dropout: bool = False
    packed: bool = False
    lists: bool = False  # topk_select and selected_attention in place of topk_attention
    kernel: str = ""  # only kernels with this in their name

    def __str__(self) -> str:
        kept = "dense" if self.topk < 0 else f"top{self.topk}"
        words = [f"B{self.batch}-H{self.heads}-Q{self.queries}-N{self.keys}-D{self.width}-{kept}"]
        words += [f"G{self.groups}"] if self.groups != self.heads else []
        words += ["queries"] if self.axis else []
        words += [f"C{self.channels}"] if self.channels else []
        words += [self.mask + "x".join(map(str, self.mask_shape))] if self.mask else []
        words += [word for word in ("token_masks", "dropout", "packed", "lists") if getattr(self, word)]
        return "-".join(words)

    def run(self) -> None:
        """Makes the call, to be written down by ``launch.recording``."""
        dtype = DTYPES[self.dtype]

        def blank(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        B, H, G, Q, N, D = self.batch, self.heads, self.groups, self.queries, self.keys, self.width
        packed = None
        if self.packed:
            starts = blank(B + 1, dtype=torch.int32)
            packed = Packed(starts, starts, Q, N)
            B, Q, N = 1, B * Q, B * N
        # Token-major memory, as the projections of nn.MultiheadAttention leave it.
        query, key, value = (blank(B, T, n, D).transpose(1, 2) for T, n in ((Q, H), (N, G), (N, G)))
        mask = None
        if self.mask:
            mask = blank(*(self.mask_shape or (B, H, Q, N)), dtype=torch.bool if self.mask == "bool" else torch.float32)
        key_mask, query_mask = (blank(B, T, dtype=torch.bool) if self.token_masks else None for T in (N, Q))
        source = (blank(B, Q, self.channels), blank(B, N, self.channels)) if self.channels else (None, None)
        seed, p = (blank(1, dtype=torch.int64), 0.1) if self.dropout else (None, 0.0)
        masks, scale, axis = (mask, key_mask, query_mask), D**-0.5, self.axis

        if self.lists:
            indices = topk_attention.topk_select(query, key, self.topk, axis, *masks, *source, packed, scale)
            out, lse = topk_attention.selected_attention(query, key, value, indices, axis, mask, packed, seed, scale, p)
        else:
            out, lse, indices = topk_attention.topk_attention(
                query, key, value, self.topk, axis, *masks, *source, packed, seed, scale, p
            )
        grad_lse = torch.empty_like(lse) if self.lists else None
        backward.topk_attention_backward(
            torch.empty_like(out), grad_lse, query, key, value, out, lse, indices, axis, *masks, packed, seed, scale, p,
            True, self.mask == "bias",
        )  # fmt: skip


FINE = Call(1024, 512, 32)  # a fine image against a long text
SHORT = Call(196, 128, 16)
LONG = Call(4096, 4096, 64, batch=2)
DENSE = replace(FINE, topk=-1)
KINDS = (FINE, LONG, DENSE)


def calls() -> Iterator[Call | Fusion | Interpolation | Pool | Bank | Contrast]:
    """The table; what is told apart first comes first."""
    for dtype in DTYPES:
        yield from (replace(call, dtype=dtype) for call in (FINE, SHORT, LONG, DENSE))
    for width in (32, 80, 128, 256):
        yield from (replace(call, width=width) for call in KINDS)
    for width in (128, 256):
        yield from (replace(call, width=width, dtype="fp32") for call in KINDS)
        yield from (replace(call, width=width, dtype="fp16") for call in (FINE, DENSE))

    # Rows of other lengths that fit into one tile; longer lists; odd sizes.
    for width in (64, 128, 256):
        yield from (replace(FINE, keys=keys, width=width, kernel="_topk_attention") for keys in (256, 1024))
        yield replace(FINE, keys=256, width=width, dtype="fp32", kernel="_topk_attention")
    yield replace(FINE, keys=1024, topk=256, kernel="_topk_attention")
    yield from (replace(LONG, topk=topk, kernel="select") for topk in (512, 900))
    yield Call(1000, 1000, 10, batch=3)

    # Few queries: several programs share a row.
    yield Call(1, 4096, 32, batch=1)
    yield from (Call(16, 16384, 64, batch=1, dtype=dtype) for dtype in ("bf16", "fp32"))

    for axis, channels in ((1, 0), (0, 768), (1, 768)):
        yield from (replace(call, axis=axis, channels=channels) for call in (FINE, LONG))
    yield replace(FINE, channels=768, dtype="fp32")
    yield from (replace(call, lists=True) for call in (FINE, LONG))

    for call in KINDS:
        yield replace(call, mask="bool", token_masks=True)
        yield replace(call, mask="bias", dropout=True)
        yield replace(call, dropout=True)
        yield replace(call, packed=True, groups=4)
    # The most registers: all that a call can have at once; and masks alone, with which attention keeps its tiles.
    for width in (64, 128, 256):
        for dtype in DTYPES:
            for call in KINDS:
                masked = replace(call, width=width, dtype=dtype, mask="bool", token_masks=True)
                for kernel in ("_attention", "_query_gradient", "_key_gradient", "_stream", "_gather_forward"):
                    yield replace(masked, mask="bias", dropout=True, kernel=kernel)
                for kernel in ("_attention_forward", "_query_gradient", "_key_gradient"):
                    yield replace(masked, kernel=kernel)
    for shape in ((), (1, 12, 1024, 512), (8, 1, 1, 512), (1, 12, 1024, 1), (1, 1, 1, 1)):
        yield replace(FINE, mask="bias", mask_shape=shape, kernel="_bias_gradient")
    for dtype, width in (("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128), ("fp32", 256)):
        yield replace(DENSE, mask="bias", dtype=dtype, width=width, kernel="_bias_gradient")

    yield from fusion_calls()
    yield from bank_calls()
    yield from contrastive_calls()
