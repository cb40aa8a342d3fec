"""Contrastive losses, the meaning of them.  Logits: s_ij = logit_scale max_r <x_ir, y_j> + logit_bias.

    infonce (CLIP, arXiv 2103.00020)    row_i = logsumexp_j s_ij - s_i,l(i)      column_j = logsumexp_i s_ij - s_jj
        mean over rows, or with ``symmetric`` the mean of that and of the mean over columns; l(i) = i without labels
    siglip (arXiv 2303.15343)           sum_ij log(1 + exp(-z_ij s_ij)) / B,  z_ij = 1 where i = j, else -1

The maximum over R queries of an image is that of image-text contrast in BLIP-2 (arXiv 2301.12597); a tied maximum sends
its gradient to the lowest r.  Sums run in float64 and the loss is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: float | Tensor,
    *,
    logit_bias: float | Tensor | None = None,
    symmetric: bool = True,
    labels: Tensor | None = None,
    kind: str = "infonce",
) -> Tensor:
    """The loss of a batch of pairs.

    Args:
        x: [B, C] or [B, R, C]; y: [N, C], N = B unless there are labels; both normalised by the caller.
        logit_scale, logit_bias: numbers or tensors of one element.
        labels: int64 [B], the row of y that belongs to each row of x; only without ``symmetric`` and with "infonce".

    Returns:
        A float32 number (float64 for float64).
    """
    dots, _ = best_dots(x.double() if x.dim() == 3 else x.double()[:, None], y.double())
    s = dots * _number(logit_scale) + (0.0 if logit_bias is None else _number(logit_bias))
    own = torch.arange(x.shape[0], device=x.device) if labels is None else labels.long()
    if kind == "siglip":
        z = torch.where(torch.arange(y.shape[0], device=x.device) == own[:, None], 1.0, -1.0).double()
        loss = -F.logsigmoid(z * s).sum() / x.shape[0]
    else:
        loss = F.cross_entropy(s, own)
        if symmetric:
            loss = (loss + F.cross_entropy(s.mT, own)) / 2
    return loss.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _number(x: float | Tensor) -> float | Tensor:
    return x.double().reshape(()) if isinstance(x, Tensor) else x


def best_dots(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """max_r <x_ir, y_j> [B, N] of x [B, R, C], NaN where one of them is, and which r it is: the first of equals."""
    dots = x @ y.mT
    R = x.shape[1]
    if R == 1:
        return dots[:, 0], torch.zeros(dots[:, 0].shape, dtype=torch.int64, device=x.device)
    with torch.no_grad():
        top = dots.amax(1, keepdim=True)
        is_top = (dots == top) | dots.isnan()
        which = torch.where(is_top, torch.arange(R, device=x.device)[:, None], R).amin(1)
    return dots.gather(1, which[:, None])[:, 0], which
