"""The counter-based random numbers of dropout: Philox4x32-10 (Salmon et al., SC'11) in int64 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], seed: Tensor | int) -> list[Tensor]:
    """The four 32-bit words of each counter (four broadcastable parts), keyed with the two halves of ``seed``."""
    c = list(counter)
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # the high half of a wrapped product is right after the mask
        c = [(b >> 32 & LOW) ^ c[1] ^ k0, b & LOW, (a >> 32 & LOW) ^ c[3] ^ k1, a & LOW]
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c


def counts(size: int, dim: int, dims: int, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """start, start + 1, ... along axis ``dim`` of ``dims``."""
    return torch.arange(start, start + size, device=device).view([-1 if i == dim else 1 for i in range(dims)])
