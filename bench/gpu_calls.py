"""python bench/gpu_calls.py [DTYPE ...]: every Triton kernel, both ways, on the smallest inputs that start it.

For compute-sanitizer, under which everything is slow: nothing is compared, the results are only looked at for NaN.
Fails when a kernel of the package was not started.
"""

from __future__ import annotations

import importlib
import pkgutil
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

    yield from fusion_calls(dtype)
    yield from bank_calls(dtype)
    yield from loss_calls(dtype)


def draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def fusion_calls(dtype: torch.dtype) -> Iterator[tuple[str, Any, dict]]:
    """Of family B; the second width is beyond what one program holds."""
    for width in (16, 1040):
        fine, coarse, weight, bias = draw(dtype, (1, 12, 8), (1, 4, 4), (width, 12), (width,))
        x = {"features": [fine, coarse], "weight": weight, "bias": bias, "grids": [(3, 4), (2, 2)]}
        yield f"scales to {width} channels", ops.scale_fusion, x | {"impl": "epilogue"}
        tokens, proj, score = draw(dtype, (1, 9, width), (5, width), (1, 5))
        zeros, one, mix = proj.new_zeros(5), score.new_zeros(1), torch.zeros(3, device=DEVICE)
        layer = {"proj_weight": proj, "proj_bias": zeros, "score_weight": score, "score_bias": one}
        yield f"a pool of {width} channels", ops.token_pool, {"features": tokens, "pool_weights": mix} | layer
    x, y = draw(dtype, (1, 9, 3), (1, 4, 3))
    yield "an interpolated sequence", ops.interpolate_add, {"x": x, "y": y, "scale": torch.ones((), device=DEVICE)}


def bank_calls(dtype: torch.dtype) -> Iterator[tuple[str, Any, dict]]:
    """Of family C."""
    for what, B, M, topk in (("a stream", 2, 150, 3), ("a tile", 9, 150, 3), ("every row", 2, 40, 3)):
        query, keys = draw(dtype, (B, 20), (M, 20))
        yield f"a bank, {what}", ops.bank_retrieval, {"query": query, "keys": keys, "topk": topk}
    query, keys = draw(dtype, (9, 20), (150, 20))
    equal = {"query": query, "keys": keys[:1].expand(150, -1), "topk": 3, "count": 140}
    yield "a bank of equal rows", ops.bank_retrieval, equal


def loss_calls(dtype: torch.dtype) -> Iterator[tuple[str, Any, dict]]:
    """Of family D."""
    queries, texts = draw(dtype, (20, 3, 12), (20, 12))
    scale = torch.full((), 2.0, device=DEVICE)
    yield "pairs, both ways", ops.contrastive_loss, {"x": queries[:, 0], "y": texts, "logit_scale": scale}
    yield "pairs of the nearest query", ops.contrastive_loss, {"x": queries, "y": texts, "logit_scale": scale}


WITH_GRADIENTS = ("query", "key", "value", "keys", "features", "weight", "bias", "x", "y", "scale", "proj_weight",
                  "proj_bias", "score_weight", "score_bias", "pool_weights", "logit_scale")  # fmt: skip


def run(op: Any, arguments: dict) -> list[torch.Tensor]:
    """Output and gradients, once the device has written them."""
    arguments = dict(arguments)
    for name in WITH_GRADIENTS:
        if isinstance(arguments.get(name), torch.Tensor):
            arguments[name] = arguments[name].detach().requires_grad_()
        elif name in arguments:
            arguments[name] = [t.detach().requires_grad_() for t in arguments[name]]
    given = [t for x in arguments.values() for t in (x if isinstance(x, list) else [x])]
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
    out = op(**arguments, backend="triton")
    out = out[0] if isinstance(out, tuple) else out
    results = [out.detach(), *torch.autograd.grad(out.float().sum(), leaves)]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return results


def main() -> int:
    from hivilt import triton_kernels
    from hivilt.triton_kernels import launch

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
    rooms = [
        importlib.import_module(f"hivilt.triton_kernels.{m.name}")
        for m in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    every = {name for room in rooms for name in vars(room) if name.startswith("_") and name.endswith("_kernel")}
    print(f"{len(started)} of {len(every)} kernels; never started: {', '.join(sorted(every - started)) or 'none'}")
    return int(started != every)


if __name__ == "__main__":
    sys.exit(main())
