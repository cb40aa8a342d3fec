"""hivilt.accelerate(model): gives modules of a model the class of their hivilt twin, wherever they are unchanged.

Instances are swapped, never classes, and an instance only changes its class: its identity, parameters, buffers, hooks,
state_dict and whatever else refers to it stay as they are.  hivilt.restore(model) gives the old class back.  ``KINDS``
lists what is known; a module that is none of these is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from . import nn as twins
from .nn._choice import MARK, PLAIN_TENSORS, Inner, why_changed
from .nn.cross_modal_fusion import join_parts
from .nn.scale_fusion import fusion_parts, projection_parts
from .nn.segformer import fused_class, is_decode_head, why_not_converted
from .nn.token_pool import attention_parts
from .nn.topk_attention import check_options
from .ops._checks import refuse
from .reference import modules as plain

NAME = "accelerate"
OPTIONS = ("topk", "axis", "select")
WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")


@dataclass(frozen=True)
class Entry:
    """One candidate of the model: where it is, what it is, and why it was skipped (None: it was replaced)."""

    path: str
    kind: str
    reason: str | None = None
    detail: str = ""


@dataclass
class Report:
    """What ``accelerate`` did: every candidate is in ``replaced`` or, with the reason, in ``skipped``."""

    replaced: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        title = f"hivilt.accelerate: {len(self.replaced)} replaced, {len(self.skipped)} skipped"
        rows = [(e.path or "(the model itself)", "replaced", f"{e.kind}, {e.detail}") for e in self.replaced]
        rows += [(e.path or "(the model itself)", "skipped", f"{e.kind}: {e.reason}") for e in self.skipped]
        width = max((len(path) for path, *_ in rows), default=0)
        lines = [f"  {path:<{width}}  {verdict:<8}  {text}" for path, verdict, text in rows]
        return "\n".join([title, *lines, *(f"  note: {note}" for note in self.notes)])


def accelerate(
    model: nn.Module,
    *,
    topk: int | Mapping[str, int | None] | Callable[[str, nn.Module], int | None] | None = None,
    axis: str = "keys",
    select: str = "scores",
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> Report:
    """Swaps modules of a model, in place, for faster ones; with topk=None the numbers stay.

    Args:
        model: any module; it may itself be a candidate.
        topk: how many keys each query of a torch.nn.MultiheadAttention keeps; None is dense attention.  Also a mapping
            from module path, or a function of (path, module), to that number; a path that the mapping leaves out stays
            dense.  A hivilt.reference.modules.MultiheadAttention keeps the topk, axis and select it was built with.
        axis, select: as in hivilt.nn.MultiheadAttention.
        filter: function of (path, module); a false answer leaves the module alone.

    Returns:
        A Report: every candidate, replaced, or skipped and why; print it.

    Raises:
        ValueError, TypeError: a malformed option, before anything is changed.

    Candidates are torch.nn.MultiheadAttention, the modules of hivilt.reference.modules that have a twin in hivilt.nn,
    SegformerDecodeHead of Hugging Face transformers, and what derives from these.  Swapped are instances of exactly
    these classes whose inner workings nobody has changed.  A module that the model holds under several paths is one
    module, listed under the first.
    """
    if not isinstance(model, nn.Module):
        refuse(TypeError, NAME, "model", "a torch.nn.Module", model)
    if filter is not None and not callable(filter):
        refuse(TypeError, NAME, "filter", "a function of (path, module)", filter)
    check_options(None if isinstance(topk, Mapping) or callable(topk) else topk, axis, select, NAME)

    found = list(candidates(model))
    if isinstance(topk, Mapping):
        attentions = [paths for paths, _, kind in found if kind is ATTENTION]
        unknown = set(topk) - {path for paths in attentions for path in paths}
        if unknown:
            known = ", ".join(repr(paths[0]) for paths in attentions) or "none"
            refuse(ValueError, NAME, "topk", f"paths of attention modules ({known})", sorted(map(str, unknown))[0])
    report, plan = Report(), []
    for paths, module, kind in found:
        path, name = paths[0], name_of(module)
        reason = why_not(module, kind, select)
        if reason is None and filter is not None and not filter(path, module):
            reason = "left out by filter"
        if reason is not None:
            report.skipped.append(Entry(path, name, reason))
            continue
        options, detail = {}, kind.detail
        if kind is ATTENTION:
            kept = topk
            if isinstance(topk, Mapping):
                kept = next((topk[p] for p in paths if p in topk), None)
            elif callable(topk):
                kept = topk(path, module)
            check_options(kept, axis, select, f"{NAME}: {path or 'the model itself'}")
            options = dict(zip(OPTIONS, (kept, axis, select), strict=True))
            detail = said_of(kept, axis, select)
        elif kind is PLAIN_ATTENTION:
            detail = said_of(module.topk, module.axis, module.select) + ", as it was built"
        if len(paths) > 1:
            detail += f", shared with {', '.join(paths[1:])}"
        report.replaced.append(Entry(path, name, None, detail))
        plan.append((module, kind.twin(module), options))
    report.notes = notes(model, report, plan)
    for module, twin, options in plan:
        module.__dict__.update(options, **{MARK: type(module)})
        module.__class__ = twin
    return report


def restore(model: nn.Module) -> list[str]:
    """Undoes ``accelerate``: every module it swapped has its old class again. Returns their paths.

    Modules that were built as modules of hivilt.nn stay what they are.
    """
    if not isinstance(model, nn.Module):
        refuse(TypeError, "restore", "model", "a torch.nn.Module", model)
    restored = []
    for path, module in model.named_modules():
        if MARK in module.__dict__:
            module.__class__ = module.__dict__.pop(MARK)
            # Other modules have options of these names of their own.
            for name in OPTIONS if type(module) is nn.MultiheadAttention else ("_kept",):
                module.__dict__.pop(name, None)
            restored.append(path)
    return restored


class Kind(NamedTuple):
    """One kind of module with a faster twin.

    holds: whether a module is of this kind, or derives from it.  plain: the class that is swapped, None where
    ``changed`` looks at that too.  changed(module, select): why a module is left alone, or None.  twin: the class it
    becomes.  detail: what the report says.
    """

    holds: Callable[[nn.Module], bool]
    plain: type[nn.Module] | None
    changed: Callable[[nn.Module, str], str | None]
    twin: Callable[[nn.Module], type[nn.Module]]
    detail: str


def changed_attention(module: nn.MultiheadAttention, select: str) -> str | None:
    linears = NonDynamicallyQuantizableLinear, nn.Linear
    if reason := why_changed([Inner("out_proj", module.out_proj, linears)]):
        return reason
    for name in WEIGHTS:
        weight = getattr(module, name, None)
        if weight is not None and (type(weight) not in PLAIN_TENSORS or weight.is_quantized):
            return f"{name} is a {type(weight).__name__}"
    if select == "raw" and module.kdim != module.embed_dim:
        return f"select='raw' compares query and key, but embed_dim is {module.embed_dim} and kdim {module.kdim}"
    return None


def said_of(topk: int | None, axis: str, select: str) -> str:
    return "dense" if topk is None else f"topk={topk}, axis={axis!r}, select={select!r}"


def changed_pool(module: plain.AdaptiveGlobalPooling, select: str) -> str | None:
    return why_changed(attention_parts(module)) if "attention" in module.pool_types else None


def changed_join(module: plain.LocalFusionModule, select: str) -> str | None:
    return why_changed(join_parts(module)) if module.apply_fusion else "without fusion there is nothing to do faster"


def changed_patches(module: plain.HierarchicalPatchEmbedding, select: str) -> str | None:
    return "without a position table there is nothing to do faster" if module.pos_embed is None else None


def changed_scales(module: plain.MultiScaleAttention, select: str) -> str | None:
    return "compat='seed' returns probabilities, which no kernel writes" if module.compat == "seed" else None


def of_class(
    cls: type[nn.Module],
    twin: type[nn.Module],
    changed: Callable[[nn.Module, str], str | None],
    detail: str = "",
) -> Kind:
    return Kind(lambda module: isinstance(module, cls), cls, changed, lambda module: twin, detail)


# Classes of transformers that have no twin by their own class, and what takes their place.
TAKEN_BY_NAME = {
    "Blip2QFormerModel": "hivilt.models.QFormer.from_hf(module)",
    "SwinModel": "hivilt.models.SwinTransformer.from_hf(module)",
    "DeiTForImageClassificationWithTeacher": "hivilt.models.DeiT.from_hf(module)",
    "IdeficsGatedCrossAttentionLayer": "hivilt.nn.GatedCrossAttentionBlock.from_hf(module)",
    "IdeficsPerceiverResampler": "hivilt.nn.PerceiverResampler.from_hf(module)",
}


def hugging_face_class(module: nn.Module) -> str | None:
    """The name of a class of transformers; nothing is imported to find out."""
    kind = type(module)
    return kind.__name__ if kind.__module__.startswith("transformers.") else None


def how_to_take(name: str) -> str:
    said = f"called otherwise than its twin; {TAKEN_BY_NAME[name]} shares its parameters"
    if name == "IdeficsPerceiverResampler":  # it does not ask for its attention by name
        return said
    return f"{said}, and hivilt.integrations.hf.register() offers the attention 'hivilt' to the model as it is"


ATTENTION = Kind(
    lambda module: (
        isinstance(module, nn.MultiheadAttention)
        or (isinstance(module, torch.jit.ScriptModule) and module.original_name == "MultiheadAttention")
    ),
    nn.MultiheadAttention,
    changed_attention,
    lambda module: twins.MultiheadAttention,
    "",  # the report says how many keys are kept
)
PLAIN_ATTENTION = Kind(
    lambda module: isinstance(module, plain.MultiheadAttention) and not isinstance(module, twins.MultiheadAttention),
    plain.MultiheadAttention,
    lambda module, select: changed_attention(module, module.select),
    lambda module: twins.MultiheadAttention,
    "",  # the same
)
KINDS = (
    PLAIN_ATTENTION,  # before ATTENTION, whose class it derives from
    ATTENTION,
    of_class(
        plain.CrossScaleFusion,
        twins.CrossScaleFusion,
        lambda module, select: why_changed(fusion_parts(module)),
        "scale_fusion",
    ),
    of_class(
        plain.AdaptiveFusion,
        twins.AdaptiveFusion,
        lambda module, select: why_changed(projection_parts(module)),
        "scale_fusion or interpolate_add",
    ),
    of_class(plain.AdaptiveGlobalPooling, twins.AdaptiveGlobalPooling, changed_pool, "token_pool"),
    of_class(
        plain.FeatureBank, twins.FeatureBank, lambda module, select: None, "bank_retrieval, bank_attention, bank_push_"
    ),
    of_class(plain.MultiScaleAttention, twins.MultiScaleAttention, changed_scales, "topk_attention where it pays"),
    of_class(
        plain.CrossScaleAttention,
        twins.CrossScaleAttention,
        lambda module, select: None,
        "topk_attention where it pays",
    ),
    of_class(
        plain.FlashMultiScaleAttention,
        twins.FlashMultiScaleAttention,
        lambda module, select: None,
        "topk_attention where it pays",
    ),
    of_class(plain.ScaleExtraction, twins.ScaleExtraction, lambda module, select: None, "interpolate_tokens"),
    of_class(plain.LocalFusionModule, twins.LocalFusionModule, changed_join, "scale_fusion"),
    of_class(plain.ProgressiveFusion, twins.ProgressiveFusion, lambda module, select: None, "interpolate_add"),
    of_class(plain.MaskedMeanPool, twins.MaskedMeanPool, lambda module, select: None, "token_pool"),
    of_class(plain.HierarchicalPatchEmbedding, twins.HierarchicalPatchEmbedding, changed_patches, "interpolate_tokens"),
    *(
        of_class(getattr(plain, name), getattr(twins, name), lambda module, select: None, detail)
        for name, detail in (
            ("MaskedCrossAttention", "topk_attention, topk_attention_varlen"),
            ("PerceiverAttention", "topk_attention"),
            ("QFormerMultiHeadAttention", "topk_attention"),
            ("SelfAttention", "topk_attention"),
            ("WindowAttention", "torch's scaled_dot_product_attention"),
        )
    ),
    Kind(
        lambda module: hugging_face_class(module) in TAKEN_BY_NAME,
        None,
        lambda module, select: how_to_take(hugging_face_class(module)),
        type,
        "",
    ),
    Kind(
        is_decode_head,
        None,
        lambda module, select: why_not_converted(module),
        lambda module: fused_class(type(module)),
        "scale_fusion",
    ),
)
OURS = (*(getattr(twins, name) for name in twins.__all__ if isinstance(getattr(twins, name), type)),)


def candidates(model: nn.Module) -> Iterator[tuple[list[str], nn.Module, Kind]]:
    """Every candidate once, with all the paths that lead to it and its kind."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, where in paths.items():
        kind = next((kind for kind in KINDS if kind.holds(module)), None)
        if kind is not None:
            yield where, module, kind


def name_of(module: nn.Module) -> str:
    kind = type(module)
    return f"torch.nn.{kind.__name__}" if kind is nn.MultiheadAttention else f"{kind.__module__}.{kind.__qualname__}"


def why_not(module: nn.Module, kind: Kind, select: str = "scores") -> str | None:
    """The reason to leave a candidate alone, or None."""
    if MARK in module.__dict__:
        said = f" (topk={module.topk})" if kind is ATTENTION else ""
        return f"already accelerated{said}; hivilt.restore(model) first to change that"
    if isinstance(module, OURS):
        return "already a hivilt module"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit.script"
    if is_parametrized(module):
        return "parametrized"
    if kind.plain is not None and type(module) is not kind.plain:
        return "a subclass, whose own behaviour would be lost"
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    return kind.changed(module, select)


def notes(model: nn.Module, report: Report, plan: list[tuple[nn.Module, type, dict[str, Any]]]) -> list[str]:
    if not report.replaced:
        nothing = "the model holds no torch.nn.MultiheadAttention and no other module that has a twin in hivilt.nn"
        return [] if report.skipped else [nothing]
    if not any("topk" in options for _, _, options in plan):  # no attention of torch's was swapped
        return []
    said = ["an accelerated attention returns weights only when need_weights=True is passed (torch's default is True)"]
    dense = {module for module, _, options in plan if options.get("topk", 0) is None}
    if any(isinstance(layer, nn.TransformerEncoderLayer) and layer.self_attn in dense for layer in model.modules()):
        said.append(
            "torch.nn.TransformerEncoderLayer computes dense layers by itself, without calling their attention, in "
            "eval mode without gradients"
        )
    return said
