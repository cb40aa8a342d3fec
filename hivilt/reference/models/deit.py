"""DeiT in plain PyTorch: a vision transformer with a distillation token beside the class token  (arXiv 2012.12877).

z = [cls; dist; patches] + positions; after the blocks each of the two tokens has a classifier of its own.  Losses:
hivilt.losses.distillation_loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules._bank_arguments import check_number
from ..modules._checks import check_choice, check_dropout, check_flag, check_size, check_tensor, refuse
from ..modules._config import read_config
from ..modules._heads import check_heads
from ..modules._hugging_face import check_class, find, share_block, without_memory
from ..modules.vision_block import ACTIVATIONS, VisionBlock
from ..modules.window_attention import check_pair

DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "num_labels": 1000,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "layer_norm_eps": 1e-6,
}


class PatchEmbed(nn.Module):
    """``proj``: a convolution whose stride is its size.  ``norm``: over channels, where asked for."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int], norm: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, c, H, W] to tokens [B, N, C] and their grid."""
        maps = self.proj(images)
        return self.norm(maps.flatten(2).transpose(1, 2)), (maps.shape[2], maps.shape[3])


class DeiT(nn.Module):
    """DeiT with its two classifiers.

    Args:
        config: dict of what differs from DEFAULTS; keywords do the same.  Keys are those of transformers'
            DeiTConfig, ``num_labels`` and ``drop_path_rate``.  Defaults: the base model for 1000 classes.

    Parameters, named as in the DeiT repository and timm: ``cls_token``, ``dist_token``, ``pos_embed``,
    ``patch_embed.proj``, ``blocks.i.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}``, ``norm``, ``head``,
    ``head_dist``.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        where = "DeiT"
        c = SimpleNamespace(**read_config(where, config, options, DEFAULTS))
        for name in ("num_channels", "hidden_size", "num_hidden_layers", "intermediate_size", "num_labels"):
            check_size(where, name, getattr(c, name))
        check_number(where, "drop_path_rate", c.drop_path_rate, 0.0, 1.0)
        check_number(where, "layer_norm_eps", c.layer_norm_eps, 0.0, math.inf)
        check_choice(where, "hidden_act", c.hidden_act, tuple(ACTIVATIONS))
        check_flag(where, "qkv_bias", c.qkv_bias)
        check_heads(where, c.hidden_size, c.num_attention_heads, "num_attention_heads")
        image, patch = check_pair(where, "image_size", c.image_size), check_pair(where, "patch_size", c.patch_size)
        if any(side < size for side, size in zip(image, patch, strict=True)):
            refuse(ValueError, where, "patch_size", f"at most image_size = {image}", patch)
        dim = c.hidden_size
        self.num_channels, self.patch_size = c.num_channels, patch
        self.grid = tuple(side // size for side, size in zip(image, patch, strict=True))
        self.patch_embed = PatchEmbed(c.num_channels, dim, patch)
        self.cls_token, self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], dim))
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        self.pos_drop = nn.Dropout(check_dropout(where, c.hidden_dropout_prob))
        rates = torch.linspace(0, c.drop_path_rate, c.num_hidden_layers, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            VisionBlock(
                dim, c.num_attention_heads, qkv_bias=c.qkv_bias, hidden=c.intermediate_size,
                dropout=c.hidden_dropout_prob, attn_drop=c.attention_probs_dropout_prob, drop_path=rate,
                eps=c.layer_norm_eps, activation=c.hidden_act,
            )
            for rate in rates
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, c.layer_norm_eps)
        self.head, self.head_dist = nn.Linear(dim, c.num_labels), nn.Linear(dim, c.num_labels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images to classes.

        Args:
            images: [B, c, H, W], at least a patch high and wide.  Of another size than image_size, the positions are
                resized (bicubic).

        Returns:
            dict with cls_logits and distillation_logits [B, num_labels], and logits, their mean, which is the model's
            answer; losses take the other two.

        Raises:
            ValueError, TypeError: images that do not fit.
        """
        tokens = self.tokens(images)
        cls_logits, distillation_logits = self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])
        return {
            "logits": (cls_logits + distillation_logits) / 2,
            "cls_logits": cls_logits,
            "distillation_logits": distillation_logits,
        }

    def tokens(self, images: Tensor) -> Tensor:
        """Images to normed tokens [B, 2 + N, C]: class, distillation, patches."""
        where = "DeiT"
        check_tensor(where, "images", images, "(B, c, H, W)", 4)
        if images.shape[1] != self.num_channels:
            refuse(ValueError, where, "images", f"{self.num_channels} channels", images)
        if any(side < size for side, size in zip(images.shape[2:], self.patch_size, strict=True)):
            refuse(ValueError, where, "images", f"sides of at least {self.patch_size}", images)
        patches, grid = self.patch_embed(images)
        special = torch.cat([self.cls_token, self.dist_token], 1).expand(images.shape[0], -1, -1)
        x = self.pos_drop(torch.cat([special, patches], 1) + self._positions(grid))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        maps = self.pos_embed[:, 2:].transpose(1, 2).unflatten(2, self.grid)
        maps = F.interpolate(maps, grid, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :2], maps.flatten(2).transpose(1, 2)], 1)

    @classmethod
    def from_hf(cls, module: nn.Module) -> DeiT:
        """A model that shares the parameters and layers of transformers' DeiTForImageClassificationWithTeacher.

        Raises:
            TypeError: another module.
        """
        check_class(cls, module, "DeiTForImageClassificationWithTeacher")
        c, deit = module.config, module.deit
        known = {name: getattr(c, name) for name in DEFAULTS if hasattr(c, name)}
        known |= {"hidden_act": "gelu", "num_labels": module.cls_classifier.out_features}
        with without_memory():
            ours = cls(known)
        theirs = deit.embeddings
        ours.cls_token, ours.dist_token = theirs.cls_token, theirs.distillation_token
        ours.pos_embed, ours.patch_embed.proj = theirs.position_embeddings, theirs.patch_embeddings.projection
        for own, block in zip(ours.blocks, find(deit, "layers", "encoder.layer"), strict=True):
            share_block(own, block)
        ours.norm, ours.head, ours.head_dist = deit.layernorm, module.cls_classifier, module.distillation_classifier
        return ours.train(module.training)
