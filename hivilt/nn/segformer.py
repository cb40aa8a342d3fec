"""SegFormer's decode head on one hivilt.ops.scale_fusion call.

The head projects every scale C_i -> D, resizes all to the finest grid, concatenates S D channels and projects to D.
Two projections in a row are one, W_i = F_i P_i [D, C_i] (F_i: the columns of linear_fuse for scale i), and a projection
commutes with interpolation, so each scale is projected at its own size; the maps at the finest grid and their
concatenation are never in memory.  A BatchNorm with running statistics is a factor and a shift per channel and goes
into the same call, as does the ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import scale_fusion
from ..ops._checks import check_tensor, refuse
from ..ops._running import eager, records
from ._choice import MARK, Inner, kernel_exists, why_changed

NAME = "SegformerFusionHead"
PROJECTIONS = ("linear_projections", "linear_c")  # what transformers 5 calls them, and what 4 does
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class SegformerFusionHead(nn.Module):
    """A SegformerDecodeHead of Hugging Face transformers that computes the same with far less work.

    Made by ``SegformerFusionHead.from_hf(head)``, or in place by hivilt.accelerate(model).  An instance is of this
    class and of the original's: same parameters, same state_dict, same isinstance.

    The composed weights are made anew wherever a gradient may be wanted, so that it reaches every original parameter.
    Without gradients, on the CPU, they are kept together with a copy of the parameters and statistics they came from,
    and are made anew once any of those differs: contents are compared, because writing through ``.data`` leaves no
    other trace.  A head whose linear layers were replaced, hooked or parametrized works as the original does.

    Cost: 2 B D sum_i N_i C_i flops against the original's 2 B N_0 S D^2 (N_0 the finest grid's cells) and
    2 D^2 sum_i C_i for the composed weights.
    """

    _plain_class: type[nn.Module] = nn.Module
    _kept: tuple | None = None  # (settings, originals, composed); never a part of the state

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{NAME}: made by {NAME}.from_hf(head), out of a SegformerDecodeHead")

    @classmethod
    def from_hf(cls, module: nn.Module) -> SegformerFusionHead:
        """A head that shares the submodules, and with them parameters and statistics, of ``module``.

        Args:
            module: transformers' SegformerDecodeHead (4 or 5), or a module with the same attributes.

        Raises:
            TypeError: no module, or one without those attributes.  ValueError: one whose layers were changed.
        """
        if not isinstance(module, nn.Module):
            refuse(TypeError, f"{NAME}.from_hf", "module", "a SegformerDecodeHead", module)
        missing = [name for name in ("linear_fuse", "batch_norm", "activation", "dropout", "classifier", "config")
                   if not hasattr(module, name)]  # fmt: skip
        if projections_of(module) is None:
            missing.append("linear_projections")
        if missing:
            raise TypeError(
                f"{NAME}.from_hf: module: expected a SegformerDecodeHead; got a {type(module).__name__} without "
                f"{', '.join(missing)}"
            )
        if reason := why_not_fused(module):
            raise ValueError(
                f"{NAME}.from_hf: module: expected an unchanged SegformerDecodeHead; got one where {reason}"
            )
        head = new_head(plain_class(module))
        # The tables of children and hooks are copied, so that changes of one module stay there.
        head.__dict__.update({k: v.copy() if isinstance(v, dict | set) else v for k, v in module.__dict__.items()})
        for name in ("_kept", MARK):
            head.__dict__.pop(name, None)
        return head

    def forward(self, encoder_hidden_states: Sequence[Tensor], **kwargs: Any) -> Tensor:
        """Feature maps of the encoder's stages to logits.

        Args:
            encoder_hidden_states: S maps [B, C_i, H_i, W_i], the finest first, any ratio between their sizes.  With
                ``config.reshape_last_stage`` False a stage may also be tokens [B, N_i, C_i] of a square image.
            kwargs: ignored, as in the original.

        Returns:
            [B, labels, H_0, W_0].

        Raises:
            ValueError, TypeError: maps that do not fit.
        """
        first = encoder_hidden_states[0] if isinstance(encoder_hidden_states, Sequence) else None
        known = isinstance(first, Tensor) and kernel_exists("scale_fusion", first.device.type, first.dtype)
        if why_not_fused(self) or (isinstance(first, Tensor) and not known):
            return self._plain_class.forward(self, encoder_hidden_states, **kwargs)
        features, grids = self._tokens(encoder_hidden_states)
        norm = self.batch_norm
        usual = not why_changed([Inner("batch_norm", norm, NORMS)])
        folds = usual and not norm.training and norm.running_mean is not None
        relu = folds and not why_changed([Inner("activation", self.activation, (nn.ReLU,))])
        weight, bias, factor, shift = self._composed(features, folds)
        fused = scale_fusion(
            features,
            weight,
            bias,
            grids=grids,
            norm="affine" if folds else "none",
            norm_weight=factor,
            norm_bias=shift,
            activation="relu" if relu else "none",
        )
        # As maps they are a view in channels_last order. What was not folded is called, statistics and hooks included.
        maps = fused.transpose(1, 2).unflatten(2, grids[0])
        if not folds:
            # torch sums each channel of channels_last maps one by one on the CPU: ten times the error of planes.
            maps = norm(maps.contiguous() if maps.is_cpu else maps)
        if not relu:
            maps = self.activation(maps)
        return self._classify(self.dropout(maps))

    def _tokens(self, maps: Any) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Views [B, H_i W_i, C_i] of the maps, and their grids."""
        projections, name = projections_of(self), "encoder_hidden_states"
        if isinstance(maps, Tensor) or not isinstance(maps, Sequence):
            refuse(TypeError, NAME, name, f"{len(projections)} feature maps", maps)
        if len(maps) != len(projections):
            refuse(ValueError, NAME, name, f"{len(projections)} feature maps", len(maps))
        features, grids = [], []
        for i, (x, projection) in enumerate(zip(maps, projections, strict=True)):
            form = f"(B, {projection.proj.in_features}, H, W)"
            if isinstance(x, Tensor) and x.dim() == 3 and self.config.reshape_last_stage is False:
                side = math.isqrt(int(x.shape[1]))
                if side == 0 or side * side != x.shape[1]:
                    refuse(ValueError, NAME, f"{name}[{i}]", "a square number of tokens, or a map " + form, x)
                grid = side, side
            else:
                check_tensor(NAME, f"{name}[{i}]", x, 4, form)
                grid = x.shape[2], x.shape[3]
                x = x.flatten(2).transpose(1, 2)
            if x.shape[2] != projection.proj.in_features:
                refuse(ValueError, NAME, f"{name}[{i}]", "shape " + form, maps[i])
            features.append(x)
            grids.append(grid)
        return features, grids

    def _composed(self, features: list[Tensor], folds: bool) -> tuple[Tensor | None, ...]:
        """(weight [D, sum C_i], bias [D], factor [D], shift [D]); the last two are None unless the norm is folded."""
        originals = self._originals(folds)
        # A GPU composes in less time than the comparison, which would wait for it, takes.
        if not eager(features[0]) or not features[0].is_cpu or records(*features, *originals):
            return self._compose(folds)
        settings, kept = (folds, self.batch_norm.eps if folds else None), self._kept
        if kept is None or kept[0] != settings or not same_contents(kept[1], originals):
            copies = [None if t is None else t.detach().clone() for t in originals]
            # Set in one step: another thread sees the old tuple or the new one.
            kept = self.__dict__["_kept"] = settings, copies, self._compose(folds)
        return kept[2]

    def _originals(self, folds: bool) -> list[Tensor | None]:
        norm, fuse = self.batch_norm, self.linear_fuse
        found = [fuse.weight, fuse.bias]
        for projection in projections_of(self):
            found += [projection.proj.weight, projection.proj.bias]
        if folds:
            found += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return found

    def _compose(self, folds: bool) -> tuple[Tensor | None, ...]:
        """In float32 at least, whatever autocast says; weight and bias are rounded once, to the parameters' dtype."""
        fuse, norm, projections = self.linear_fuse, self.batch_norm, projections_of(self)
        dtype = fuse.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        device = fuse.weight.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            # The head concatenates the coarsest scale first.
            columns = fuse.weight.flatten(1).to(wide).chunk(len(projections), 1)[::-1]
            linears = [projection.proj for projection in projections]
            weight = torch.cat([f @ p.weight.to(wide) for f, p in zip(columns, linears, strict=True)], 1)
            biases = [f @ p.bias.to(wide) for f, p in zip(columns, linears, strict=True) if p.bias is not None]
            if fuse.bias is not None:
                biases.append(fuse.bias.to(wide))
            bias = sum(biases).to(dtype) if biases else None
            if not folds:
                return weight.to(dtype), bias, None, None
            factor = (norm.running_var.to(wide) + norm.eps).rsqrt()
            if norm.weight is not None:
                factor = factor * norm.weight.to(wide)
            shift = -norm.running_mean.to(wide) * factor
            if norm.bias is not None:
                shift = shift + norm.bias.to(wide)
            return weight.to(dtype), bias, factor, shift

    def _classify(self, maps: Tensor) -> Tensor:
        """The 1 x 1 convolution as a product [labels, D] [D, N], which reads channels_last maps as they are."""
        classifier = self.classifier
        if why_changed([Inner("classifier", classifier, (nn.Conv2d,))]) or not is_projection(classifier):
            return classifier(maps)
        tokens, weight = maps.flatten(2), classifier.weight.flatten(1).expand(maps.shape[0], -1, -1)
        if classifier.bias is None:
            logits = torch.bmm(weight, tokens)
        else:
            logits = torch.baddbmm(classifier.bias[:, None], weight, tokens)
        return logits.unflatten(2, maps.shape[2:])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __reduce_ex__(self, protocol: int) -> tuple:
        """The class of an instance is made when needed, so copies and pickles name the original's instead."""
        return new_head, (self._plain_class,), self.__getstate__()


def replace_segformer_heads(model: nn.Module) -> list[str]:
    """Replaces every SegformerDecodeHead inside a model by ``SegformerFusionHead.from_hf`` of it; returns their paths.

    Heads that were changed stay.  hivilt.accelerate does this and more, says what it skipped, and can be undone.

    Raises:
        TypeError: no module.  ValueError: the model is itself a head, which cannot be replaced from inside.
    """
    where = "replace_segformer_heads"
    if not isinstance(model, nn.Module):
        refuse(TypeError, where, "model", "a torch.nn.Module", model)
    if is_decode_head(model):
        refuse(ValueError, where, "model", f"a model with a head inside; for a head itself call {NAME}.from_hf", model)
    replaced = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        fits = is_decode_head(module) and not isinstance(module, SegformerFusionHead)
        if fits and not why_not_converted(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, SegformerFusionHead.from_hf(module))
            replaced.append(path)
    return replaced


def is_decode_head(module: nn.Module) -> bool:
    """Whether a module is, or derives from, a class of that name; nothing is imported to find out."""
    return isinstance(module, SegformerFusionHead) or any(
        kind.__name__ == "SegformerDecodeHead" for kind in type(module).__mro__
    )


def why_not_converted(module: nn.Module) -> str | None:
    """The reason to leave a SegformerDecodeHead alone, or None."""
    kind = type(module)
    if kind.__name__ != "SegformerDecodeHead":
        return "a subclass, whose own behaviour would be lost"
    if not kind.__module__.startswith("transformers.models.segformer."):
        return f"a SegformerDecodeHead of {kind.__module__}, which may compute something else than transformers' does"
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    return why_not_fused(module)


def why_not_fused(module: nn.Module) -> str | None:
    """The reason why the linear layers cannot be composed, or None."""
    projections, fuse = projections_of(module), getattr(module, "linear_fuse", None)
    if projections is None or not len(projections):
        return "its projections were replaced"
    parts = []
    for i, projection in enumerate(projections):
        if list(projection._modules) != ["proj"]:
            return f"projection {i} was replaced by a {type(projection).__name__}"
        parts.append(Inner(f"projection {i}", projection, (type(projection),)))
        parts.append(Inner(f"projection {i}.proj", projection.proj, (nn.Linear,)))
    parts.append(Inner("linear_fuse", fuse, (nn.Conv2d,)))
    if reason := why_changed(parts):
        return reason
    widths = {projection.proj.out_features for projection in projections}
    if not is_projection(fuse) or len(widths) != 1 or fuse.in_channels != len(projections) * widths.pop():
        return f"linear_fuse is no 1 x 1 convolution of the {len(projections)} projections"
    return None


def projections_of(module: nn.Module) -> nn.ModuleList | None:
    for name in PROJECTIONS:
        found = module._modules.get(name)
        if isinstance(found, nn.ModuleList):
            return found
    return None


def is_projection(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is a linear layer over channels."""
    return (
        convolution.kernel_size == (1, 1)
        and convolution.stride == (1, 1)
        and convolution.padding in ((0, 0), "valid", "same")
        and convolution.groups == 1
    )


def same_contents(kept: list[Tensor | None], now: list[Tensor | None]) -> bool:
    """Whether two lists of tensors hold the same values, dtypes and devices."""
    return len(kept) == len(now) and all(
        (a is None and b is None)
        or (a is not None and b is not None and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
        for a, b in zip(kept, now, strict=True)
    )


def plain_class(module: nn.Module) -> type[nn.Module]:
    return module._plain_class if isinstance(module, SegformerFusionHead) else type(module)


@cache
def fused_class(plain: type[nn.Module]) -> type[SegformerFusionHead]:
    """SegformerFusionHead and ``plain`` in one class: instances of ``plain`` may change to it and back."""
    # Imported by neither name nor path, so its instances pickle themselves through new_head.
    return type(NAME, (SegformerFusionHead, plain), {"_plain_class": plain, "__module__": __name__})


def new_head(plain: type[nn.Module]) -> SegformerFusionHead:
    """An empty instance, for __setstate__ to fill."""
    return nn.Module.__new__(fused_class(plain))
