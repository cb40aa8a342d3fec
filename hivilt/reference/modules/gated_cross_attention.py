"""Flamingo's gated cross-attention in plain PyTorch: text reads media between the layers of a language model.

x + tanh(attn_gate) attention(norm(x); media), then x + tanh(ff_gate) ff(x)  (arXiv 2204.14198).  Both gates start at 0,
where the block changes nothing.  Vision flows to language and not back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._checks import check_dropout, check_mask, check_size, check_tensor, refuse
from ._heads import attend, check_topk, project
from ._hugging_face import check_class, without_memory
from .perceiver import feed_forward


class MaskedCrossAttention(nn.Module):
    """Text [B, L, dim] reads media [B, T, n, dim_visual].

    Args:
        dim: C of the text; dim_visual: C of the media (None: dim); dim_head: D; heads: H.
        only_attend_immediate_media: a token reads the last media before it; False: all media before it.
        topk: how many media tokens each text token keeps; None: all.
        dropout: of the probabilities.

    Parameters, named as in open_flamingo: ``norm``, ``to_q``, ``to_kv``, ``to_out``.
    """

    _attend = staticmethod(attend)

    def __init__(
        self,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        only_attend_immediate_media: bool = True,
        *,
        topk: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        where = "MaskedCrossAttention"
        self.dim = check_size(where, "dim", dim)
        self.dim_visual = dim if dim_visual is None else check_size(where, "dim_visual", dim_visual)
        self.heads, self.topk = check_size(where, "heads", heads), check_topk(where, topk)
        inner = check_size(where, "dim_head", dim_head) * heads
        if not isinstance(only_attend_immediate_media, bool):
            refuse(TypeError, where, "only_attend_immediate_media", "a bool", only_attend_immediate_media)
        self.only_attend_immediate_media = only_attend_immediate_media
        self.dropout = check_dropout(where, dropout)
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(self.dim_visual, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.register_module("q_norm", None)  # norms over D, in some models of Hugging Face
        self.register_module("k_norm", None)

    def forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """[B, L, C]; arguments are those of GatedCrossAttentionBlock.forward.  A token that reads nothing gets 0."""
        media, media_locations, attn_mask = self._check(x, media, media_locations, attn_mask)
        text_time = None if media_locations is None else media_locations.cumsum(1)  # media seen so far, 0 at first
        used = self._used(text_time, attn_mask, media.shape[1], media.shape[2])
        if used is not None:  # what nobody reads may hold anything, and must not reach the gradient of a projection
            media = torch.where(used[..., None], media, 0.0)
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1))
        k, v = (part.unflatten(-1, (self.heads, -1)) for part in project(self.to_kv, media, 2))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = self._read(q, k, v, text_time, attn_mask, self.dropout if self.training else 0.0)
        return self.to_out(out.flatten(2))

    def _check(self, x, media, media_locations, attn_mask) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """media [B, T, n, D], media_locations bool [B, L], attn_mask bool [B, L, T or T n]."""
        where = "GatedCrossAttentionBlock"
        check_tensor(where, "x", x, "(B, L, C)", 3)
        if x.shape[2] != self.dim:
            refuse(ValueError, where, "x", f"{self.dim} channels", x)
        if not isinstance(media, Tensor):
            refuse(TypeError, where, "media", "a tensor (B, T, n, D) or (B, n, D)", media)
        if media.dim() not in (3, 4):
            refuse(ValueError, where, "media", "4 or 3 dimensions (B, T, n, D) or (B, n, D)", media)
        if media.dim() == 3:
            media = media[:, None]
        if media.shape[0] != x.shape[0]:
            refuse(ValueError, where, "media", f"the batch of x, {x.shape[0]}", media)
        if media.shape[3] != self.dim_visual:
            refuse(ValueError, where, "media", f"{self.dim_visual} channels", media)
        B, L, T, n = *x.shape[:2], *media.shape[1:3]
        if media_locations is not None:
            media_locations = check_mask(where, "media_locations", media_locations, (B, L))
        if attn_mask is not None:
            if isinstance(attn_mask, Tensor) and attn_mask.dim() == 4 and attn_mask.shape[1] == 1:
                attn_mask = attn_mask[:, 0]
            width = T if isinstance(attn_mask, Tensor) and tuple(attn_mask.shape) == (B, L, T) else T * n
            attn_mask = check_mask(where, "attn_mask", attn_mask, (B, L, width))
        return media, media_locations, attn_mask

    def _used(self, text_time: Tensor | None, attn_mask: Tensor | None, T: int, n: int) -> Tensor | None:
        """bool [B, T, n]: the media tokens that some text token reads; None: all of them."""
        if text_time is not None and attn_mask is None:
            return self._seen(text_time, T).any(1)[:, :, None].expand(-1, -1, n)
        keep = self._pairs(text_time, attn_mask, T, n)
        return None if keep is None else keep.any(1).unflatten(1, (T, n))

    def _seen(self, text_time: Tensor, T: int) -> Tensor:
        """bool [B, L, T]: the media that a text token may read."""
        times = torch.arange(1, T + 1, device=text_time.device)
        if self.only_attend_immediate_media:
            return text_time[..., None] == times
        return text_time[..., None] >= times

    def _pairs(self, text_time: Tensor | None, attn_mask: Tensor | None, T: int, n: int) -> Tensor | None:
        """bool [B, L, T n]: who reads what; None: everyone reads everything."""
        keep = None if text_time is None else self._seen(text_time, T).repeat_interleave(n, 2)
        if attn_mask is None:
            return keep
        if attn_mask.shape[2] != T * n:
            attn_mask = attn_mask.repeat_interleave(n, 2)
        return attn_mask if keep is None else attn_mask & keep

    def _read(self, q: Tensor, k: Tensor, v: Tensor, text_time, attn_mask, dropout_p: float) -> Tensor:
        """q [B, L, H, D], k, v [B, T, n, H, D] to [B, L, H, D]."""
        keep = self._pairs(text_time, attn_mask, *k.shape[1:3])
        q, k, v = q.transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
        keep = None if keep is None else keep[:, None]
        return self._attend(q, k, v, self.topk, attn_mask=keep, dropout_p=dropout_p).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, only_attend_immediate_media={self.only_attend_immediate_media}, topk={self.topk}"


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(attn_gate) attention(x; media), then x + tanh(ff_gate) ff(x).

    Args:
        dim, dim_visual, dim_head, heads, only_attend_immediate_media: of the attention, see MaskedCrossAttention.
        ff_mult: hidden channels of ``ff`` over dim.
        topk: how many media tokens each text token keeps; None: all.
        dropout: of the probabilities and of both branches.

    Parameters, named as in open_flamingo: ``attn.norm``, ``attn.to_q``, ``attn.to_kv``, ``attn.to_out``, ``attn_gate``,
    ``ff.0``, ``ff.1``, ``ff.3``, ``ff_gate``.  At the start, where the gates are 0, only the gates have a gradient.
    """

    attention: type[nn.Module] = MaskedCrossAttention

    def __init__(
        self,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        only_attend_immediate_media: bool = True,
        *,
        topk: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attn = self.attention(
            dim, dim_visual, dim_head, heads, only_attend_immediate_media, topk=topk, dropout=dropout
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(dim, check_size("GatedCrossAttentionBlock", "ff_mult", ff_mult))
        self.ff_gate = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, media: Tensor, media_locations: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Text that has read the media.

        Args:
            x: text [B, L, dim].
            media: T images of n tokens each [B, T, n, dim_visual], or one image [B, n, dim_visual].
            media_locations: bool or integer [B, L], True where an image stands in the text: the first belongs to
                media[:, 0] and so on.  A token reads the image at or before it, the last one alone or, with
                only_attend_immediate_media=False, all of them.  None: every token reads all media.
            attn_mask: bool or integer, True or 1 takes part, of media [B, L, T] or of their tokens [B, L, T n] or
                [B, 1, L, T n]; a pair must also be allowed by ``media_locations``.

        Returns:
            [B, L, dim].  A token that may read nothing, such as one before the first image, gets 0 from the attention.
            Media tokens that nobody reads may hold anything, NaN included.

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        x = x + self.drop(self.attn(x, media, media_locations, attn_mask)) * self.attn_gate.tanh()
        return x + self.drop(self.ff(x)) * self.ff_gate.tanh()

    @classmethod
    def from_hf(cls, module: nn.Module) -> GatedCrossAttentionBlock:
        """A block that shares the parameters and layers of transformers' IdeficsGatedCrossAttentionLayer.

        What the layer calls image_attention_mask and cross_attention_gate is ``attn_mask`` here, as bool: a token
        without an image is a row of False.

        Raises:
            TypeError: another module.
        """
        check_class(cls, module, "IdeficsGatedCrossAttentionLayer")
        theirs = module.cross_attn
        with without_memory():
            ours = cls(
                module.hidden_size, theirs.k_proj.in_features, theirs.head_dim, theirs.num_heads, dropout=theirs.dropout
            )
        ours.attn.norm = module.input_layernorm
        ours.attn.to_q, ours.attn.to_out = theirs.q_proj, theirs.o_proj
        ours.attn.to_kv = nn.ModuleList([theirs.k_proj, theirs.v_proj])
        if theirs.qk_layer_norms:
            ours.attn.q_norm, ours.attn.k_norm = theirs.q_layer_norm, theirs.k_layer_norm
        ours.ff = nn.Sequential(module.post_attention_layernorm, module.mlp)
        ours.attn_gate, ours.ff_gate = module.alpha_cross_attn, module.alpha_dense
        return ours.train(module.training)
