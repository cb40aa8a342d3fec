"""Swin Transformer in plain PyTorch: window attention, shifted in every second block, and merging of 2 x 2 patches
between the stages  (arXiv 2103.14030)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules._bank_arguments import check_number
from ..modules._checks import (
    check_choice,
    check_dropout,
    check_flag,
    check_size,
    check_sizes,
    check_tensor,
    refuse,
)
from ..modules._config import read_config
from ..modules._hugging_face import check_class, find, share_block, without_memory
from ..modules.vision_block import ACTIVATIONS
from ..modules.window_attention import Pair, SwinBlock, check_pair
from .deit import PatchEmbed

DEFAULTS = {
    "image_size": 224,
    "patch_size": 4,
    "num_channels": 3,
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "use_absolute_embeddings": False,
    "layer_norm_eps": 1e-5,
    "num_labels": None,
}


class PatchMerging(nn.Module):
    """2 x 2 tokens of C channels become one of 2 C: ``norm`` over 4 C, ``reduction`` without bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, grid: Pair) -> tuple[Tensor, Pair]:
        """[B, H W, C] and (H, W) to [B, H' W', 2 C] and (H', W'), halves rounded up; what is missing is 0."""
        x = x.unflatten(1, grid)
        x = F.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x.flatten(1, 2))), (x.shape[1], x.shape[2])


class SwinStage(nn.Module):
    """``blocks``, the odd ones shifted, and ``downsample`` (PatchMerging) in all stages but the last."""

    def __init__(self, dim: int, heads: int, window: int, rates: list[float], merges: bool, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(dim, heads, window, window // 2 if j % 2 else 0, drop_path=rate, **options)
            for j, rate in enumerate(rates)
        )
        self.downsample = PatchMerging(dim) if merges else None

    def forward(self, x: Tensor, grid: Pair) -> Tensor:
        for block in self.blocks:
            x = block(x, grid)
        return x


class SwinTransformer(nn.Module):
    """Swin Transformer.

    Args:
        config: dict of what differs from DEFAULTS; keywords do the same.  Keys are those of transformers'
            SwinConfig and ``num_labels`` (None: no classifier).  Defaults: the tiny model.  ``image_size`` is only
            needed for use_absolute_embeddings.

    Parameters, named as in the Swin repository: ``patch_embed.{proj,norm}``,
    ``layers.i.blocks.j.{norm1,attn.qkv,attn.proj,attn.relative_position_bias_table,norm2,mlp.fc1,mlp.fc2}``,
    ``layers.i.downsample.{norm,reduction}``, ``norm``; ``head`` and ``absolute_pos_embed`` where asked for.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        where = "SwinTransformer"
        c = SimpleNamespace(**read_config(where, config, options, DEFAULTS))
        for name in ("num_channels", "embed_dim", "window_size"):
            check_size(where, name, getattr(c, name))
        check_number(where, "drop_path_rate", c.drop_path_rate, 0.0, 1.0)
        check_number(where, "layer_norm_eps", c.layer_norm_eps, 0.0, math.inf)
        check_choice(where, "hidden_act", c.hidden_act, tuple(ACTIVATIONS))
        check_flag(where, "qkv_bias", c.qkv_bias)
        check_flag(where, "use_absolute_embeddings", c.use_absolute_embeddings)
        if check_number(where, "mlp_ratio", c.mlp_ratio, 0.0, math.inf) * c.embed_dim < 1:
            refuse(ValueError, where, "mlp_ratio", "room for a channel in the MLP of the first stage", c.mlp_ratio)
        if isinstance(c.depths, str) or not hasattr(c.depths, "__len__"):
            refuse(TypeError, where, "depths", "a tuple of sizes", c.depths)
        depths = check_sizes(where, "depths", c.depths, max(1, len(c.depths)))
        heads = check_sizes(where, "num_heads", c.num_heads, len(depths))
        self.num_channels, self.patch_size = c.num_channels, check_pair(where, "patch_size", c.patch_size)
        self.patch_embed = PatchEmbed(c.num_channels, c.embed_dim, self.patch_size, norm=True)
        image = check_pair(where, "image_size", c.image_size)
        self.grid = tuple(-(-side // size) for side, size in zip(image, self.patch_size, strict=True))
        self.absolute_pos_embed = None
        if c.use_absolute_embeddings:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], c.embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(check_dropout(where, c.hidden_dropout_prob))
        rates = torch.linspace(0, c.drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList(
            SwinStage(
                c.embed_dim * 2**i, heads[i], c.window_size, rates[i].tolist(), i + 1 < len(depths),
                mlp_ratio=c.mlp_ratio, qkv_bias=c.qkv_bias, dropout=c.hidden_dropout_prob,
                attn_drop=c.attention_probs_dropout_prob, eps=c.layer_norm_eps, activation=c.hidden_act,
            )
            for i in range(len(depths))
        )  # fmt: skip
        width = c.embed_dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(width, c.layer_norm_eps)
        self.head = None if c.num_labels is None else nn.Linear(width, check_size(where, "num_labels", c.num_labels))

    def forward(self, images: Tensor) -> Tensor:
        """Images to tokens or classes.

        Args:
            images: [B, c, H, W] of any size; zeros fill the last patches, windows and groups of 2 x 2.

        Returns:
            Without num_labels the normed tokens of the last stage [B, N, C], row by row; with it logits [B, num_labels]
            of their mean.

        Raises:
            ValueError, TypeError: images that do not fit.
        """
        tokens, _ = self._stages(images)[-1]
        tokens = self.norm(tokens)
        return tokens if self.head is None else self.head(tokens.mean(1))

    def features(self, images: Tensor) -> list[Tensor]:
        """The stages' maps [B, C 2^i, H_i, W_i], before merging and without the last norm, the finest first: what
        heads for segmentation and hivilt.nn.CrossScaleFusion take."""
        return [x.transpose(1, 2).unflatten(2, grid) for x, grid in self._stages(images)]

    def _stages(self, images: Tensor) -> list[tuple[Tensor, Pair]]:
        where = "SwinTransformer"
        check_tensor(where, "images", images, "(B, c, H, W)", 4)
        if images.shape[1] != self.num_channels or 0 in images.shape[2:]:
            refuse(ValueError, where, "images", f"{self.num_channels} channels and no side of 0", images)
        bottom, right = (-side % size for side, size in zip(images.shape[2:], self.patch_size, strict=True))
        x, grid = self.patch_embed(F.pad(images, (0, right, 0, bottom)))
        if self.absolute_pos_embed is not None:
            x = x + self._positions(grid)
        x, found = self.pos_drop(x), []
        for stage in self.layers:
            x = stage(x, grid)
            found.append((x, grid))
            if stage.downsample is not None:
                x, grid = stage.downsample(x, grid)
        return found

    def _positions(self, grid: Pair) -> Tensor:
        if grid == self.grid:
            return self.absolute_pos_embed
        maps = self.absolute_pos_embed.transpose(1, 2).unflatten(2, self.grid)
        return F.interpolate(maps, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    @classmethod
    def from_hf(cls, module: nn.Module) -> SwinTransformer:
        """A model that shares the parameters and layers of transformers' SwinModel or SwinForImageClassification.

        Raises:
            TypeError: another module.
        """
        classifies = check_class(cls, module, "SwinModel", "SwinForImageClassification") != "SwinModel"
        swin, head = (module.swin, module.classifier) if classifies else (module, None)
        known = {name: getattr(module.config, name) for name in DEFAULTS if hasattr(module.config, name)}
        known |= {"hidden_act": "gelu", "num_labels": head.out_features if isinstance(head, nn.Linear) else None}
        with without_memory():
            ours = cls(known)
        theirs = swin.embeddings
        ours.patch_embed.proj, ours.patch_embed.norm = theirs.patch_embeddings.projection, theirs.norm
        if ours.absolute_pos_embed is not None:
            ours.absolute_pos_embed = theirs.position_embeddings
        for own, stage in zip(ours.layers, swin.encoder.layers, strict=True):
            for block, original in zip(own.blocks, stage.blocks, strict=True):
                share_block(block, original)
                holder = find(original.attention, "relative_position_bias", "self")
                block.attn.relative_position_bias_table = holder.relative_position_bias_table
            if own.downsample is not None:
                own.downsample.norm, own.downsample.reduction = stage.downsample.norm, stage.downsample.reduction
        ours.norm = swin.layernorm
        if ours.head is not None:
            ours.head = head
        return ours.train(module.training)
