"""Fusion of a pyramid of vision features with text, level by level, in plain PyTorch.

Each level's result adds the one before it, resized to the level's vision tokens; text tokens stay text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ._checks import (
    check_choice,
    check_dropout,
    check_grids,
    check_mask,
    check_scales,
    check_size,
    check_tensor,
    refuse,
)
from .cross_modal_fusion import attend, hide
from .scale_fusion import Grid, resize_tokens

INTERPOLATIONS = ("linear1d", "grid")


class CrossModalStage(nn.Module):
    """Vision attends to text and text to vision: rows [v + attention(v, t, t); t + attention(t, v, v)].

    Args:
        hidden_dim: C of both.
        num_heads: divides hidden_dim.
        dropout: of the attention probabilities.
        attention: the class of both attentions, torch.nn.MultiheadAttention or one built the same way.

    Parameters: ``v2t_attn`` and ``t2v_attn``.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int = 8,
        dropout: float = 0.1,
        attention: Callable[..., nn.Module] = nn.MultiheadAttention,
    ) -> None:
        super().__init__()
        where = "CrossModalStage"
        check_size(where, "hidden_dim", hidden_dim)
        if hidden_dim % check_size(where, "num_heads", num_heads):
            refuse(ValueError, where, "num_heads", f"a divisor of hidden_dim = {hidden_dim}", num_heads)
        check_dropout(where, dropout)
        self.v2t_attn = attention(hidden_dim, num_heads, dropout=dropout, batch_first=True)
        self.t2v_attn = attention(hidden_dim, num_heads, dropout=dropout, batch_first=True)

    def forward(self, vision: Tensor, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """vision [B, N_v, C], text [B, N_t, C] to [B, N_v + N_t, C]; attention_mask: bool [B, N_t], True takes part.

        Words that take no part give zeros, and what they hold does not matter, NaN included.
        """
        text = hide(text, attention_mask)
        to_text = attend(self.v2t_attn, vision, text, None, attention_mask)
        to_vision = attend(self.t2v_attn, text, vision, attention_mask, None)
        return torch.cat([vision + to_text, hide(text + to_vision, attention_mask)], 1)


class ProgressiveFusion(nn.Module):
    """out_0 = stage_0(v_0, t), out_i = stage_i(v_i, t) + scales_i * resize(out_(i-1)).

    Args:
        hidden_dim: C.
        num_stages: levels of the pyramid.
        interp: "linear1d" resizes the vision tokens as a sequence, "grid" as an image.
        return_last: return only the last level's result.
        stages: the fusion of each level: ``num_stages`` modules, or a function of hidden_dim that makes one; by default
            ``CrossModalStage``.  A stage maps (vision [B, N_v, C], text [B, N_t, C]) to [B, N_v + N_t, C], vision
            first, or [B, N_v, C]; it gets ``attention_mask=`` where the caller passes one.
        num_heads, dropout: of the default stages.

    Parameters: ``fusion_stages.i``; ``scales.i`` [1], of which the first is never used and asks for no gradient.
    """

    attention: Callable[..., nn.Module] = nn.MultiheadAttention  # of the default stages

    def __init__(
        self,
        hidden_dim: int,
        num_stages: int = 3,
        interp: str = "linear1d",
        return_last: bool = False,
        *,
        stages: Sequence[nn.Module] | Callable[[int], nn.Module] | None = None,
        num_heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        where = "ProgressiveFusion"
        self.hidden_dim = check_size(where, "hidden_dim", hidden_dim)
        self.num_stages = check_size(where, "num_stages", num_stages)
        self.interp = check_choice(where, "interp", interp, INTERPOLATIONS)
        if not isinstance(return_last, bool):
            refuse(TypeError, where, "return_last", "a bool", return_last)
        self.return_last = return_last
        if stages is None:
            stages = [CrossModalStage(hidden_dim, num_heads, dropout, self.attention) for _ in range(num_stages)]
        elif isinstance(stages, nn.ModuleList) or (isinstance(stages, Sequence) and not isinstance(stages, str)):
            stages = list(stages)
        elif callable(stages) and not isinstance(stages, nn.Module):
            stages = [stages(hidden_dim) for _ in range(num_stages)]
        else:
            refuse(TypeError, where, "stages", "a list of modules or a function that makes one", stages)
        if len(stages) != num_stages:
            refuse(ValueError, where, "stages", f"{num_stages} modules", len(stages))
        for i, stage in enumerate(stages):
            if not isinstance(stage, nn.Module):
                refuse(TypeError, where, f"stages[{i}]", "a torch.nn.Module", stage)
        self.fusion_stages = nn.ModuleList(stages)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(num_stages)])
        self.scales[0].requires_grad_(False)

    def forward(
        self,
        vision_pyramid: Sequence[Tensor],
        text: Tensor,
        grid_sizes: Sequence[Sequence[int]] | None = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> list[Tensor] | Tensor:
        """Fuses each level of the pyramid with the text and with the level before.

        Args:
            vision_pyramid: num_stages tensors [B, N_i, C], coarse or fine first.
            text: [B, N_t, C].
            grid_sizes: with interp="grid", (H_i, W_i) of each level; left out, every N_i must be a square number.
            attention_mask: bool or integer [B, N_t], True or 1 takes part.

        Returns:
            What the stages gave with the level before added, [B, N_i + N_t, C] (or [B, N_i, C]) each; with return_last
            the last one alone.

        Raises:
            ValueError, TypeError: an argument, or a stage's result, that does not fit.
        """
        where = "ProgressiveFusion"
        levels = check_scales(where, "vision_pyramid", vision_pyramid, [None] * self.num_stages)
        for i, x in enumerate(levels if self.num_stages > 1 else ()):
            if x.shape[1] == 0:
                refuse(ValueError, where, f"vision_pyramid[{i}]", "a token at least, to resize from or to", x)
        check_tensor(where, "text", text, "(B, N, C)", 3)
        if text.shape[0] != levels[0].shape[0]:
            refuse(ValueError, where, "text", f"the batch of vision_pyramid[0], {levels[0].shape[0]}", text)
        extra = {}
        if attention_mask is not None:
            extra["attention_mask"] = check_mask(where, "attention_mask", attention_mask, tuple(text.shape[:2]))
        if self.interp == "grid":
            grids = check_grids(where, "grid_sizes", levels, grid_sizes, "vision_pyramid")
        elif grid_sizes is None:
            grids = [(x.shape[1],) for x in levels]
        else:
            refuse(ValueError, where, "grid_sizes", "None, because interp is 'linear1d'", grid_sizes)
        outputs: list[Tensor] = []
        for i, (vision, stage) in enumerate(zip(levels, self.fusion_stages, strict=True)):
            fused = stage(vision, text, **extra)
            self._check_stage(i, fused, vision, text, outputs[-1] if outputs else None)
            if outputs:
                scale = self.scales[i].reshape(())  # without dimensions it leaves the dtype of tokens alone
                fused = self._add(fused, outputs[-1], scale, grids[i], grids[i - 1])
            outputs.append(fused)
        return outputs[-1] if self.return_last else outputs

    def _check_stage(self, i: int, fused: Tensor, vision: Tensor, text: Tensor, previous: Tensor | None) -> None:
        where, name = "ProgressiveFusion", f"result of stages[{i}]"
        check_tensor(where, name, fused, "(B, N, C)", 3)
        rows = vision.shape[1], vision.shape[1] + text.shape[1]
        if fused.shape[0] != vision.shape[0] or fused.shape[1] not in rows:
            refuse(ValueError, where, name, f"{vision.shape[0]} samples of {rows[0]} or {rows[1]} tokens", fused)
        if previous is not None and previous.shape[2] != fused.shape[2]:
            refuse(ValueError, where, name, f"{previous.shape[2]} channels, as the stage before it gave", fused)

    def _add(self, fused: Tensor, previous: Tensor, scale: Tensor, grid: Grid, previous_grid: Grid) -> Tensor:
        """fused + scale * previous, whose vision tokens are resized from previous_grid to grid."""
        n, m = math.prod(grid), math.prod(previous_grid)
        vision = fused[:, :n] + scale * resize_tokens(previous[:, :m], previous_grid, grid)
        rest = fused[:, n:]
        if previous.shape[1] > m and rest.shape[1]:
            rest = rest + scale * previous[:, m:]
        return torch.cat([vision, rest], 1) if rest.shape[1] else vision
