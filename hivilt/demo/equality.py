"""Do two models compute the same? Outputs and gradients against each other and against float64, within a budget."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .model import CrossModalModel, PlainTopkAttention

# In float32: this many times plain PyTorch's own distance from float64, plus a little, as both are a largest of few.
BUDGET, FLOOR = 2.0, 2e-6


class Selections(TorchDispatchMode):
    """Collects the indices that every hivilt top-k call inside the block keeps."""

    def __init__(self):
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.hivilt.topk_attention.default:
            self.seen.append(result[2])
        return result


def results(model: CrossModalModel, patches: Tensor, words: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, in float64."""
    dtype = model.patch.weight.dtype
    model.zero_grad(set_to_none=True)
    out = [x.detach().double() for x in model(patches.to(dtype), words)]
    model.loss(patches.to(dtype), words).backward()
    grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return out, grads


def distance(a, b) -> tuple[float, float]:
    """Largest difference of outputs, and of gradients in units of each parameter's largest gradient."""
    outputs = max(float((x - y).abs().max()) for x, y in zip(a[0], b[0], strict=True))
    grads = max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-30)) for x, y in zip(a[1], b[1], strict=True))
    return outputs, grads


def tell(plain: CrossModalModel, ours: CrossModalModel, patches: Tensor, words: Tensor) -> None:
    """Makes the plain top-k model keep what hivilt keeps: where two scores are equal up to rounding either choice is
    right, and a different one changes the sums by more than rounding."""
    with torch.no_grad(), Selections() as selections:
        ours(patches, words)
    order = iter(selections.seen)

    def hand_over(layer, _):
        indices = next(order).long()
        if indices.numel():  # none: as many keys are kept as there are
            layer.told = torch.where(indices < 0, indices[..., :1], indices)  # fewer valid keys than kept: one twice

    layers = [m for m in plain.modules() if isinstance(m, PlainTopkAttention)]
    hooks = [layer.register_forward_pre_hook(hand_over) for layer in layers]
    with torch.no_grad():
        plain(patches, words)
    for hook in hooks:
        hook.remove()


def judge(plain: CrossModalModel, ours: CrossModalModel, patches: Tensor, words: Tensor) -> dict:
    """Distances of two float32 models from each other and from float64; ends the program beyond the budget."""
    exact = copy.deepcopy(plain).double()
    truth, a, b = results(exact, patches, words), results(plain, patches, words), results(ours, patches, words)
    found = {"apart": distance(a, b), "plain": distance(a, truth), "hivilt": distance(b, truth)}
    told = [m for m in exact.modules() if isinstance(m, PlainTopkAttention) and m.told is not None]
    found["rows"], found["differ"] = sum(m.rows for m in told), sum(m.differ for m in told)
    for what, mine, theirs in zip(("outputs", "gradients"), found["hivilt"], found["plain"], strict=True):
        if not mine <= BUDGET * theirs + FLOOR:
            raise SystemExit(
                f"{what} differ from float64 by {mine:.2e}, plain PyTorch's by {theirs:.2e}: over the budget of "
                f"{BUDGET:g}x, so no speed is shown"
            )
    short = max((m.short for m in told), default=0.0)
    if short > 1e-4:
        raise SystemExit(f"a kept score falls short of the best by {short:.2e}, more than rounding: no speed is shown")
    return found
