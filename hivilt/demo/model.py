"""The demo's plain PyTorch model: cross-attention of words and patches built from torch.nn.MultiheadAttention, and the
top-k attention that a user would write in PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16  # pixels


class CrossModalLayer(nn.Module):
    """Words look at patches, patches at words, patches at patches; then an MLP on each side."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        for name in ("words_to_patches", "patches_to_words", "patches_to_patches"):
            setattr(self, name, nn.MultiheadAttention(width, heads, batch_first=True))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)
        )

    def forward(self, words: Tensor, patches: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        w, p = self.norms[0](words), self.norms[1](patches)
        words = words + self.words_to_patches(w, p, p, need_weights=False)[0]
        patches = patches + self.patches_to_words(p, w, w, key_padding_mask=padding, need_weights=False)[0]
        p = self.norms[2](patches)
        patches = patches + self.patches_to_patches(p, p, p, need_weights=False)[0]
        words = words + self.mlps[0](self.norms[3](words))
        return words, patches + self.mlps[1](self.norms[4](patches))


class CrossModalModel(nn.Module):
    """Patches [B, N, 768] and word numbers [B, Q] (-1: padding) -> features of the words and of the patches."""

    def __init__(self, vocabulary: int, grid: tuple[int, int], width: int, heads: int, layers: int):
        super().__init__()
        self.word, self.patch = nn.Embedding(vocabulary, width), nn.Linear(3 * PATCH**2, width)
        self.register_buffer("place", positions(grid, width))
        self.layers = nn.ModuleList(CrossModalLayer(width, heads) for _ in range(layers))
        self.match = nn.Linear(width, width)

    def embed(self, patches: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = positions((words.shape[1],), self.word.embedding_dim).to(self.place.dtype)
        return self.word(words.clamp_min(0)) + order, self.patch(patches) + self.place, words < 0

    def forward(self, patches: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        w, p, padding = self.embed(patches, words)
        for layer in self.layers:
            w, p = layer(w, p, padding)
        return w.masked_fill(padding[..., None], 0.0), p

    def loss(self, patches: Tensor, words: Tensor) -> Tensor:
        """Which sentence belongs to which picture."""
        w, p = self(patches, words)
        w, p = (F.normalize(x.mean(1), dim=-1) for x in (self.match(w), p))
        return F.cross_entropy(10 * w @ p.mT, torch.arange(len(words)))


def positions(sizes: tuple[int, ...], width: int) -> Tensor:
    """Sines and cosines of the coordinates of a grid (or of a line), [tokens, width]."""
    coordinates = torch.meshgrid(*(torch.linspace(0, math.pi, n) for n in sizes), indexing="ij")
    rates = torch.arange(1, width // (2 * len(sizes)) + 1)
    angles = [x.flatten()[:, None] * rates for x in coordinates]
    return 0.3 * torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)


class PlainTopkAttention(nn.MultiheadAttention):
    """Top-k attention as one would write it: scores, torch.topk, mask, softmax, matmul.

    With ``told``, indices of another's choice, it follows that, and notes in how many rows its own would differ and by
    how much the worst score it was told to keep falls short of its own.
    """

    topk, told = 0, None

    def forward(self, query, key, value, key_padding_mask=None, need_weights=False):
        E, w, b = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if query is key:
            q, k, v = F.linear(query, w, b).chunk(3, -1)
        else:
            q, (k, v) = F.linear(query, w[:E], b[:E]), F.linear(key, w[E:], b[E:]).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / math.sqrt(self.head_dim)
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], -math.inf)
        best, chosen = scores.topk(min(self.topk, scores.shape[-1]), -1)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        if self.told is not None:
            told = torch.zeros_like(kept).scatter_(-1, self.told, True)
            other = ((told != kept) & (scores > -math.inf)).any(-1)
            self.rows, self.differ = other.numel(), int(other.sum())
            worst = scores.detach().masked_fill(~told, math.inf).amin(-1)
            self.short = float((best[..., -1].detach() - worst)[other].amax()) if self.differ else 0.0
            kept = told
        out = scores.masked_fill(~kept, -math.inf).softmax(-1) @ v
        return self.out_proj(out.transpose(1, 2).flatten(2)), None
