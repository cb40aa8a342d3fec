"""hivilt.accelerate(model): gives every plain torch.nn.MultiheadAttention of a model the class of its hivilt twin.

Instances are swapped, never classes, and an instance only changes its class: its identity, parameters, buffers, hooks,
state_dict and whatever else refers to it stay as they are.  hivilt.restore(model) gives the old class back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from .nn import MultiheadAttention
from .nn.topk_attention import check_options
from .ops._checks import refuse

NAME = "accelerate"
OPTIONS = ("topk", "axis", "select")
MARK = "_hivilt_swapped"  # in an instance's __dict__: accelerate made this one, restore may undo it
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")


@dataclass(frozen=True)
class Entry:
    """One attention module of the model: where it is, what it is, and why it was skipped (None: it was replaced)."""

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
    """Swaps the attention modules of a model, in place, for faster ones; with topk=None the numbers stay.

    Args:
        model: any module; it may itself be the attention.
        topk: how many keys each query keeps; None is dense attention.  Also a mapping from module path, or a function
            of (path, module), to that number; a path that the mapping leaves out stays dense.
        axis, select: as in hivilt.nn.MultiheadAttention.
        filter: function of (path, module); a false answer leaves the module alone.

    Returns:
        A Report: every torch.nn.MultiheadAttention, replaced, or skipped and why; print it.

    Raises:
        ValueError, TypeError: a malformed option, before anything is changed.

    Swapped are instances of exactly torch.nn.MultiheadAttention whose inner workings nobody has changed.  A module that
    the model holds under several paths is one module, listed under the first.
    """
    if not isinstance(model, nn.Module):
        refuse(TypeError, NAME, "model", "a torch.nn.Module", model)
    if filter is not None and not callable(filter):
        refuse(TypeError, NAME, "filter", "a function of (path, module)", filter)
    check_options(None if isinstance(topk, Mapping) or callable(topk) else topk, axis, select, NAME)

    found = list(candidates(model))
    if isinstance(topk, Mapping):
        unknown = set(topk) - {path for paths, _ in found for path in paths}
        if unknown:
            known = ", ".join(repr(paths[0]) for paths, _ in found) or "none"
            refuse(ValueError, NAME, "topk", f"paths of attention modules ({known})", sorted(map(str, unknown))[0])
    report, plan = Report(), []
    for paths, module in found:
        path, kind = paths[0], kind_of(module)
        reason = why_not(module, select)
        if reason is None and filter is not None and not filter(path, module):
            reason = "left out by filter"
        if reason is not None:
            report.skipped.append(Entry(path, kind, reason))
            continue
        kept = topk
        if isinstance(topk, Mapping):
            kept = next((topk[p] for p in paths if p in topk), None)
        elif callable(topk):
            kept = topk(path, module)
        check_options(kept, axis, select, f"{NAME}: {path or 'the model itself'}")
        options = dict(zip(OPTIONS, (kept, axis, select), strict=True))
        detail = "dense" if kept is None else f"topk={kept}, axis={axis!r}, select={select!r}"
        if len(paths) > 1:
            detail += f", shared with {', '.join(paths[1:])}"
        report.replaced.append(Entry(path, kind, None, detail))
        plan.append((module, options))
    for module, options in plan:
        module.__class__ = MultiheadAttention
        module.__dict__.update(options, **{MARK: True})
    report.notes = notes(model, report, plan)
    return report


def restore(model: nn.Module) -> list[str]:
    """Undoes ``accelerate``: every module it swapped has its old class again. Returns their paths.

    Modules that were built as hivilt.nn.MultiheadAttention stay what they are.
    """
    if not isinstance(model, nn.Module):
        refuse(TypeError, "restore", "model", "a torch.nn.Module", model)
    restored = []
    for path, module in model.named_modules():
        if MARK in module.__dict__:
            for name in (*OPTIONS, MARK):
                module.__dict__.pop(name, None)
            module.__class__ = nn.MultiheadAttention
            restored.append(path)
    return restored


def candidates(model: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """Every attention module once, with all the paths that lead to it."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        scripted = isinstance(module, torch.jit.ScriptModule)
        if isinstance(module, nn.MultiheadAttention) or (scripted and module.original_name == "MultiheadAttention"):
            paths.setdefault(module, []).append(path)
    for module, where in paths.items():
        yield where, module


def kind_of(module: nn.Module) -> str:
    kind = type(module)
    return f"torch.nn.{kind.__name__}" if kind is nn.MultiheadAttention else f"{kind.__module__}.{kind.__qualname__}"


def why_not(module: nn.Module, select: str = "scores") -> str | None:
    """The reason to leave a candidate alone, or None."""
    if MARK in module.__dict__:
        return f"already accelerated (topk={module.topk}); hivilt.restore(model) first to change that"
    if isinstance(module, MultiheadAttention):
        return "already a hivilt module"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit.script"
    if is_parametrized(module):
        return "parametrized"
    if type(module) is not nn.MultiheadAttention:
        return "a subclass, whose own behaviour would be lost"
    if "forward" in module.__dict__:
        return "its forward was replaced on this instance"
    out_proj = module.out_proj
    if is_parametrized(out_proj):
        return "out_proj is parametrized"
    if type(out_proj) not in (NonDynamicallyQuantizableLinear, nn.Linear):
        return f"out_proj was replaced by a {type(out_proj).__name__}"
    if "forward" in out_proj.__dict__:
        return "the forward of out_proj was replaced"
    if any(getattr(out_proj, hooks, None) for hooks in HOOKS):
        return "out_proj carries hooks, which would not fire"
    for name in (*WEIGHTS, "out_proj.weight", "out_proj.bias"):
        weight = getattr(out_proj if "." in name else module, name.split(".")[-1], None)
        if weight is not None and (type(weight) not in (nn.Parameter, torch.Tensor) or weight.is_quantized):
            return f"{name} is a {type(weight).__name__}"
    if select == "raw" and module.kdim != module.embed_dim:
        return f"select='raw' compares query and key, but embed_dim is {module.embed_dim} and kdim {module.kdim}"
    return None


def notes(model: nn.Module, report: Report, plan: list[tuple[nn.Module, dict[str, Any]]]) -> list[str]:
    if not report.replaced:
        return [] if report.skipped else ["the model holds no torch.nn.MultiheadAttention"]
    said = ["an accelerated attention returns weights only when need_weights=True is passed (torch's default is True)"]
    dense = {module for module, options in plan if options["topk"] is None}
    if any(isinstance(layer, nn.TransformerEncoderLayer) and layer.self_attn in dense for layer in model.modules()):
        said.append(
            "torch.nn.TransformerEncoderLayer computes dense layers by itself, without calling their attention, in "
            "eval mode without gradients"
        )
    return said
