"""Fusion of vision with text in plain PyTorch: token by token (local), of whole sequences (global), and both.

``x2y`` attention has x as queries and y as keys.  Masks are True where a token takes part; what other tokens hold,
NaN included, matters neither forward nor backward, and rows of theirs come back as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._bank_reading import unit
from ._checks import check_choice, check_dropout, check_flag, check_mask, check_size, check_tensor, refuse
from ._config import REQUIRED, read_config
from .token_pool import POOLS, AdaptiveGlobalPooling
from .topk_attention import MultiheadAttention

INPUT_NORMS = ("none", "layernorm", "l2")
MODES = ("local", "global")
LOCAL_SETTINGS = {
    "hidden_dim": REQUIRED,
    "num_heads": 8,
    "dropout": 0.1,
    "topk": None,
    "axis": "keys",
    "select": "scores",
    "product": False,
    "apply_fusion": True,
    "input_norm": "none",
}
GLOBAL_SETTINGS = {"hidden_dim": REQUIRED, "num_heads": 8, "dropout": 0.1, "pool_types": POOLS}


class LocalFusionModule(nn.Module):
    """Vision attends to text and text to vision; each token is then joined with what it saw.

    Rows [v + f([v; v~]); t + f([t; t~])] with v~ = v2t_attn(v, t, t), t~ = t2v_attn(t, v, v) and one f for both:
    Linear, LayerNorm, GELU, Dropout.

    Args:
        hidden_dim: C of both.
        num_heads: divides hidden_dim.
        dropout: of the attention probabilities and of f.
        topk, axis, select: of both attentions, as in MultiheadAttention.
        product: f reads [x; x~; x * x~].
        apply_fusion: False leaves f out: rows [v + v~; t + t~].  Its parameters stay, so that checkpoints fit, but ask
            for no gradient.
        input_norm: what both inputs pass first: "layernorm" (one each), "l2" (rows of length 1) or "none".
        compat: None, or "seed": the layer as first written, which is apply_fusion=False without any option.

    Parameters: ``v2t_attn``, ``t2v_attn``, ``fusion.0`` (Linear), ``fusion.1`` (LayerNorm); with input_norm="layernorm"
    ``vision_norm`` and ``text_norm``.
    """

    attention: Callable[..., nn.Module] = MultiheadAttention

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int = 8,
        dropout: float = 0.1,
        *,
        topk: int | None = None,
        axis: str = "keys",
        select: str = "scores",
        product: bool = False,
        apply_fusion: bool = True,
        input_norm: str = "none",
        compat: str | None = None,
    ) -> None:
        super().__init__()
        where = "LocalFusionModule"
        check_width(where, hidden_dim, num_heads, dropout)
        check_flag(where, "product", product)
        check_flag(where, "apply_fusion", apply_fusion)
        check_choice(where, "input_norm", input_norm, INPUT_NORMS)
        if compat is not None:
            check_choice(where, "compat", compat, ("seed",))
            for name, x, default in (
                ("topk", topk, None),
                ("product", product, False),
                ("input_norm", input_norm, "none"),
            ):
                if x != default:
                    refuse(ValueError, where, name, f"{default!r}, because compat is 'seed'", x)
            apply_fusion = False
        if product and not apply_fusion:
            refuse(ValueError, where, "product", "False, because apply_fusion is False", product)
        self.hidden_dim, self.input_norm = hidden_dim, input_norm
        self.product, self.apply_fusion = product, apply_fusion
        options = {"dropout": dropout, "batch_first": True, "topk": topk, "axis": axis, "select": select}
        self.v2t_attn = self.attention(hidden_dim, num_heads, **options)
        self.t2v_attn = self.attention(hidden_dim, num_heads, **options)
        self.fusion = nn.Sequential(
            nn.Linear((3 if product else 2) * hidden_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
        )
        if not apply_fusion:
            self.fusion.requires_grad_(False)
        if input_norm == "layernorm":
            self.vision_norm, self.text_norm = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens of both to tokens of both, vision first.

        Args:
            vision_features: [B, N_v, C]; text_features: [B, N_t, C].
            vision_mask, attention_mask: bool or integer [B, N_v], [B, N_t], True or 1 takes part.

        Returns:
            [B, N_v + N_t, C]; a token that takes no part gives zeros.  Where a sample has no text (no patch), every
            patch (word) sees ``out_proj.bias``.

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where = "LocalFusionModule"
        names = "vision_features", "text_features"
        v, t, patches, words = check_pair(
            where, names, vision_features, text_features, self.hidden_dim, vision_mask, attention_mask
        )
        v, t = hide(v, patches), hide(t, words)
        if self.input_norm == "layernorm":
            v, t = self.vision_norm(v), self.text_norm(t)
        elif self.input_norm == "l2":
            v, t = (unit(x).to(x.dtype) for x in (v, t))
        seen = attend(self.v2t_attn, v, t, patches, words), attend(self.t2v_attn, t, v, words, patches)
        rows, seen = torch.cat([v, t], 1), torch.cat(seen, 1)
        rows = rows + (self._fuse(rows, seen) if self.apply_fusion else seen)
        return hide(rows, joint_mask(patches, words, v, t))

    def _fuse(self, rows: Tensor, seen: Tensor) -> Tensor:
        """f of [B, N, C] and what it saw."""
        return self.fusion(torch.cat([rows, seen, rows * seen] if self.product else [rows, seen], -1))

    def extra_repr(self) -> str:
        said = f"hidden_dim={self.hidden_dim}, input_norm={self.input_norm!r}"
        return said + (f", product={self.product}" if self.apply_fusion else ", apply_fusion=False")


class GlobalFusionModule(nn.Module):
    """One vector of vision, text and their local fusion.

    v, t, l = pools of the three; v~ = vision_attn(v, [t; l]), t~ = text_attn(t, [v; l]); fused = fusion([v~; t~]), an
    MLP: Linear, GELU, Dropout, Linear.

    Args:
        config: dict with hidden_dim and, if wanted, num_heads (8), dropout (0.1) and pool_types (of
            AdaptiveGlobalPooling); or the same as keyword arguments.

    Parameters: ``vision_pool``, ``text_pool``, ``local_pool``, ``vision_attn``, ``text_attn``, ``fusion.0``,
    ``fusion.3``.
    """

    attention: Callable[..., nn.Module] = MultiheadAttention
    pooling: Callable[..., nn.Module] = AdaptiveGlobalPooling

    def __init__(self, config: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__()
        where = "GlobalFusionModule"
        config = read_config(where, config, settings, GLOBAL_SETTINGS)
        C, heads, dropout = config["hidden_dim"], config["num_heads"], config["dropout"]
        check_width(where, C, heads, dropout)
        self.hidden_dim = C
        self.vision_pool, self.text_pool, self.local_pool = (self.pooling(C, config["pool_types"]) for _ in range(3))
        self.vision_attn = self.attention(C, heads, dropout=dropout, batch_first=True)
        self.text_attn = self.attention(C, heads, dropout=dropout, batch_first=True)
        self.fusion = nn.Sequential(nn.Linear(2 * C, C), nn.GELU(), nn.Dropout(dropout), nn.Linear(C, C))

    def forward(
        self,
        local: Tensor,
        vision: Tensor,
        text: Tensor,
        vision_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Three sequences to one vector.

        Args:
            local: [B, N_v + N_t, C], rows of vision first, as LocalFusionModule gives them; or [B, N_v, C].
            vision: [B, N_v, C]; text: [B, N_t, C].
            vision_mask, attention_mask: bool or integer [B, N_v], [B, N_t], True or 1 takes part; for local too.

        Returns:
            dict of [B, C]: fused_features; vision_global and text_global, v~ and t~; vision_pooled and text_pooled, v
            and t, which no other sequence has touched.

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where = "GlobalFusionModule"
        vision, text, patches, words = check_pair(
            where, ("vision", "text"), vision, text, self.hidden_dim, vision_mask, attention_mask
        )
        check_tensor(where, "local", local, "(B, N, C)", 3)
        joint = vision.shape[1] + text.shape[1]
        whole = local.shape[1] == joint
        if local.shape[::2] != vision.shape[::2] or not (whole or local.shape[1] == vision.shape[1]):
            expected = f"shape {(vision.shape[0], joint, vision.shape[2])}, or {vision.shape[1]} rows"
            refuse(ValueError, where, "local", expected, local)
        v, t = self.vision_pool(vision, patches), self.text_pool(text, words)
        both = self.local_pool(local, joint_mask(patches, words, vision, text) if whole else patches)
        seen_v, seen_t = (
            attention(x[:, None], others, others, need_weights=False)[0][:, 0]
            for attention, x, others in (
                (self.vision_attn, v, torch.stack([t, both], 1)),
                (self.text_attn, t, torch.stack([v, both], 1)),
            )
        )
        return {
            "fused_features": self.fusion(torch.cat([seen_v, seen_t], -1)),
            "vision_global": seen_v,
            "text_global": seen_t,
            "vision_pooled": v,
            "text_pooled": t,
        }


class FusionModule(nn.Module):
    """Local or global fusion under one name and three signatures.

        FusionModule(config)({"vision": v, "text": t})  ->  {"fused_features": [B, N_v + N_t, C]}
        FusionModule(config, mode="global")({"local": l, "vision": v, "text": t})  ->  that of GlobalFusionModule
        FusionModule(hidden_dim)(v, t)  ->  [B, N_v + N_t, C]

    Args:
        config_or_dim: hidden_dim, or a dict with it and other settings of the module behind; in a dict these go before
            num_heads and dropout.
        num_heads, dropout: of the module behind.
        mode: "local": LocalFusionModule.  "global": GlobalFusionModule.
        settings: more settings of that module.

    Parameters: those of the module behind, under ``fusion``.
    """

    local_class: Callable[..., nn.Module] = LocalFusionModule
    global_class: Callable[..., nn.Module] = GlobalFusionModule

    def __init__(
        self,
        config_or_dim: Mapping[str, Any] | int,
        num_heads: int = 8,
        dropout: float = 0.1,
        mode: str = "local",
        **settings: Any,
    ) -> None:
        super().__init__()
        where = "FusionModule"
        self.mode = check_choice(where, "mode", mode, MODES)
        if not isinstance(config_or_dim, Mapping):
            config_or_dim = {"hidden_dim": check_size(where, "config_or_dim", config_or_dim)}
        config = {"num_heads": num_heads, "dropout": dropout, **config_or_dim}
        known = LOCAL_SETTINGS if mode == "local" else GLOBAL_SETTINGS
        config = read_config(where, config, settings, known)
        self.fusion = self.local_class(**config) if mode == "local" else self.global_class(config)

    def forward(
        self,
        features: Mapping[str, Tensor] | Tensor,
        text: Tensor | None = None,
        *,
        vision_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """A dict of tokens to a dict with ``fused_features``; or vision [B, N_v, C] and text [B, N_t, C] to a tensor.

        Masks are those of the module behind.  ValueError or TypeError for what does not fit.
        """
        where = "FusionModule"
        masks = vision_mask, attention_mask
        if isinstance(features, Tensor):
            if self.mode == "global":
                refuse(
                    TypeError, where, "features", "a dict with local, vision and text, as mode is 'global'", features
                )
            return self.fusion(features, text, *masks)
        names = ("vision", "text") if self.mode == "local" else ("local", "vision", "text")
        if not isinstance(features, Mapping):
            refuse(TypeError, where, "features", f"a tensor, or a dict with {', '.join(names)}", features)
        if text is not None:
            refuse(TypeError, where, "text", "None beside a dict", text)
        if set(features) != set(names):
            refuse(ValueError, where, "features", f"exactly {', '.join(names)}", sorted(map(str, features)))
        fused = self.fusion(*(features[name] for name in names), *masks)
        return {"fused_features": fused} if self.mode == "local" else fused


class SparseLocalFusion(nn.Module):
    """Each patch reads its ``top_k`` best words: attn(vision, text, text).

    Args:
        hidden_dim: C of both.
        top_k: how many are kept; None: all.
        num_heads: divides hidden_dim.
        axis: "keys": each patch keeps its best words.  "queries": each word keeps its best patches, and a patch may
            keep none; it then gives ``attn.out_proj.bias``.
        select: "scores": by the attention scores, head by head.  "raw": by the dot products of vision and text, one
            selection for all heads.

    Parameters: ``attn``.
    """

    attention: Callable[..., nn.Module] = MultiheadAttention

    def __init__(
        self,
        hidden_dim: int,
        top_k: int | None = 64,
        num_heads: int = 8,
        *,
        axis: str = "keys",
        select: str = "scores",
    ) -> None:
        super().__init__()
        where = "SparseLocalFusion"
        check_width(where, hidden_dim, num_heads, 0.0)
        if top_k is not None:
            check_size(where, "top_k", top_k)
        self.hidden_dim, self.top_k = hidden_dim, top_k
        self.attn = self.attention(hidden_dim, num_heads, batch_first=True, topk=top_k, axis=axis, select=select)

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        vision_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """vision [B, N_v, C], text [B, N_t, C] to [B, N_v, C]; masks bool or integer [B, N_v], [B, N_t], True or 1
        takes part, and a patch that takes no part gives zeros.  ValueError or TypeError for what does not fit."""
        v, t, patches, words = check_pair(
            "SparseLocalFusion", ("vision", "text"), vision, text, self.hidden_dim, vision_mask, attention_mask
        )
        return hide(attend(self.attn, hide(v, patches), hide(t, words), patches, words), patches)


class CheckpointedFusionModule(nn.Module):
    """Local fusion, then global fusion; with ``use_checkpointing`` neither keeps its inner tensors for backward.

    Args:
        config: dict with the settings of LocalFusionModule, ``pool_types`` of GlobalFusionModule and
            ``use_checkpointing`` (False); or the same as keyword arguments.

    Parameters: ``local_fusion``, ``global_fusion``.

    Checkpointing works in training only, computes each forward twice, and gives the same gradients: dropout draws the
    same mask again.
    """

    local_class: Callable[..., nn.Module] = LocalFusionModule
    global_class: Callable[..., nn.Module] = GlobalFusionModule

    def __init__(self, config: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__()
        where = "CheckpointedFusionModule"
        known = {**LOCAL_SETTINGS, "pool_types": POOLS, "use_checkpointing": False}
        config = read_config(where, config, settings, known)
        self.use_checkpointing = check_flag(where, "use_checkpointing", config["use_checkpointing"])
        of_local, of_global = ({name: config[name] for name in s} for s in (LOCAL_SETTINGS, GLOBAL_SETTINGS))
        self.local_fusion, self.global_fusion = self.local_class(**of_local), self.global_class(of_global)

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        vision_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """vision [B, N_v, C], text [B, N_t, C] and masks to the dict of GlobalFusionModule."""
        masks = vision_mask, attention_mask
        run = checkpointed if self.use_checkpointing and self.training else call
        local = run(self.local_fusion, vision, text, *masks)
        return run(self.global_fusion, local, vision, text, *masks)


def call(module: nn.Module, *args: Any) -> Any:
    return module(*args)


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """module(*args), computed again in backward instead of kept, with the random numbers of the first time."""
    return checkpoint(module, *args, use_reentrant=False)


# What these modules share.


def check_width(where: str, hidden_dim: Any, num_heads: Any, dropout: Any) -> None:
    check_size(where, "hidden_dim", hidden_dim)
    if hidden_dim % check_size(where, "num_heads", num_heads):
        refuse(ValueError, where, "num_heads", f"a divisor of hidden_dim = {hidden_dim}", num_heads)
    check_dropout(where, dropout)


def check_pair(
    where: str, names: tuple[str, str], vision: Any, text: Any, width: int, vision_mask: Any, attention_mask: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both sequences, and both masks as bool."""
    for name, x in zip(names, (vision, text), strict=True):
        check_tensor(where, name, x, "(B, N, C)", 3)
        if x.shape[2] != width:
            refuse(ValueError, where, name, f"{width} channels", x)
    if text.shape[0] != vision.shape[0]:
        refuse(ValueError, where, names[1], f"the batch of {names[0]}, {vision.shape[0]}", text)
    if vision_mask is not None:
        vision_mask = check_mask(where, "vision_mask", vision_mask, tuple(vision.shape[:2]))
    if attention_mask is not None:
        attention_mask = check_mask(where, "attention_mask", attention_mask, tuple(text.shape[:2]))
    return vision, text, vision_mask, attention_mask


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, N, C], zero where the mask is False: a product would keep NaN."""
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def joint_mask(patches: Tensor | None, words: Tensor | None, vision: Tensor, text: Tensor) -> Tensor | None:
    """[B, N_v + N_t] of both masks, None where neither is given."""
    if patches is None and words is None:
        return None
    both = zip((patches, words), (vision, text), strict=True)
    return torch.cat([x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for m, x in both], 1)


def attend(attention: nn.Module, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
    """attention(x, y, y): where y_mask is False nothing is read, and keys that choose queries choose none outside
    x_mask."""
    options = {}
    if x_mask is not None and getattr(attention, "axis", "keys") == "queries":
        options["query_padding_mask"] = ~x_mask
    return attention(x, y, y, padding_of(y_mask), need_weights=False, **options)[0]


def padding_of(mask: Tensor | None) -> Tensor | None:
    """The mask in torch's convention; none where it has no entry, as torch's attention fails on that."""
    return None if mask is None or mask.numel() == 0 else ~mask
