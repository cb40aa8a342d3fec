"""Whether inner modules still do what their class says: what a module may know before it reads parameters of inner
modules without calling them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN_TENSORS = (nn.Parameter, Tensor)


class Inner(NamedTuple):
    """An inner module whose parameters are read: its path, itself, and the classes it may have."""

    path: str
    module: nn.Module
    kinds: tuple[type, ...]


def why_changed(parts: Iterable[Inner]) -> str | None:
    """The first reason why reading the parameters would not compute what calling these modules computes, or None."""
    for path, module, kinds in parts:
        if type(module) not in kinds:
            if isinstance(module, nn.Module) and is_parametrized(module):
                return f"{path} is parametrized"
            return f"{path} was replaced by a {type(module).__name__}"
        if "forward" in module.__dict__:
            return f"the forward of {path} was replaced"
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            return f"{path} carries hooks, which would not fire"
        for name, parameter in module._parameters.items():
            if parameter is not None and (type(parameter) not in PLAIN_TENSORS or parameter.is_quantized):
                return f"{path}.{name} is a {type(parameter).__name__}"
    return None
