"""Contrastive losses of image-text pairs, without the matrix of all pairs in memory.

The public function ``contrastive_loss``: checks, calls, and the mean.  Meaning: hivilt/reference/contrastive_loss.py;
why: docs/contrastive_loss.md.  hivilt.losses has it too, with a process group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends
from ._checks import INT32_MAX, Said, autocast, check_flag, check_number, check_tensor, refuse
from ._contrastive_loss_autograd import ContrastiveLoss
from ._contrastive_loss_rows import CONTRASTIVE_LOSS
from ._running import eager, record, records, run

KINDS = ("infonce", "siglip")
# torch shares longer sums among its threads, and their order then depends on how many there are.
ONE_THREAD = 1 << 14


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    symmetric: bool = True,
    labels: Tensor | None = None,
    kind: str = "infonce",
    backend: str | None = None,
) -> Tensor:
    """The contrastive loss of pairs x_i, y_i: CLIP's, one direction of it, or SigLIP's.

    Logits are logit_scale <x_i, y_j> + logit_bias, with x [B, R, C] of the largest product over the R queries of an
    image.  "infonce" is the mean over i of logsumexp_j s_ij - s_ii, with ``symmetric`` averaged with the same over
    columns; "siglip" is the sum over all pairs of log(1 + exp(-s_ij)) where i = j and log(1 + exp(s_ij)) elsewhere,
    over B.  They equal open_clip's ClipLoss and SigLipLoss.

    Args:
        x: float32, bfloat16, float16 or float64 [B, C] or (infonce) [B, R, C], any strides, normalised by the caller.
        y: same dtype [B, C]; with labels [N, C].
        logit_scale: the factor itself, not its logarithm: a number, or a floating point tensor of one element, which
            gets a gradient.
        logit_bias: the same, or None.
        symmetric: of "infonce", both directions.  "siglip" counts each pair once and takes only True.
        labels: int64 or int32 [B], the row of y that belongs to each row of x; only with "infonce" and
            ``symmetric=False``.
        backend: "reference", "cpu", "triton", "cuda" or "auto"; None obeys use_backend and HIVILT_BACKEND.

    Returns:
        A number in float32 (float64 for float64).  NaN and infinite logits give what torch's cross_entropy gives.
        A tied maximum over queries sends its gradient to the lowest of them.

    Raises:
        ValueError, TypeError: a malformed argument.  BackendError: the backend asked for cannot run the call.

    Cost: forward 2 B R N C flops, backward three times that; beside the results and copies of x and y in the order in
    which they are read, memory for B R max(C, 1024) numbers or a few MiB.  Saved for backward: x, y and the row and
    column log-sum-exps.  Second derivatives raise.
    """
    args, columns = _bind_contrastive_loss(x, y, logit_scale, logit_bias, symmetric, labels, kind, backend)
    return mean_loss(*call(args, backend), args[0], columns)


def call(args: tuple, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """row_lse, column_lse, target of operator arguments, recorded where a gradient may be asked for."""
    if not records(args[0], args[1], args[2], args[4]):
        return run(CONTRASTIVE_LOSS, backend, args)
    chosen = _backends.choose(CONTRASTIVE_LOSS, backend, args) if eager(args[0]) else backend or ""
    return record(ContrastiveLoss, (*args, chosen))


def mean_loss(row_lse: Tensor, column_lse: Tensor, target: Tensor, x: Tensor, columns: bool) -> Tensor:
    images = row_lse.shape[0]
    loss = total(row_lse)
    if target.shape[0]:
        loss = loss - total(target)
        if columns:
            loss = (loss + (total(column_lse) - total(target))) / 2
    return (loss / images).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def total(x: Tensor) -> Tensor:
    """The sum, in an order that does not depend on the number of threads."""
    if not eager(x) or x.shape[0] <= ONE_THREAD:
        return x.sum()
    return torch.stack([part.sum() for part in x.split(ONE_THREAD)]).sum()


def _bind_contrastive_loss(x, y, logit_scale, logit_bias=None, symmetric=True, labels=None, kind="infonce",
                           backend=None):  # fmt: skip
    op = "contrastive_loss"
    if torch._C._is_any_autocast_enabled():
        x, y = autocast(x, y)
    many = isinstance(x, Tensor) and x.dim() == 3
    check_tensor(op, "x", x, 3 if many else 2, "(B, C) or (B, R, C)")
    check_tensor(op, "y", y, 2, "(N, C)", x, "x")
    if not isinstance(kind, str) or kind not in KINDS:
        refuse(ValueError if isinstance(kind, str) else TypeError, op, "kind", " or ".join(map(repr, KINDS)), kind)
    check_flag(op, "symmetric", symmetric)
    B, C = x.shape[0], x.shape[-1]
    N = y.shape[0]
    if B == 0 or (many and x.shape[1] == 0):
        refuse(ValueError, op, "x", "at least one row" if B == 0 else "at least one query per row", x)
    if y.shape[1] != C:
        refuse(ValueError, op, "y", f"shape (N, {C}) to go with x {tuple(x.shape)}", y)
    if kind == "siglip":
        if many:
            refuse(ValueError, op, "x", "two dimensions (B, C) with kind='siglip'", x)
        if not symmetric:
            refuse(ValueError, op, "symmetric", "True with kind='siglip', which counts each pair once", symmetric)
        if labels is not None:
            refuse(ValueError, op, "labels", "None with kind='siglip'", labels)
    if labels is None:
        if N != B:
            refuse(ValueError, op, "y", f"shape ({B}, {C}): a row for each of x", y)
    else:
        if symmetric:
            refuse(ValueError, op, "labels", "None unless symmetric=False", labels)
        labels = _check_labels(op, labels, x, N)
    if max(B, N) > INT32_MAX:
        refuse(ValueError, op, "x" if B > N else "y", "fewer than 2^31 rows", x if B > N else y)
    factor, scale = _number(op, "logit_scale", logit_scale, x, 1.0)
    offset, bias = (0.0, None) if logit_bias is None else _number(op, "logit_bias", logit_bias, x, 0.0)
    _backends.check_name(backend, f"{op}: backend")
    columns = symmetric and kind == "infonce"
    return (x if many else x[:, None], y, scale, factor, bias, offset, labels, columns, kind), columns


def _number(op: str, name: str, value: Any, x: Tensor, neutral: float) -> tuple[float, Tensor | None]:
    """(number, None), or (what changes nothing, tensor without dimensions in the precision of the logits)."""
    if not isinstance(value, Tensor):
        return check_number(op, name, value), None
    if not value.is_floating_point():
        refuse(TypeError, op, name, "a number or a floating point tensor", value)
    if value.is_nested or value.layout is not torch.strided or value.numel() != 1 or value.device != x.device:
        refuse(ValueError, op, name, f"a number or a tensor of one element on {x.device}", value)
    return neutral, value.to(torch.float64 if x.dtype == torch.float64 else torch.float32).reshape(())


def _check_labels(op: str, labels: Any, x: Tensor, rows: int) -> Tensor:
    """int64 [B], each a row of y."""
    if not isinstance(labels, Tensor) or labels.is_nested or labels.layout is not torch.strided:
        refuse(TypeError, op, "labels", "a dense int64 or int32 tensor (B,)", labels)
    if labels.dtype not in (torch.int32, torch.int64):
        refuse(TypeError, op, "labels", "int64 or int32", labels)
    if tuple(labels.shape) != (x.shape[0],):
        refuse(ValueError, op, "labels", f"shape ({x.shape[0]},)", labels)
    if labels.device != x.device:
        refuse(ValueError, op, "labels", f"x's device {x.device}", labels)
    if eager(x) and not bool(((labels >= 0) & (labels < rows)).all()):
        refuse(ValueError, op, "labels", f"values from 0 to {rows - 1}", Said("one outside"))
    return labels.to(torch.int64)


_backends.explainable(CONTRASTIVE_LOSS, contrastive_loss, _bind_contrastive_loss)
