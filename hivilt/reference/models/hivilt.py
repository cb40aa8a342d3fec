"""HiViLT, a hierarchical transformer of vision and language, in plain PyTorch: both are encoded, fused token by token,
then as wholes, and the fused vector reads both once more.

    V = vision_proj(vision_encoder(images)), T = text_proj(text_encoder(text))
    L = local_fusion(V, T), g = global_fusion(L, V, T)
    output = output_proj(text_to_vision(g, V, V) + vision_to_text(g, T, T))

The contrastive embeddings come from V and T before any fusion: a vector that has seen its own text would give the
answer away.  Fused features serve classification and matching.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import GlobalFusionModule, LocalFusionModule, MultiheadAttention
from ..modules._checks import check_mask, check_size, check_tensor, refuse
from ..modules._config import REQUIRED, read_config
from ..modules.cross_modal_fusion import GLOBAL_SETTINGS, LOCAL_SETTINGS, call, check_flag, checkpointed, hide
from .encoders import TextEncoder, VisionEncoder, check_ids, states

NAME = "HierarchicalViLTransformer"
SETTINGS = {
    **LOCAL_SETTINGS,
    **GLOBAL_SETTINGS,
    "num_classes": 1000,
    "embed_dim": None,
    "vision_config": None,
    "text_config": None,
    "use_checkpointing": False,
}
VISION = {"image_size": 224, "patch_size": 16, "in_channels": 3}
TEXT = {"vocab_size": 30522, "max_length": 512}
BLOCKS = {"hidden_dim": None, "num_layers": 12, "num_heads": None, "mlp_ratio": 4.0, "dropout": 0.0}


class HierarchicalViLTransformer(nn.Module):
    """Images and text to classes, embeddings for retrieval, and whether they match.

    Args:
        config: dict of settings, or the same as keyword arguments; an unknown one raises.
            hidden_dim: C of all that is fused (required).  num_heads (8), dropout (0.1): of the fusion.
            num_classes (1000), embed_dim (C): of the heads.
            topk, axis, select, product, apply_fusion, input_norm: of LocalFusionModule.
            pool_types: of GlobalFusionModule.
            vision_config: dict of image_size (224), patch_size (16), in_channels (3), hidden_dim (C), num_layers (12),
                num_heads (as above), mlp_ratio (4.0), dropout (0.0).
            text_config: dict of vocab_size (30522), max_length (512), and from hidden_dim on the same.
            use_checkpointing (False): encoder blocks and fusions keep nothing inside for backward while training.
        vision_encoder: module called with (images), in place of ours; gives tokens [B, N, C_v], or an object that has
            them as ``last_hidden_state``.  vision_config then says hidden_dim, C_v, and ``prefix_tokens`` (0), how many
            tokens to drop in front: class token and registers.
        text_encoder: module called with input_ids= and attention_mask= [B, N_t]; gives [B, N_t, C_t] likewise.
            text_config then says hidden_dim, C_t.

    Parameters: ``vision_encoder``, ``text_encoder``; ``vision_proj`` and ``text_proj``, Linear where the widths differ
    from C; ``local_fusion``, ``global_fusion``, ``cross_attention.vision_to_text``, ``cross_attention.text_to_vision``,
    ``output_proj``; ``vision_head``, ``text_head`` and ``itm_head``.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        vision_encoder: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = read_config(NAME, config, settings, SETTINGS)
        C = check_size(NAME, "hidden_dim", config["hidden_dim"])
        self.hidden_dim = C
        self.use_checkpointing = check_flag(NAME, "use_checkpointing", config["use_checkpointing"])
        for name, given in (("vision_encoder", vision_encoder), ("text_encoder", text_encoder)):
            if given is not None and not isinstance(given, nn.Module):
                refuse(TypeError, NAME, name, "a torch.nn.Module or None", given)
        blocks = {**BLOCKS, "hidden_dim": C, "num_heads": config["num_heads"]}
        more = {"use_checkpointing": self.use_checkpointing}
        self.prefix_tokens = 0
        if vision_encoder is None:
            of_vision = read_config(f"{NAME}: vision_config", config["vision_config"], {}, {**VISION, **blocks})
            vision_encoder = VisionEncoder(**of_vision, **more)
        else:
            known = {"hidden_dim": REQUIRED, "prefix_tokens": 0}
            of_vision = read_config(f"{NAME}: vision_config", config["vision_config"], {}, known)
            self.prefix_tokens = of_vision["prefix_tokens"]
            if self.prefix_tokens != 0:
                check_size(f"{NAME}: vision_config", "prefix_tokens", self.prefix_tokens)
        if text_encoder is None:
            of_text = read_config(f"{NAME}: text_config", config["text_config"], {}, {**TEXT, **blocks})
            text_encoder = TextEncoder(**of_text, **more)
        else:
            of_text = read_config(f"{NAME}: text_config", config["text_config"], {}, {"hidden_dim": REQUIRED})
        self.vision_encoder, self.text_encoder = vision_encoder, text_encoder
        self.vision_dim, self.text_dim = (
            check_size(f"{NAME}: {name}_config", "hidden_dim", x["hidden_dim"])
            for name, x in (("vision", of_vision), ("text", of_text))
        )
        self.vision_proj = nn.Identity() if self.vision_dim == C else nn.Linear(self.vision_dim, C)
        self.text_proj = nn.Identity() if self.text_dim == C else nn.Linear(self.text_dim, C)
        self.local_fusion = LocalFusionModule(**{name: config[name] for name in LOCAL_SETTINGS})
        self.global_fusion = GlobalFusionModule({name: config[name] for name in GLOBAL_SETTINGS})
        attention = {"num_heads": config["num_heads"], "dropout": config["dropout"], "batch_first": True}
        self.cross_attention = nn.ModuleDict(
            {name: MultiheadAttention(C, **attention) for name in ("vision_to_text", "text_to_vision")}
        )
        self.output_proj = nn.Linear(C, check_size(NAME, "num_classes", config["num_classes"]))
        E = C if config["embed_dim"] is None else check_size(NAME, "embed_dim", config["embed_dim"])
        self.vision_head, self.text_head = nn.Linear(C, E, bias=False), nn.Linear(C, E, bias=False)
        self.itm_head = nn.Linear(C, 2)

    def forward(
        self,
        images: Tensor,
        text: Tensor,
        attention_mask: Tensor | None = None,
        vision_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Pairs of images and texts.

        Args:
            images: [B, in_channels, H, W].
            text: integers [B, N_t].
            attention_mask, vision_mask: bool or integer [B, N_t], [B, N_v], True or 1 takes part.  What other words and
                patches hold does not matter; within another vision_encoder than ours, patches still see each other.

        Returns:
            dict with output [B, num_classes] (logits); vision_features [B, N_v, C] and text_features [B, N_t, C], V and
            T, zero where masked; local_fusion [B, N_v + N_t, C]; global_fusion [B, C]; pooled [B, C], what output_proj
            reads; itm_logits [B, 2] (1: they match); vision_embed and text_embed [B, embed_dim], of length 1 (0 where
            nothing takes part), float32 for half types.

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        V, patches = self._encode_images(images, vision_mask)
        T, words = self._encode_text(text, attention_mask)
        if T.shape[0] != V.shape[0]:
            refuse(ValueError, NAME, "text", f"the batch of images, {V.shape[0]}", text)
        run = checkpointed if self.use_checkpointing and self.training else call
        local = run(self.local_fusion, V, T, patches, words)
        whole = run(self.global_fusion, local, V, T, patches, words)
        fused = whole["fused_features"]
        seen = (
            attention(fused[:, None], tokens, tokens, None if mask is None else ~mask, need_weights=False)[0][:, 0]
            for attention, tokens, mask in (
                (self.cross_attention["text_to_vision"], V, patches),
                (self.cross_attention["vision_to_text"], T, words),
            )
        )
        pooled = sum(seen)
        return {
            "output": self.output_proj(pooled),
            "vision_features": V,
            "text_features": T,
            "local_fusion": local,
            "global_fusion": fused,
            "vision_embed": unit(self.vision_head(whole["vision_pooled"])),
            "text_embed": unit(self.text_head(whole["text_pooled"])),
            "itm_logits": self.itm_head(fused),
            "pooled": pooled,
        }

    def encode_images(self, images: Tensor, vision_mask: Tensor | None = None) -> Tensor:
        """[B, in_channels, H, W] to vision_embed [B, embed_dim]: the one of forward, without text."""
        V, patches = self._encode_images(images, vision_mask)
        return unit(self.vision_head(self.global_fusion.vision_pool(V, patches)))

    def encode_text(self, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, N_t] to text_embed [B, embed_dim]: the one of forward, without images."""
        T, words = self._encode_text(text, attention_mask)
        return unit(self.text_head(self.global_fusion.text_pool(T, words)))

    @staticmethod
    def similarity(vision_embed: Tensor, text_embed: Tensor) -> Tensor:
        """Cosines [B, M] of every image [B, E] with every text [M, E]."""
        check_tensor(NAME, "vision_embed", vision_embed, "(B, E)", 2)
        check_tensor(NAME, "text_embed", text_embed, "(M, E)", 2)
        if vision_embed.shape[1] != text_embed.shape[1]:
            refuse(ValueError, NAME, "text_embed", f"{vision_embed.shape[1]} channels, as vision_embed has", text_embed)
        return unit(vision_embed) @ unit(text_embed).T

    def _encode_images(self, images: Tensor, vision_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """V [B, N_v, C] and the mask as bool."""
        check_tensor(NAME, "images", images, "(B, in_channels, H, W)", 4)
        if isinstance(self.vision_encoder, VisionEncoder):
            tokens = self.vision_encoder(images, vision_mask)
        else:
            tokens = states(NAME, "vision_encoder", self.vision_encoder(images), self.vision_dim)
            if tokens.shape[1] < self.prefix_tokens:
                expected = f"at least the {self.prefix_tokens} prefix_tokens of vision_config"
                refuse(ValueError, NAME, "output of vision_encoder", expected, tokens)
            tokens = tokens[:, self.prefix_tokens :]
        if vision_mask is None:
            return self.vision_proj(tokens), None
        patches = check_mask(NAME, "vision_mask", vision_mask, tuple(tokens.shape[:2]))
        return hide(self.vision_proj(hide(tokens, patches)), patches), patches

    def _encode_text(self, text: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """T [B, N_t, C] and the mask as bool."""
        check_ids(NAME, "text", text)
        words = None
        if attention_mask is not None:
            words = check_mask(NAME, "attention_mask", attention_mask, tuple(text.shape))
            text = torch.where(words, text, 0)
        tokens = self.text_encoder(input_ids=text, attention_mask=None if words is None else words.long())
        tokens = states(NAME, "text_encoder", tokens, self.text_dim)
        return hide(self.text_proj(hide(tokens, words)), words), words


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, float32 for half types; zeros stay zeros, without a gradient."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, x / torch.where(length > 0, length, 1.0), 0.0)
