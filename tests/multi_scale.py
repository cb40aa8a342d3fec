"""What tests of the multi-scale modules share: where they run, and how exact they must be."""

import torch
from torch import Tensor

import hivilt


def kernels_on_cpu() -> bool:
    """Whether the C++ library that was built holds the operators of scale_fusion."""
    return hivilt.info.build_record() is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        "hivilt::scale_fusion_cpu", "CPU"
    )


BACKENDS = ["reference", "auto"] if kernels_on_cpu() else ["reference"]
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def as_exact(ours: Tensor, plain: Tensor, truth: Tensor, what: str = "result") -> None:
    """Ours is as near to the truth as plain PyTorch: float32 within twice its error, half types within its error, and
    one rounding of the largest value more.  Where few values are compared plain PyTorch may be lucky: four roundings,
    and sixteen for a number that is a sum over everything."""
    assert ours.shape == truth.shape and ours.dtype == plain.dtype, f"{what}: {ours.shape}, {ours.dtype}"
    error, budget = (float((x.double() - truth).abs().max()) if truth.numel() else 0.0 for x in (ours, plain))
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    factor = 1.0 if ours.dtype in (torch.bfloat16, torch.float16) else 2.0
    rounds = 1 if truth.numel() >= 64 else 4 if truth.numel() > 1 else 16
    allowed = factor * budget + rounds * UNIT[ours.dtype] * largest
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} (plain PyTorch: {budget:.3g})"


def gradients(module, inputs, weight: Tensor, *args, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a module, and gradients of <output, weight> by name: inputs by number, parameters by their name."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    out = module(leaves, *args, **options)
    (out * weight.to(out.dtype)).sum().backward()
    found = {f"input {i}": x.grad for i, x in enumerate(leaves)}
    found |= {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return out.detach(), found


def randomise(module) -> None:
    """Parameters and statistics that a wrong formula cannot survive: no bias 0, no norm weight 1."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() < 2:
                p.copy_(torch.rand_like(p) + 0.5 if name.endswith("weight") else torch.randn_like(p))
        for name, b in module.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand_like(b) + 0.5 if name.endswith("var") else torch.randn_like(b))
