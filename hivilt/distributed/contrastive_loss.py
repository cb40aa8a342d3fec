"""The contrastive loss of a batch that is spread over the ranks of a process group.

Each rank multiplies its own rows of x with every row of y, once: that gives its row log-sum-exps, and a part of every
column's, which the ranks join.  Backward gives the gradient of its x, and parts of the gradient of every y, which
travel to their ranks and are added in rank order.  No matrix of B x B/W logits exists anywhere.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops._checks import refuse
from ..ops._contrastive_loss_rows import BACKWARD, CONTRASTIVE_LOSS
from ..ops._running import run
from ..ops.contrastive_loss import KINDS, ONE_THREAD, _bind_contrastive_loss, total
from .exchange import Exchange
from .handshake import DTYPES, ERRORS, bits

OP = "contrastive_loss"
PROTOCOL = 0x4856_4250_0101
# What a rank has of its own, then what must be the same on every rank.
OWN = ("status", "rows")
SHARED = ("protocol", "channels", "queries", "dtype", "kind", "symmetric", "records", "scale", "bias")
FIELDS = OWN + SHARED
WORDS = 48  # of 8 bytes; what the fields leave holds the text of a refusal


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    symmetric: bool = True,
    labels: Tensor | None = None,
    kind: str = "infonce",
    group: Any,
    backend: str | None = None,
) -> Tensor:
    """See hivilt.losses.contrastive_loss."""
    if not isinstance(group, dist.ProcessGroup):
        refuse(TypeError, OP, "group", "a torch.distributed process group this rank belongs to, or None", group)
    exchange = Exchange(group, None, OP)
    with exchange.call("forward"):
        refusal, args, columns = None, None, False
        try:
            if labels is not None:
                refuse(ValueError, OP, "labels", "None with a group", labels)
            args, columns = _bind_contrastive_loss(x, y, logit_scale, logit_bias, symmetric, None, kind, backend)
        except (TypeError, ValueError) as error:
            refusal = error
        device = x.device if isinstance(x, Tensor) and not x.is_meta else torch.device("cpu")
        rows = _agree(exchange, {} if args is None else _header(args), refusal, device)
        call = Call(exchange, rows, args[3], args[5], columns, kind, backend)
        return GroupLoss.apply(args[0], args[1], args[2], args[4], call)


@dataclass
class Call:
    """What a call keeps beside its tensors."""

    exchange: Exchange
    rows: list[int]  # of every rank
    factor: float
    offset: float
    columns: bool
    kind: str
    backend: str | None


class GroupLoss(Function):
    """(x [b, R, C], y [b, C], scale, bias, call) -> the loss of all ranks' rows."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, call):
        exchange = call.exchange
        first, images = sum(call.rows[: exchange.rank]), sum(call.rows)
        every = exchange.all_gather_rows(y.contiguous(), call.rows, "y")
        labels = torch.arange(first, first + x.shape[0], device=x.device)
        args = (x, every, scale, call.factor, bias, call.offset, labels, call.columns, call.kind)
        row_lse, column_lse, target = run(CONTRASTIVE_LOSS, call.backend, args)
        mine = torch.stack([total(row_lse), total(target)])
        sums = exchange.all_gather(mine, "sums")
        rows, own = (sum(part) for part in sums.unbind(1))  # in rank order
        loss = rows - own
        if call.columns:
            column_lse = _join(exchange.all_gather(column_lse, "columns"))
            loss = (loss + (total(column_lse) - own)) / 2
        exchange.turn_back()
        ctx.call = call
        ctx.save_for_backward(x, every, scale, bias, labels, row_lse, column_lse)
        return (loss / images).to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        call, needs = ctx.call, ctx.needs_input_grad
        x, every, scale, bias, labels, row_lse, column_lse = ctx.saved_tensors
        exchange = call.exchange
        # Times the number of ranks, by which DistributedDataParallel divides.
        share = grad.double() * (exchange.size / sum(call.rows))
        half = share / 2 if call.columns else share
        of_rows = half.expand(x.shape[0])
        of_columns = half.expand(every.shape[0]) if call.columns else None
        of_target = None if call.kind == "siglip" else -share.expand(x.shape[0])
        args = (x, every, scale, call.factor, bias, call.offset, labels, call.kind, row_lse, column_lse, of_rows,
                of_columns, of_target, needs[0], needs[1])  # fmt: skip
        of_x, of_y, of_scale, of_bias = run(BACKWARD, call.backend, args)
        if call.kind == "infonce":
            # Of all ranks together it is 0; the operator's share of it counts every column as whole.
            of_bias = 0.0 * of_bias
        if needs[1]:
            mine = call.rows[exchange.rank]
            with exchange.call("backward"):
                exchange.set_out()
                parts = exchange.all_to_all(of_y, call.rows, [mine] * exchange.size, "gradient of y")
                exchange.turn_back()
            wide = torch.promote_types(of_y.dtype, torch.float32)
            of_y = sum(part.to(wide) for part in parts.view(exchange.size, mine, -1)).to(of_y.dtype)
        return (of_x if needs[0] else None, of_y if needs[1] else None, of_scale if needs[2] else None,
                of_bias if needs[3] else None, None)  # fmt: skip


def _join(parts: Tensor) -> Tensor:
    """The log-sum-exp over ranks of [W, N], in slices that torch does not share among threads."""
    return torch.cat([part.logsumexp(0) for part in parts.split(ONE_THREAD, 1)])


def _header(args: tuple) -> dict[str, int]:
    x, y, scale, factor, bias, offset, _, columns, kind = args
    wants = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (x, y, scale, bias)]
    return {
        "rows": x.shape[0],
        "channels": x.shape[2],
        "queries": x.shape[1],
        "dtype": DTYPES.index(x.dtype),
        "kind": KINDS.index(kind),
        "symmetric": int(columns),
        "records": sum(bit << i for i, bit in enumerate(wants)),
        "scale": bits(factor if scale is None else float(scale.detach())),
        "bias": bits(offset if bias is None else float(bias.detach())),
    }


def _agree(exchange: Exchange, header: dict[str, int], refusal: Exception | None, device: torch.device) -> list[int]:
    """The rows of every rank.  Raises on every rank alike: the refusal of the lowest rank that has one, or what
    differs."""
    header = {**header, "protocol": PROTOCOL}
    if exchange.size == 1:
        if refusal is not None:
            raise refusal
        return [header["rows"]]
    text = b""
    if refusal is not None:
        header["status"] = ERRORS.index(TypeError if isinstance(refusal, TypeError) else ValueError)
        text = str(refusal).encode()[: 8 * (WORDS - len(FIELDS))]
    packed = struct.pack(f"<{len(FIELDS)}q", *(header.get(name, 0) for name in FIELDS)) + text
    words = torch.frombuffer(bytearray(packed.ljust(8 * WORDS, b"\0")), dtype=torch.int64).to(device)
    every = exchange.all_gather(words, "header").cpu()
    found = [dict(zip(FIELDS, row, strict=True)) for row in every[:, : len(FIELDS)].tolist()]
    for rank, other in enumerate(found):
        if other["protocol"] == PROTOCOL and other["status"]:
            said = every[rank, len(FIELDS) :].numpy().tobytes().rstrip(b"\0").decode(errors="replace")
            raise ERRORS[other["status"]](f"{said} (on rank {rank})")
    for name in SHARED:
        for rank, other in enumerate(found):
            if other[name] != found[0][name]:
                raise ValueError(
                    f"{OP}: {name}: expected the same on every rank; got {_said(name, found[0][name])} on rank 0 and "
                    f"{_said(name, other[name])} on rank {rank}"
                )
    exchange.set_out()
    return [other["rows"] for other in found]


def _said(name: str, value: int) -> str:
    if name == "dtype":
        return str(DTYPES[value])[6:]
    if name == "kind":
        return KINDS[value]
    if name in ("scale", "bias"):
        return repr(struct.unpack("<d", struct.pack("<q", value))[0])
    return str(value)
