"""HiViT, a vision transformer of parallel scales, in plain PyTorch: every scale keeps its own tokens from the image to
the head, and all scales meet in every layer.

With E_s the tokens of scale s, layer by layer:

    A_s = E_s + attention_s(norm1_s(E_s))                   every scale attends to itself
    F   = GELU(LN(sum_s Up_s(W_s A_s) + b))                 on the grid of the finest scale, Up_s is (bi-) linear
    B_s = A_s + X_s area_pool_s(F)                          every scale takes its share of what was fused
    E_s = B_s + MLP_s(norm2_s(B_s))

and after the last one f = LN(sum_s softmax(w)_s O_s mean(E_s)), logits = head(f).  Each branch that is added is subject
to drop path (Huang et al., Deep networks with stochastic depth, 2016).  With ``fusion_layers`` above 1, F runs through
so many more Linear, LN, GELU.  This is not the HiViT of arXiv 2205.14949, which has serial stages.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules._bank_arguments import check_number
from ..modules._checks import check_choice, check_dropout, check_mask, check_size, check_sizes, check_tensor, refuse
from ..modules.bank_retrieval import FeatureBank
from ..modules.multi_scale_attention import (
    CrossScaleAttention,
    EfficientScaleProcessor,
    MultiScaleAttention,
    ScaleExtraction,
    check_flag,
    check_heads,
    masks_of_scales,
)
from ..modules.scale_fusion import AdaptiveFusion, CrossScaleFusion, Grid, halving_widths

CROSS_SCALE = ("fusion", "attention")
AGGREGATES = ("adaptive", "mean")
DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "in_channels": 3,
    "num_classes": 1000,
    "hidden_dim": 192,
    "num_heads": 8,
    "num_layers": 12,
    "patch_size": 16,
    "num_scales": 3,
    "mlp_ratio": 4.0,
    "dropout": 0.1,
    "drop_path_rate": 0.1,
    "fusion_layers": 2,
    "cross_scale": "fusion",
    "aggregate": "adaptive",
    "pos_embed": True,
    "bank_size": 10000,
    "bank_topk": 100,
    "use_bank": False,
}
VARIANTS = {
    "tiny": {"hidden_dim": 96, "num_heads": 8, "num_layers": 12},
    "small": {"hidden_dim": 128, "num_heads": 8, "num_layers": 12},
    "base": {"hidden_dim": 192, "num_heads": 12, "num_layers": 12},
    "large": {"hidden_dim": 256, "num_heads": 16, "num_layers": 24},
}


def merge_config(where: str, config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """A config of all keys, each with a legal value."""
    if config is not None and not isinstance(config, Mapping):
        refuse(TypeError, where, "config", "a dict or None", config)
    given = {**(config or {}), **options}
    if unknown := sorted(map(str, set(given) - set(DEFAULTS))):
        refuse(ValueError, where, "config", f"keys out of {', '.join(DEFAULTS)}", unknown)
    c = DEFAULTS | given
    for name in ("in_channels", "num_classes", "num_layers", "patch_size", "num_scales", "fusion_layers", "bank_size"):
        c[name] = check_size(where, name, c[name])
    c["bank_topk"] = check_size(where, "bank_topk", c["bank_topk"])
    check_heads(where, c["hidden_dim"], c["num_heads"])
    halving_widths(where, c["hidden_dim"], c["num_scales"])
    size = c["image_size"]
    c["image_size"] = (check_size(where, "image_size", size),) * 2 if isinstance(size, int) else size
    c["image_size"] = check_sizes(where, "image_size", c["image_size"], 2)
    coarsest = c["patch_size"] << (c["num_scales"] - 1)
    if min(c["image_size"]) < coarsest:
        refuse(ValueError, where, "image_size", f"at least the coarsest patch, {coarsest}", size)
    if check_number(where, "mlp_ratio", c["mlp_ratio"], 0.0, math.inf) * (c["hidden_dim"] >> (c["num_scales"] - 1)) < 1:
        refuse(ValueError, where, "mlp_ratio", "room for a channel in the MLP of the coarsest scale", c["mlp_ratio"])
    check_dropout(where, c["dropout"])
    if not 0.0 <= check_number(where, "drop_path_rate", c["drop_path_rate"], 0.0, 1.0) < 1.0:
        refuse(ValueError, where, "drop_path_rate", "a number from 0 to below 1", c["drop_path_rate"])
    check_choice(where, "cross_scale", c["cross_scale"], CROSS_SCALE)
    check_choice(where, "aggregate", c["aggregate"], AGGREGATES)
    if c["cross_scale"] == "attention" and c["num_scales"] < 2:
        refuse(ValueError, where, "num_scales", "at least 2, because cross_scale is 'attention'", c["num_scales"])
    check_flag(where, "pos_embed", c["pos_embed"])
    if c["use_bank"] is not False and c["use_bank"] != "residual":
        refuse(ValueError, where, "use_bank", "False or 'residual'", c["use_bank"])
    return c


class HiViTBlock(nn.Module):
    """What a layer has beside its attention and its fusion: norms, the way back to the scales, an MLP per scale.

    Args:
        hidden_dim: C; scale s has C / 2^s channels.
        num_scales: S.
        mlp_ratio: hidden channels of an MLP, as a multiple of its own.
        dropout: behind both layers of an MLP.
        drop_path: the probability by which a sample leaves out a branch, in training.

    Parameters: ``norms1.s``, ``extraction.projs.s``, ``norms2.s``, ``mlps.s``.
    """

    def __init__(self, hidden_dim: int, num_scales: int, mlp_ratio: float, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.extraction = ScaleExtraction(hidden_dim, num_scales)
        self.norms1, self.norms2, self.mlps = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.drop_path = drop_path
        for width in self.extraction.dims:
            inner = int(width * mlp_ratio)
            self.norms1.append(nn.LayerNorm(width))
            self.norms2.append(nn.LayerNorm(width))
            self.mlps.append(
                nn.Sequential(
                    nn.Linear(width, inner),
                    nn.GELU(),
                    nn.Dropout(dropout),
                    nn.Linear(inner, width),
                    nn.Dropout(dropout),
                )
            )

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + branch, which a sample [B] leaves out with probability ``drop_path`` and else scales to keep its mean."""
        if not self.training or self.drop_path == 0.0:
            return x + branch
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
        return x + torch.where(kept, branch / (1.0 - self.drop_path), 0.0)

    def forward(
        self,
        features: list[Tensor],
        attention: nn.Module,
        fusions: Sequence[nn.Module],
        grids: list[Grid],
        masks: list[Tensor] | None,
        need_weights: bool,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """One layer: tokens [B, N_s, C_s] of the scales in ``grids`` to the same, and the attention's probabilities."""
        active = len(features)
        normed = [norm(x) for norm, x in zip(self.norms1, features, strict=False)]
        found = attention(normed, need_weights, masks, num_scales=active)
        features = self.add_all(features, found["scale_features"], masks)
        how = {} if masks is None or not isinstance(fusions[0], CrossScaleAttention) else {"masks": masks}
        fused = fusions[0](features, grids, **how, num_scales=active)
        for deeper in fusions[1:]:
            fused = deeper([fused], grids[:1])
        features = self.add_all(features, self.extraction(fused, grids, masks=masks), masks)
        branches = [
            mlp(norm(x)) for mlp, norm, x in zip(self.mlps, self.norms2, features, strict=False)
        ]  # fewer features where not all scales are active
        return self.add_all(features, branches, masks), found["attention_weights"]

    def add_all(self, features: list[Tensor], branches: list[Tensor], masks: list[Tensor] | None) -> list[Tensor]:
        """Sums of all scales; masked tokens stay zeros, as the finest grid interpolates between all of them."""
        sums = [self.add(x, branch) for x, branch in zip(features, branches, strict=True)]
        if masks is None:
            return sums
        return [torch.where(mask[..., None], x, 0.0) for mask, x in zip(masks, sums, strict=True)]

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:.3g}"


class HiViT(nn.Module):
    """Image classifier of S parallel scales: scale s has patches of P 2^s pixels and C / 2^s channels.

    Args:
        config: dict of the keys below, each of which may be a keyword instead; an unknown one raises.
        image_size: side, or (H, W), of the images that position tables are made for; others are legal.
        in_channels, num_classes: of images, of logits.
        hidden_dim, num_heads, num_layers, patch_size, num_scales: C, H (a divisor of C), L, P, S.
        mlp_ratio: hidden channels of the MLPs as a multiple of their own.
        dropout: of attention probabilities, fusion and MLPs.
        drop_path_rate: of the last layer; layer l has l / (L - 1) of it.
        fusion_layers: depth of the fusion: the first joins the scales, each further one is Linear, LayerNorm, GELU.
        cross_scale: "fusion" interpolates and projects; "attention": the finest tokens attend to all coarser ones.
        aggregate: "adaptive" learns the share of each scale in the features, with "mean" all count the same.
        pos_embed: a learned position table per scale, resized to other grids.
        bank_size, bank_topk: rows of the feature bank, and how many of them are read.
        use_bank: "residual" adds ``bank_gain`` (a parameter, 0.1 at first) times what the bank holds near the features;
            False only writes the bank.

    Parameters: ``patch_embeddings.scale_s``, ``attention_blocks.l``, ``fusion_layers.l``, ``deeper_fusions.l.j``,
    ``blocks.l``, ``out_projs.s``, ``aggregation.scale_weights``, ``norm``, ``head``; buffers: ``feature_bank``.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.config = c = merge_config(type(self).__name__, config, options)
        C, S, L, dropout = c["hidden_dim"], c["num_scales"], c["num_layers"], c["dropout"]
        self.hidden_dim, self.num_scales, self.num_layers = C, S, L
        self.num_heads, self.patch_size = c["num_heads"], c["patch_size"]
        self.patch_embeddings = EfficientScaleProcessor(
            S, C, c["patch_size"], c["in_channels"], pos_size=c["image_size"] if c["pos_embed"] else None
        )
        self.attention_blocks = nn.ModuleList(MultiScaleAttention(C, c["num_heads"], dropout, S) for _ in range(L))
        if c["cross_scale"] == "fusion":
            self.fusion_layers = nn.ModuleList(CrossScaleFusion(C, S, dropout) for _ in range(L))
        else:
            self.fusion_layers = nn.ModuleList(CrossScaleAttention(C, c["num_heads"], dropout, S) for _ in range(L))
        self.deeper_fusions = nn.ModuleList(
            nn.ModuleList(CrossScaleFusion(C, 1, dropout) for _ in range(c["fusion_layers"] - 1)) for _ in range(L)
        )
        rates = [c["drop_path_rate"] * layer / max(1, L - 1) for layer in range(L)]
        self.blocks = nn.ModuleList(HiViTBlock(C, S, c["mlp_ratio"], dropout, rate) for rate in rates)
        self.out_projs = nn.ModuleList(nn.Linear(C >> s, C) for s in range(S))
        self.aggregation = AdaptiveFusion(S) if c["aggregate"] == "adaptive" else None
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, c["num_classes"])
        # Length C^(1/2) is what a LayerNorm gives: this scale keeps the softmax over the bank as soft as attention.
        self.feature_bank = FeatureBank(c["bank_size"], C, topk=c["bank_topk"], scale=C**-0.5)
        self.use_bank = c["use_bank"]
        if self.use_bank:
            self.bank_gain = nn.Parameter(torch.full((), 0.1))
        else:
            self.register_parameter("bank_gain", None)
        self._warned = False

    def _active(self) -> int:
        return self.num_scales

    def forward(
        self,
        images: Tensor,
        attention_mask: Tensor | None = None,
        *,
        need_weights: bool = False,
        return_retrieved: bool = False,
        update_bank: bool | None = None,
    ) -> dict[str, Any]:
        """Classifies images.

        Args:
            images: [B, in_channels, H, W]; H and W are at least the coarsest patch.  Rows and columns that do not fill
                a patch of a scale are left out on that scale, so grids need not be halves of each other: 224 pixels in
                patches of 16 are 14, 7 and 3 to a side.  The first such image is pointed out by a warning.
            attention_mask: bool or integer [B, N_0], the patches of the finest scale; True or 1 takes part.  Pixels of
                other patches may hold anything, NaN included.  Interpolation next to them blends in zeros, so a padded
                image is near to, but not bit for bit, the image cut out.
            need_weights: also return the attention's probabilities.
            return_retrieved: also return what was read from the bank.
            update_bank: whether the features enter the bank, without gradients; by default in training only.  They
                enter it after it was read.

        Returns:
            dict: ``logits`` [B, K]; ``features`` [B, C]; ``scale_features``, the tokens [B, N_s, C_s] of every scale;
            on request ``attention_weights``, per layer a list of [B, H, N_s, N_s], and ``retrieved`` [B, C].

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where = type(self).__name__
        self._check(where, images, need_weights, return_retrieved, update_bank)
        active = self._active()
        masks, sides = None, [self.patch_size << s for s in range(active)]
        grids: list[Grid] = [(images.shape[2] // side, images.shape[3] // side) for side in sides]
        if not self._warned and not torch.compiler.is_compiling():
            self._warn_of_grids(where, images, grids)
        if attention_mask is not None:
            shape = images.shape[0], grids[0][0] * grids[0][1]
            mask = check_mask(where, "attention_mask", attention_mask, shape)
            images, masks = self._hide(images, mask, grids[0]), masks_of_scales(mask, grids)
        features = self.patch_embeddings(images, num_scales=active)
        if masks is not None:
            features = [torch.where(mask[..., None], x, 0.0) for mask, x in zip(masks, features, strict=True)]
        weights = []
        layers = zip(self.blocks, self.attention_blocks, self.fusion_layers, self.deeper_fusions, strict=True)
        for block, attention, fusion, deeper in layers:
            features, found = block(features, attention, [fusion, *deeper], grids, masks, need_weights)
            weights.append(found)
        pooled = self.norm(self._aggregate(features, masks))
        result, retrieved = pooled, None
        if self.use_bank or return_retrieved:
            retrieved = self.feature_bank(pooled)
        if self.use_bank:
            result = pooled + self.bank_gain * retrieved
        if self.training if update_bank is None else update_bank:
            self.feature_bank.update(pooled.detach())
        out = {"logits": self.head(result), "features": result, "scale_features": features}
        if need_weights:
            out["attention_weights"] = weights
        if return_retrieved:
            out["retrieved"] = retrieved
        return out

    def _check(self, where: str, images: Any, need_weights: Any, return_retrieved: Any, update_bank: Any) -> None:
        check_flag(where, "need_weights", need_weights)
        check_flag(where, "return_retrieved", return_retrieved)
        if update_bank is not None:
            check_flag(where, "update_bank", update_bank)
        check_tensor(where, "images", images, "(B, in_channels, H, W)", 4)
        if images.shape[1] != self.config["in_channels"]:
            refuse(ValueError, where, "images", f"{self.config['in_channels']} channels", images)
        least = self.patch_size << (self._active() - 1)
        if min(images.shape[2:]) < least:
            refuse(ValueError, where, "images", f"H and W of at least the coarsest patch, {least}", images)

    def _warn_of_grids(self, where: str, images: Tensor, grids: list[Grid]) -> None:
        if any(n % (self.patch_size << s) for s in range(len(grids)) for n in images.shape[2:]):
            self._warned = True
            size, names = "x".join(map(str, images.shape[2:])), " / ".join("x".join(map(str, grid)) for grid in grids)
            warnings.warn(
                f"hivilt: {where}: images of {size} do not divide into patches of {self.patch_size} "
                f"to {self.patch_size << (len(grids) - 1)}: scales run on the grids {names}, edges are left out",
                UserWarning,
                stacklevel=5,
            )

    def _hide(self, images: Tensor, mask: Tensor, grid: Grid) -> Tensor:
        """Zeros in place of the pixels of masked patches, which patches of coarser scales would read."""
        P = self.patch_size
        fine = mask.unflatten(1, grid)[:, None].repeat_interleave(P, 2).repeat_interleave(P, 3)
        covered = torch.where(fine, images[:, :, : grid[0] * P, : grid[1] * P], 0.0)
        return covered  # what no patch of the finest scale reads, none of a coarser one does

    def _aggregate(self, features: list[Tensor], masks: list[Tensor] | None) -> Tensor:
        """[B, C]: the mean of every scale's tokens, projected, and the scales mixed."""
        if masks is None:
            means = [x.mean(1) for x in features]
        else:  # masked tokens are zeros
            means = [x.sum(1) / m.sum(1, keepdim=True).clamp(min=1) for x, m in zip(features, masks, strict=True)]
        projected = [project(x) for project, x in zip(self.out_projs, means, strict=False)]
        if self.aggregation is None:
            return sum(projected) / len(projected)
        if len(projected) == self.num_scales:
            return self.aggregation(projected)
        shares = self.aggregation.scale_weights[: len(projected)].softmax(0)
        return sum(share * x for share, x in zip(shares, projected, strict=True))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={self.config[name]!r}" for name in ("image_size", "num_scales", "use_bank"))


class ProgressiveHiViT(HiViT):
    """HiViT that begins with its finest scale and gets the others one by one.

    ``current_scales`` is how many are active, 1 at first; it may be set.  The others are not computed: in the fusion
    they are terms of zero, in the features they have no share, and their parameters get no gradient.  It is no part of
    the state_dict: set it after loading a checkpoint.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.current_scales = 1

    def _active(self) -> int:
        count = check_size(type(self).__name__, "current_scales", self.current_scales)
        if count > self.num_scales:
            refuse(ValueError, type(self).__name__, "current_scales", f"at most {self.num_scales}", count)
        return count

    def step_curriculum(self, epoch: int, warmup_epochs: int = 10) -> int:
        """Adds a scale where epoch, from 0 on, is a multiple of warmup_epochs beyond 0; returns how many are active.

        Raises:
            ValueError, TypeError: epoch below 0, warmup_epochs below 1, or no ints.
        """
        where = "ProgressiveHiViT.step_curriculum"
        if isinstance(epoch, bool) or not isinstance(epoch, int):
            refuse(TypeError, where, "epoch", "an int of at least 0", epoch)
        if epoch < 0:
            refuse(ValueError, where, "epoch", "an int of at least 0", epoch)
        check_size(where, "warmup_epochs", warmup_epochs)
        if epoch > 0 and epoch % warmup_epochs == 0 and self.current_scales < self.num_scales:
            self.current_scales += 1
        return self.current_scales


def of_size(model: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    """The function ``hivit_<name>``, which makes such a model with the config VARIANTS[name]."""

    def build(**options: Any) -> nn.Module:
        return model(VARIANTS[name], **options)

    C, heads, layers = VARIANTS[name].values()
    build.__doc__ = f"""C = {C}, {heads} heads, {layers} layers; ``options`` as for HiViT."""
    build.__name__ = build.__qualname__ = f"hivit_{name}"
    build.__module__ = model.__module__
    return build


hivit_tiny, hivit_small, hivit_base, hivit_large = (of_size(HiViT, name) for name in VARIANTS)


def count_parameters(config: Mapping[str, Any] | None = None, **options: Any) -> int:
    """How many numbers a HiViT of this config learns, without building it; the bank's rows are buffers, not counted."""
    c = merge_config("count_parameters", config, options)
    C, S, L = c["hidden_dim"], c["num_scales"], c["num_layers"]
    widths = halving_widths("count_parameters", C, S)
    total = 2 * C + (C + 1) * c["num_classes"] + bool(c["use_bank"])  # norm, head, bank_gain
    total += S if c["aggregate"] == "adaptive" else 0
    per_layer = (c["fusion_layers"] - 1) * (C * C + 3 * C)
    if c["cross_scale"] == "fusion":
        per_layer += sum(widths) * C + 3 * C
    else:
        per_layer += 2 * (C * C + C) + 2 * sum(widths) + sum((w + 1) * 2 * C for w in widths[1:])
    for s, w in enumerate(widths):
        side, inner = c["patch_size"] << s, int(w * c["mlp_ratio"])
        total += c["in_channels"] * side * side * w + 3 * w  # convolution, its bias, norm
        if c["pos_embed"]:
            total += w * math.prod(n // side for n in c["image_size"])
        total += (w + 1) * C  # out_projs
        per_layer += (w + 1) * 3 * C + (C + 1) * w  # attention
        per_layer += 4 * w + (C + 1) * w + (w + 1) * inner + (inner + 1) * w  # norms, extraction, MLP
    return total + L * per_layer
