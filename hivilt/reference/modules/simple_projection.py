"""The smallest bridge from vision to language: a linear layer on each token  (LLaVA, arXiv 2304.08485)."""

from __future__ import annotations

from torch import Tensor, nn

from ._checks import check_size, refuse


class SimpleProjection(nn.Module):
    """Tokens of d_in channels to tokens of d_out; vision flows to language and not back.

    Args:
        d_in, d_out: channels.

    Parameters: ``proj``.  Cost: N d_in d_out multiply-adds for N tokens.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        where = "SimpleProjection"
        self.d_in, self.d_out = check_size(where, "d_in", d_in), check_size(where, "d_out", d_out)
        self.proj = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]; ValueError or TypeError for anything else."""
        if not isinstance(x, Tensor):
            refuse(TypeError, "SimpleProjection", "x", f"a tensor (..., {self.d_in})", x)
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            refuse(ValueError, "SimpleProjection", "x", f"{self.d_in} channels", x)
        return self.proj(x)
