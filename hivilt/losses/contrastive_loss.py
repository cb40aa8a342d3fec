"""The contrastive loss, on one process or over the batches of a process group; docs/contrastive_loss.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import contrastive_loss as of_one_process
from ..ops._checks import check_tensor


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    symmetric: bool = True,
    labels: Tensor | None = None,
    kind: str = "infonce",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """The contrastive loss of pairs x_i, y_i without their B x B logits in memory: CLIP's, one direction, or SigLIP's.

    Args:
        x, y, logit_scale, logit_bias, symmetric, labels, kind, backend: as in hivilt.ops.contrastive_loss.
        group: a torch.distributed process group, whose ranks each pass their part of the batch (as many rows as they
            like, the same C, R, dtype and settings); None: this process alone.  Not with labels.

    Returns:
        A number in float32 (float64 for float64).  With a group: the loss of the concatenated batch, the same on every
        rank.  Its gradients follow DistributedDataParallel, which averages them: every rank gets the gradient of the
        whole loss with respect to its own rows times the number of ranks, and a logit scale gets the rank's share times
        that number.  So averaged gradients of parameters equal those of one process with the whole batch, as those of
        open_clip with gather_with_grad and local_loss do.

    Raises:
        ValueError, TypeError: a malformed argument, or ranks that differ; with a group the same on every rank.
        hivilt.distributed.ShardError: a rank does not answer.

    Cost: with a group of W ranks and B rows in all, each rank gathers y (B C numbers), computes B/W x B pairs once
    forward and once backward, and exchanges B column log-sum-exps per rank and the gradient of y.
    """
    if group is None:
        return of_one_process(x, y, logit_scale, logit_bias=logit_bias, symmetric=symmetric, labels=labels, kind=kind,
                              backend=backend)  # fmt: skip
    from ..distributed.contrastive_loss import contrastive_loss as of_group

    return of_group(x, y, logit_scale, logit_bias=logit_bias, symmetric=symmetric, labels=labels, kind=kind,
                    group=group, backend=backend)  # fmt: skip


def itc_loss(
    queries: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Image-text contrast of BLIP-2 (arXiv 2301.12597): an image is as near to a text as its nearest query is.

    Args:
        queries: [B, R, C], text: [B, C], both normalised by the caller; logit_scale: one over the temperature.
        group, backend: as in ``contrastive_loss``.

    Returns:
        The mean of both directions' cross entropies, without label smoothing.

    Raises:
        ValueError, TypeError: a malformed argument.
    """
    check_tensor("itc_loss", "queries", queries, 3, "(B, R, C)")
    check_tensor("itc_loss", "text", text, 2, "(B, C)")
    return contrastive_loss(queries, text, logit_scale, group=group, backend=backend)
