"""Small pre-norm encoders of images and of text in plain PyTorch (arXiv 2010.11929; text: the same blocks over words).

Block: x + attention(norm(x)), then x + mlp(norm(x)).  No class token: every row is a patch or a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules import HierarchicalPatchEmbedding, MultiheadAttention
from ..modules._checks import check_mask, check_size, check_tensor, refuse
from ..modules.cross_modal_fusion import call, check_width, checkpointed, hide


class EncoderBlock(nn.Module):
    """Parameters: ``norm1``, ``attn``, ``norm2``, ``mlp.0``, ``mlp.3``."""

    def __init__(self, hidden_dim: int, num_heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        width = int(hidden_dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.attn = MultiheadAttention(hidden_dim, num_heads, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, hidden_dim)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, C] to [B, N, C]; mask: bool [B, N], True is read."""
        y = self.norm1(x)
        x = x + self.drop(self.attn(y, y, y, None if mask is None else ~mask, need_weights=False)[0])
        return x + self.drop(self.mlp(self.norm2(x)))


class Blocks(nn.Module):
    """``num_layers`` blocks and a norm, checkpointed in training if asked.  Parameters: ``blocks.i``, ``norm``."""

    def __init__(
        self,
        where: str,
        hidden_dim: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        use_checkpointing: bool,
    ) -> None:
        super().__init__()
        check_size(where, "num_layers", num_layers)
        check_width(where, hidden_dim, num_heads, dropout)
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, int | float):
            refuse(TypeError, where, "mlp_ratio", "a number above 0", mlp_ratio)
        if not 1 <= hidden_dim * mlp_ratio < float("inf"):
            refuse(ValueError, where, "mlp_ratio", "a number above 0 that gives a hidden channel at least", mlp_ratio)
        self.hidden_dim, self.use_checkpointing = hidden_dim, use_checkpointing
        self.blocks = nn.ModuleList(EncoderBlock(hidden_dim, num_heads, mlp_ratio, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)

    def _encode(self, x: Tensor, mask: Tensor | None) -> Tensor:
        run = checkpointed if self.use_checkpointing and self.training else call
        for block in self.blocks:
            x = run(block, x, mask)
        return hide(self.norm(x), mask)


class VisionEncoder(Blocks):
    """Images to patches: ``patch_embed`` with a learned position table, blocks, norm.

    Args:
        image_size: side of the images that the position table is made for; others resize it.
        patch_size: side of a patch.
        in_channels: of the images.
        hidden_dim: C; num_layers, num_heads, mlp_ratio, dropout: of the blocks.
        use_checkpointing: blocks keep nothing inside for backward while training.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        hidden_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 8,
        *,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        use_checkpointing: bool = False,
    ) -> None:
        where = "VisionEncoder"
        super().__init__(where, hidden_dim, num_layers, num_heads, mlp_ratio, dropout, use_checkpointing)
        side = check_size(where, "image_size", image_size) // check_size(where, "patch_size", patch_size)
        if side < 1:
            refuse(ValueError, where, "image_size", f"at least patch_size = {patch_size}", image_size)
        self.patch_embed = HierarchicalPatchEmbedding(in_channels, hidden_dim, patch_size, pos_grid=(side, side))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, in_channels, H, W] to [B, N, C], row by row; rows and columns that do not fill a patch are left out.

        mask: bool or integer [B, N], True or 1 takes part.  What other patches hold, NaN included, does not matter,
        and they give zeros.
        """
        where = "VisionEncoder"
        check_tensor(where, "images", images, "(B, in_channels, H, W)", 4)
        if mask is not None:
            P = self.patch_embed.patch_size
            rows, columns = images.shape[2] // P, images.shape[3] // P
            mask = check_mask(where, "mask", mask, (images.shape[0], rows * columns))
            # Before the projection, whose weights would take a gradient of 0 times NaN.
            pixels = mask.view(-1, 1, rows, columns).repeat_interleave(P, 2).repeat_interleave(P, 3)
            images = torch.where(pixels, images[..., : rows * P, : columns * P], 0.0)
        return self._encode(self.patch_embed(images), mask)


class TextEncoder(Blocks):
    """Words to tokens: ``token_embedding`` and ``position_embedding``, blocks that look both ways, norm.

    Args:
        vocab_size, max_length: of the two tables.
        hidden_dim: C; num_layers, num_heads, mlp_ratio, dropout, use_checkpointing: as in VisionEncoder.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        max_length: int = 512,
        hidden_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 8,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        use_checkpointing: bool = False,
    ) -> None:
        where = "TextEncoder"
        super().__init__(where, hidden_dim, num_layers, num_heads, mlp_ratio, dropout, use_checkpointing)
        self.token_embedding = nn.Embedding(check_size(where, "vocab_size", vocab_size), hidden_dim)
        self.position_embedding = nn.Embedding(check_size(where, "max_length", max_length), hidden_dim)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Integers [B, N] to [B, N, C].

        attention_mask: bool or integer [B, N], True or 1 takes part.  Other ids may be anything, and give zeros.
        """
        where = "TextEncoder"
        check_ids(where, "input_ids", input_ids)
        if input_ids.shape[1] > self.position_embedding.num_embeddings:
            most = self.position_embedding.num_embeddings
            refuse(ValueError, where, "input_ids", f"at most max_length = {most} words", input_ids)
        mask = None
        if attention_mask is not None:
            mask = check_mask(where, "attention_mask", attention_mask, tuple(input_ids.shape))
            input_ids = torch.where(mask, input_ids, 0)
        check_range(where, "input_ids", input_ids, self.token_embedding.num_embeddings)
        x = self.token_embedding(input_ids.long()) + self.position_embedding.weight[: input_ids.shape[1]]
        return self._encode(x, mask)


def check_ids(where: str, name: str, x: Any) -> Tensor:
    check_tensor(where, name, x, "of integers (B, N)", 2)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        refuse(TypeError, where, name, "a tensor of integers (B, N)", x)
    return x


def check_range(where: str, name: str, x: Tensor, count: int) -> None:
    """Integers from 0 to count - 1, where asking waits for no device and nothing traces or transforms."""
    asks = type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()
    if not asks or torch._C._are_functorch_transforms_active():
        return
    outside = x[(x < 0) | (x >= count)]
    if outside.numel():
        refuse(ValueError, where, name, f"values from 0 to {count - 1} where attention_mask is not 0", int(outside[0]))


def states(where: str, name: str, output: Any, width: int) -> Tensor:
    """The tokens [B, N, width] of an encoder's output: a tensor, or what a Hugging Face model returns."""
    tokens = check_tensor(where, f"output of {name}", getattr(output, "last_hidden_state", output), "(B, N, C)", 3)
    if tokens.shape[2] != width:
        refuse(ValueError, where, f"output of {name}", f"{width} channels", tokens)
    return tokens
