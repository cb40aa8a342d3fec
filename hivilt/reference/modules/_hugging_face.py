"""What ``from_hf`` of several modules shares.  Nothing is imported: a class of transformers is known by its name."""

from __future__ import annotations

import torch
from torch import nn

from ._checks import refuse


def check_class(cls: type[nn.Module], module: object, *names: str) -> str:
    """The first of ``names`` that is the name of the module's class or of one that it derives from."""
    expected = "a " + " or ".join(names)
    where = f"{cls.__name__}.from_hf"
    if not isinstance(module, nn.Module):
        refuse(TypeError, where, "module", expected, module)
    kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.")}
    for name in names:
        if name in kinds:
            return name
    refuse(TypeError, where, "module", expected + " of Hugging Face transformers", module)


def without_memory() -> torch.device:
    """A context in which parameters take no memory and no time; each is replaced by the original's."""
    return torch.device("meta")


def children_of(module: nn.Module, *names: str) -> list[nn.Module]:
    return [getattr(module, name) for name in names]


def find(module: nn.Module, *paths: str) -> nn.Module:
    """The submodule at the first path that exists: names change between transformers 4 and 5."""
    for path in paths:
        found = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise AttributeError(f"{type(module).__name__} has none of {', '.join(paths)}")


def attention_projections(attention: nn.Module) -> nn.ModuleList:
    """Query, key and value of a self-attention, which take the place of one ``qkv``."""
    return nn.ModuleList(
        [
            find(attention, f"{new}_proj", f"self.{old}", f"attention.{old}")
            for new, old in (("q", "query"), ("k", "key"), ("v", "value"))
        ]
    )


def share_block(ours: nn.Module, theirs: nn.Module) -> None:
    """Gives a VisionBlock the layers of a block of transformers' ViT, DeiT or Swin."""
    ours.norm1, ours.norm2 = theirs.layernorm_before, theirs.layernorm_after
    ours.attn.qkv = attention_projections(theirs.attention)
    ours.attn.proj = find(theirs.attention, "o_proj", "output.dense")
    ours.mlp.fc1, ours.mlp.fc2 = find(theirs, "mlp.fc1", "intermediate.dense"), find(theirs, "mlp.fc2", "output.dense")
    ours.mlp.act = find(theirs, "mlp.activation_fn", "intermediate.intermediate_act_fn")
