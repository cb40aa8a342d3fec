"""Perceiver resampler in plain PyTorch: a fixed number of learned latents read any number of tokens.

Each block: latents += attention(latents; keys [context; latents]), then latents += ff(latents); pre-norm, no biases, a
norm at the end  (Flamingo, arXiv 2204.14198; Perceiver, arXiv 2103.03206).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._checks import check_mask, check_size, refuse
from ._heads import attend, check_topk, merge_heads, project, split_heads
from ._hugging_face import check_class, children_of, without_memory


def feed_forward(dim: int, mult: int) -> nn.Sequential:
    """Norm, Linear, GELU, Linear, with open_flamingo's names 0, 1 and 3."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, dim * mult, bias=False), nn.GELU(), nn.Linear(dim * mult, dim, bias=False)
    )


class PerceiverAttention(nn.Module):
    """Latents attend to context and latents together.

    Args:
        dim: C; dim_head: D; heads: H.
        topk: how many keys each latent keeps; None: all.

    Parameters, named as in open_flamingo: ``norm_media``, ``norm_latents``, ``to_q``, ``to_kv``, ``to_out``.
    """

    _attend = staticmethod(attend)

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8, *, topk: int | None = None) -> None:
        super().__init__()
        where = "PerceiverAttention"
        check_size(where, "dim", dim)
        self.heads, self.topk = check_size(where, "heads", heads), check_topk(where, topk)
        inner = check_size(where, "dim_head", dim_head) * heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.register_module("q_norm", None)  # norms over D, in some models of Hugging Face
        self.register_module("k_norm", None)

    def forward(self, context: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """context [B, N, C], latents [B, R, C], mask bool [B, N] (True takes part) to [B, R, C]."""
        context, latents = self.norm_media(context), self.norm_latents(latents)
        q = split_heads(self.to_q(latents), self.heads)
        keys = torch.cat([context, latents], 1)
        k, v = (split_heads(part, self.heads) for part in project(self.to_kv, keys, 2))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(latents.shape[:2])], 1)
        return self.to_out(merge_heads(self._attend(q, k, v, self.topk, key_mask=mask)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, topk={self.topk}"


class PerceiverResampler(nn.Module):
    """Any number of tokens to ``num_latents``.

    Args:
        dim: C; depth: blocks; dim_head: D; heads: H of each attention; num_latents: R.
        ff_mult: hidden channels of the feed-forward part over dim.
        topk: how many keys each latent keeps in each block; None: all.

    Parameters, named as in open_flamingo: ``latents`` [R, C], ``layers.i.0`` (PerceiverAttention), ``layers.i.1`` (norm
    and two linear layers), ``norm``.

    Cost: depth R (N + R) D H 2 multiply-adds for attention, and the projections of N + R tokens in each block.
    """

    attention: type[nn.Module] = PerceiverAttention

    def __init__(
        self,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        ff_mult: int = 4,
        *,
        topk: int | None = None,
    ) -> None:
        super().__init__()
        where = "PerceiverResampler"
        self.dim, self.num_latents = check_size(where, "dim", dim), check_size(where, "num_latents", num_latents)
        check_size(where, "ff_mult", ff_mult)
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([self.attention(dim, dim_head, heads, topk=topk), feed_forward(dim, ff_mult)])
            for _ in range(check_size(where, "depth", depth))
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens to latents.

        Args:
            context: [B, N, C], or [B, T, N, C] for T images each resampled on its own.
            mask: bool or integer [B, N] or [B, T, N], True or 1 takes part.  Other tokens may hold anything, NaN
                included.  Without a token that takes part the latents read each other alone.

        Returns:
            [B, num_latents, C] or [B, T, num_latents, C].

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where = "PerceiverResampler"
        if not isinstance(context, Tensor):
            refuse(TypeError, where, "context", "a tensor (B, N, C) or (B, T, N, C)", context)
        if context.dim() not in (3, 4):
            refuse(ValueError, where, "context", "3 or 4 dimensions (B, N, C) or (B, T, N, C)", context)
        if context.shape[-1] != self.dim:
            refuse(ValueError, where, "context", f"{self.dim} channels", context)
        if mask is not None:
            mask = check_mask(where, "mask", mask, tuple(context.shape[:-1]))
            context = torch.where(mask[..., None], context, 0.0)
        batch = context.shape[:-2]
        context, mask = context.flatten(0, -3), None if mask is None else mask.flatten(0, -2)
        latents = self.latents.expand(context.shape[0], -1, -1)
        for attention, feed in self.layers:
            latents = latents + attention(context, latents, mask)
            latents = latents + feed(latents)
        return self.norm(latents).unflatten(0, batch)

    @classmethod
    def from_hf(cls, module: nn.Module) -> PerceiverResampler:
        """A resampler that shares the parameters and layers of transformers' IdeficsPerceiverResampler.

        Raises:
            TypeError: another module.
        """
        check_class(cls, module, "IdeficsPerceiverResampler")
        with without_memory():
            ours = cls(module.embed_dim, len(module.blocks), module.head_dim, module.n_heads, module.n_latents)
        ours.latents, ours.norm = module.latents, module.layer_norm
        for layer, (attention, feed) in zip(ours.layers, module.blocks, strict=True):
            own = layer[0]
            own.norm_media, own.norm_latents = attention.context_layer_norm, attention.latents_layer_norm
            own.to_q, own.to_out = attention.q_proj, attention.output_proj
            own.to_kv = nn.ModuleList([attention.k_proj, attention.v_proj])
            if attention.qk_layer_norms:
                own.q_norm, own.k_norm = attention.q_layer_norm, attention.k_layer_norm
            layer[1] = nn.Sequential(*children_of(feed, "ln", "fc", "act", "c_proj"))
        return ours.train(module.training)
