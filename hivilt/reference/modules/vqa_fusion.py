"""Fusion of a question with an image for question answering, in plain PyTorch: words attend to patches and, if asked
for, patches to words first; and the mean over the tokens that take part, which a head of answers reads.

Padding is blanked before it is used, so what it holds, NaN included, reaches neither results nor gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._checks import check_mask, check_size, check_tensor, refuse
from .cross_modal_fusion import padding_of


class MultimodalFusion(nn.Module):
    """Each word beside what it saw: fused = mlp([t; attention(t, v', v')]), v' = vision_proj(v).

    With ``image_to_text`` the patches read the words first, v' = vision_proj(v) + attention(vision_proj(v), t, t), so
    that a word sees patches that know the question.  With ``residual`` fused = norm1(t + mlp(...)).

    Args:
        text_embed_dim: C of words, and of everything after ``vision_proj``.
        vision_embed_dim: channels of the patches.
        num_attention_heads: divides text_embed_dim.
        hidden_dim: of the mlp.
        image_to_text: also let patches attend to words.
        residual: add the words to the result and normalise it.

    Parameters: ``vision_proj``, ``text_to_image_attention``, ``mlp.0``, ``mlp.2``; ``image_to_text_attention`` with
    image_to_text; ``norm1``, which without residual is kept, so that checkpoints fit, but asks for no gradient.
    """

    attention: Callable[..., nn.Module] = nn.MultiheadAttention  # the class of both attentions

    def __init__(
        self,
        text_embed_dim: int,
        vision_embed_dim: int,
        num_attention_heads: int,
        hidden_dim: int,
        *,
        image_to_text: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        where = "MultimodalFusion"
        C = self.text_embed_dim = check_size(where, "text_embed_dim", text_embed_dim)
        self.vision_embed_dim = check_size(where, "vision_embed_dim", vision_embed_dim)
        if C % check_size(where, "num_attention_heads", num_attention_heads):
            refuse(ValueError, where, "num_attention_heads", f"a divisor of text_embed_dim = {C}", num_attention_heads)
        check_size(where, "hidden_dim", hidden_dim)
        for name, flag in (("image_to_text", image_to_text), ("residual", residual)):
            if not isinstance(flag, bool):
                refuse(TypeError, where, name, "a bool", flag)
        self.image_to_text, self.residual = image_to_text, residual
        self.vision_proj = nn.Linear(vision_embed_dim, C)
        self.text_to_image_attention = self.attention(C, num_attention_heads, batch_first=True)
        if image_to_text:
            self.image_to_text_attention = self.attention(C, num_attention_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(2 * C, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, C))
        self.norm1 = nn.LayerNorm(C)
        self.norm1.requires_grad_(residual)

    def forward(
        self,
        text_embeddings: Tensor,
        vision_features: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vision_mask: Tensor | None = None,
        return_patches: bool = False,
    ) -> tuple[Tensor, ...]:
        """Words and patches to fused words.

        Args:
            text_embeddings: [B, N_t, C].
            vision_features: [B, N_v, vision_embed_dim].
            attention_mask: bool or integer [B, N_t], True or 1 takes part.
            vision_mask: the same of the patches [B, N_v].
            return_patches: also return v'.

        Returns:
            (fused [B, N_t, C], mask bool [B, N_t]), and v' [B, N_v, C] with return_patches.  Rows of padding are zero.
            A word of an image without a patch that takes part sees ``text_to_image_attention.out_proj.bias``.

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where, C = "MultimodalFusion", self.text_embed_dim
        text = check_tensor(where, "text_embeddings", text_embeddings, "(B, N_t, C)", 3)
        vision = check_tensor(where, "vision_features", vision_features, "(B, N_v, C_v)", 3)
        if text.shape[2] != C:
            refuse(ValueError, where, "text_embeddings", f"{C} channels", text)
        if vision.shape[2] != self.vision_embed_dim:
            refuse(ValueError, where, "vision_features", f"{self.vision_embed_dim} channels", vision)
        if vision.shape[0] != text.shape[0]:
            refuse(ValueError, where, "vision_features", f"the batch of text_embeddings, {text.shape[0]}", vision)
        if attention_mask is None:
            words = text.new_ones(text.shape[:2], dtype=torch.bool)
        else:
            words = check_mask(where, "attention_mask", attention_mask, tuple(text.shape[:2]))
            text = torch.where(words[..., None], text, 0.0)
        patches, no_patch = None, None
        if vision_mask is not None:
            patches = check_mask(where, "vision_mask", vision_mask, tuple(vision.shape[:2]))
            vision, no_patch = torch.where(patches[..., None], vision, 0.0), padding_of(patches)
        vision = self.vision_proj(vision)
        if self.image_to_text:
            no_word = None if attention_mask is None else padding_of(words)
            read = self.image_to_text_attention(vision, text, text, key_padding_mask=no_word, need_weights=False)[0]
            vision = vision + read
        seen = self.text_to_image_attention(text, vision, vision, key_padding_mask=no_patch, need_weights=False)[0]
        fused = self.mlp(torch.cat([text, seen], -1))
        if self.residual:
            fused = self.norm1(text + fused)
        if attention_mask is not None:
            fused = torch.where(words[..., None], fused, 0.0)
        if not return_patches:
            return fused, words
        return fused, words, vision if patches is None else torch.where(patches[..., None], vision, 0.0)

    def extra_repr(self) -> str:
        return f"image_to_text={self.image_to_text}, residual={self.residual}"


class MaskedMeanPool(nn.Module):
    """Mean over the tokens that take part. It has no parameters."""

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, C] to [B, C].

        Args:
            features: any floating dtype; halves are summed in float32.
            mask: bool or integer [B, N], True or 1 takes part; other tokens may hold anything, NaN included.  A row
                without a token that takes part gives zeros and no gradient.

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where = "MaskedMeanPool"
        check_tensor(where, "features", features, "(B, N, C)", 3)
        if not features.is_floating_point():
            refuse(TypeError, where, "features", "a floating point tensor", features)
        if mask is not None:
            mask = check_mask(where, "mask", mask, tuple(features.shape[:2]))
        return self._pool(features, mask)

    def _pool(self, features: Tensor, mask: Tensor | None) -> Tensor:
        count = features.shape[1]
        if mask is not None:
            features = torch.where(mask[..., None], features, 0.0)
            count = mask.sum(1)[:, None].clamp(min=1)
        wide = torch.promote_types(features.dtype, torch.float32)
        return (features.sum(1, dtype=wide) / (count if mask is not None else max(count, 1))).to(features.dtype)
