"""python bench/gpu_calls.py [DTYPE ...]: every Triton kernel, both ways, on the smallest inputs that start it.

For compute-sanitizer, under which everything is slow: nothing is compared, the results are only looked at for NaN.
Fails when a kernel of the package was not started.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from device import DEVICE

import hivilt

ops = hivilt.ops
DTYPES = "float32", "bfloat16"


def inputs(dtype: torch.dtype, B: int, H: int, G: int, Q: int, N: int, D: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"query": (B, H, Q, D), "key": (B, G, N, D), "value": (B, G, N, D)}
    return {name: torch.randn(shape, generator=g).to(DEVICE, dtype) for name, shape in shapes.items()}


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Any, dict]]:
    """(what it is for, operation, its arguments)."""
    x = inputs(dtype, 2, 4, 2, 5, 9, 16)
    mask = torch.rand(2, 1, 5, 9, device=DEVICE) < 0.8
    mask[..., 0] = True
    yield "a row in one tile", ops.topk_attention, x | {"topk": 3, "attn_mask": mask}
    long = inputs(dtype, 1, 2, 2, 3, 200, 20)
    yield "a row in one tile, searched among candidates", ops.topk_attention, long | {"topk": 3}
    longest = inputs(dtype, 1, 1, 1, 2, 1100, 16)
    yield "rows longer than a tile, in parts, then lists", ops.topk_attention, longest | {"topk": 3}
    bias = torch.randn(1, 1, 5, 9, device=DEVICE).requires_grad_()
    by_keys = {"topk": 2, "axis": "queries", "attn_mask": bias}
    yield "lists as a bitmask, gradient of a bias", ops.topk_attention, x | by_keys
    source = {"select_query": torch.randn(2, 5, 7, device=DEVICE), "select_key": torch.randn(2, 9, 7, device=DEVICE)}
    yield "one selection for all heads", ops.topk_attention, x | source | {"topk": 3}
    masks = {"key_mask": torch.arange(9, device=DEVICE).expand(2, 9) < 7, "dropout_p": 0.2}
    yield "all pairs", ops.topk_attention, x | masks
    packed = {name: t[0].transpose(0, 1) for name, t in x.items()}
    offsets = {"cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 6, 9])}
    yield "packed", ops.topk_attention_varlen, packed | offsets | {"max_seqlen_q": 3, "max_seqlen_k": 6, "topk": 2}
    lists = torch.tensor([[0, 3, -1]], device=DEVICE).expand(2, 4, 5, 3)
    yield "given lists", ops.selected_attention, x | {"indices": lists}


def run(op: Any, arguments: dict) -> list[torch.Tensor]:
    """Output and gradients, once the device has written them."""
    arguments = dict(arguments)
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name].detach().requires_grad_()
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    out = op(**arguments, backend="triton")
    results = [out.detach(), *torch.autograd.grad(out.float().sum(), leaves)]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return results


def main() -> int:
    from hivilt.triton_kernels import launch, topk_attention_backward_launch, topk_attention_launch

    started, starts = set(), launch.launch

    def noted(kernel, *args, **constants):
        started.add(kernel.fn.__name__)
        starts(kernel, *args, **constants)

    launch.launch = noted
    torch.manual_seed(0)
    for dtype in (getattr(torch, name) for name in sys.argv[1:] or DTYPES):
        for what, op, arguments in calls(dtype):
            bad = [not t.isfinite().all() for t in run(op, arguments)]
            print(f"{str(dtype)[6:]:<9} {what}" + (": NaN or infinity" if any(bad) else ""), flush=True)
            if any(bad):
                return 1
    names = {**vars(topk_attention_launch), **vars(topk_attention_backward_launch)}
    every = {name for name in names if name.endswith("_kernel")}
    print(f"{len(started)} of {len(every)} kernels; never started: {', '.join(sorted(every - started)) or 'none'}")
    return int(started != every)


if __name__ == "__main__":
    sys.exit(main())
