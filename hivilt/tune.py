"""python -m hivilt.tune topk_attention --shape 8,12,1024,512,64 --topk 32: finds the fastest tile sizes for a call on
the GPU at hand; scale_fusion, interpolate_tokens, token_pool, bank_retrieval and contrastive_loss likewise.

Nothing is tuned unless this is run.  It writes a file of the user's ($XDG_CACHE_HOME/hivilt/triton.json) that the
kernels prefer to the table they ship with; deleting the file undoes it.  Other tiles add up in another order: results
change in their last bits.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import ops
from .triton_kernels import configs, launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# operation -> what its shape stands for, and one to start from
SHAPES = {
    "topk_attention": ("B,H,Q,N,D", "8,12,1024,512,64"),
    "scale_fusion": ("B,C,height,width", "16,192,56,56"),
    "interpolate_tokens": ("B,C,height,width", "16,192,28,28"),
    "token_pool": ("B,N,C", "16,3136,192"),
    "bank_retrieval": ("B,M,C", "256,100000,192"),
    "contrastive_loss": ("B,C", "4096,512"),
}
Call = Callable[[], tuple[Tensor, ...]]


def candidates(shipped: configs.Config | configs.Tile) -> Iterator[configs.Config | configs.Tile]:
    """Configurations one step around the shipped one in at most two of its sizes, itself first."""

    def near(value: int, legal: tuple[int, ...]) -> list[int]:
        at = legal.index(value) if value in legal else None
        return [value] if at is None else [legal[i] for i in (at, at - 1, at + 1) if 0 <= i < len(legal)]

    every = itertools.product(*(near(v, configs.LEGAL[name]) for name, v in shipped._asdict().items()))
    for values in every:
        if sum(a != b for a, b in zip(values, shipped, strict=True)) <= 2:
            yield type(shipped)(*values)


def milliseconds(run: Callable[[], object], device: str, calls: int) -> float:
    """Median of so many calls after one to warm up."""
    run()
    times = []
    for _ in range(calls):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def call_of(operation: str, shape: tuple[int, ...], topk: int | None, dtype: torch.dtype, device: str) -> Call:
    """A call of the operation, forward and backward, on random inputs: its results and gradients."""
    upstream: dict[torch.Size, Tensor] = {}

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device, dtype=torch.float32) * scale).to(dtype).requires_grad_()

    def both(run: Callable[[], Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        out = run()
        if out.shape not in upstream:
            upstream[out.shape] = torch.randn(out.shape, device=device, dtype=out.dtype)
        return out, *torch.autograd.grad(out, inputs, upstream[out.shape])

    if operation == "topk_attention":
        B, H, Q, N, D = shape
        inputs = [random(B, H, T, D) for T in (Q, N, N)]
        return lambda: both(lambda: ops.topk_attention(*inputs, topk, backend="triton"), *inputs)
    if operation == "scale_fusion":  # three scales, each half as large and half as wide as the one before
        B, C, height, width = shape
        grids = [(max(1, height >> s), max(1, width >> s)) for s in range(3)]
        widths = [max(1, C >> s) for s in range(3)]
        features = [random(B, h * w, c) for (h, w), c in zip(grids, widths, strict=True)]
        weight, bias = random(C, sum(widths), scale=C**-0.5), random(C)
        norm = [random(C), random(C)]

        def fuse() -> Tensor:
            return ops.scale_fusion(
                features, weight, bias, grids=grids, norm_weight=norm[0], norm_bias=norm[1], backend="triton"
            )

        return lambda: both(fuse, *features, weight, bias, *norm)
    if operation == "interpolate_tokens":
        B, C, height, width = shape
        x, large = random(B, height * width, C), (2 * height, 2 * width)
        return lambda: both(lambda: ops.interpolate_tokens(x, (height, width), large, backend="triton"), x)
    if operation == "token_pool":
        B, N, C = shape
        hidden = max(1, C // 2)
        inputs = [random(B, N, C), random(hidden, C, scale=C**-0.5), random(hidden), random(1, hidden), random(1)]
        inputs.append(random(3))
        return lambda: both(lambda: ops.token_pool(*inputs, backend="triton"), *inputs)
    if operation == "bank_retrieval":
        B, M, C = shape
        query, keys = random(B, C), random(M, C).detach()
        return lambda: both(lambda: ops.bank_retrieval(query, keys, topk or 1, backend="triton")[0], query)
    B, C = shape
    x, y = (random(B, C, scale=C**-0.5) for _ in range(2))
    return lambda: both(lambda: ops.contrastive_loss(x, y, 10.0, backend="triton"), x, y)


def tune(
    shape: tuple[int, ...], topk: int | None, dtype: str = "bf16", calls: int = 20, steps: int = 100,
    operation: str = "topk_attention",
) -> dict[configs.Key, tuple]:  # fmt: skip
    """Tunes forward and backward of one call, kernel by kernel, and returns {key: (best, its ms, shipped ms)}.

    Args:
        shape: sizes as ``SHAPES`` names them.  topk: None is dense attention.
        calls: timed calls of each candidate.  steps: most candidates of a kernel.
        operation: one of ``SHAPES``.

    Raises:
        ValueError: an unknown operation, or another number of sizes.
    """
    if operation not in SHAPES:
        raise ValueError(f"tune: operation: expected one of {', '.join(SHAPES)}; got {operation!r}")
    sizes = SHAPES[operation][0]
    if len(shape) != len(sizes.split(",")) or min(shape) < 1:
        raise ValueError(f"tune: shape: expected {sizes}, each at least 1; got {','.join(map(str, shape))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = call_of(operation, shape, topk, DTYPES[dtype], device)
    with configs.asked() as asked:
        truth = call()
        keys = sorted(asked)
    part, _ = launch.part_of(truth[0])
    found = {}
    for name in keys:
        shipped = configs.found(part, name)
        times = {}
        for config in itertools.islice(candidates(shipped), steps):
            with configs.trying(name, config):
                try:
                    if all(_agree(a, b) for a, b in zip(call(), truth, strict=True)):
                        times[config] = milliseconds(call, device, calls)
                except Exception as error:  # a configuration that does not fit is no candidate
                    if config == shipped:
                        raise
                    print(f"  {'/'.join(map(str, name))} {tuple(config)}: {type(error).__name__}")
        best = min(times, key=times.get)
        found[name] = (best, times[best], times[shipped])
    return found


def _agree(a: Tensor, b: Tensor) -> bool:
    """Other tiles round otherwise; wrong ones differ by more."""
    scale = b.float().abs().amax().clamp_min(1e-6)
    return bool(((a.float() - b.float()).abs().amax() <= 2e-2 * scale).item())


def _of_user() -> configs.Table:
    """What the user's file holds; ValueError where nobody can say."""
    path = configs.users_file()
    return configs.parse(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(part: str, found: dict[configs.Key, tuple]) -> None:
    """Adds what is faster than the shipped configuration by more than noise to the user's file."""
    path, table = configs.users_file(), _of_user()
    rows = table.setdefault(part, {})
    rows.update({key: best for key, (best, ms, shipped_ms) in found.items() if ms < 0.98 * shipped_ms})
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_suffix(".part")
    temporary.write_text(configs.dump(table), encoding="utf-8")
    temporary.replace(path)
    configs.forget()


def main(arguments: list[str] | None = None) -> None:
    about = "\n".join(f"  {name:<20}--shape {sizes}, by default {shape}" for name, (sizes, shape) in SHAPES.items())
    parser = argparse.ArgumentParser(
        prog="python -m hivilt.tune", description=f"{__doc__}\nOperations:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("operation", nargs="?", choices=SHAPES, default="topk_attention")
    parser.add_argument("--shape", help="sizes with commas between them")
    parser.add_argument("--topk", type=int, default=32, help="of topk_attention and bank_retrieval; 0: dense attention")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    asked = parser.parse_args(arguments)
    try:
        shape = tuple(map(int, (asked.shape or SHAPES[asked.operation][1]).split(",")))
    except ValueError:
        parser.error(f"--shape: expected {SHAPES[asked.operation][0]}; got {asked.shape!r}")
    if not torch.cuda.is_available() and not launch.INTERPRETED:
        raise SystemExit("hivilt.tune: no GPU is visible to torch; the shipped table stays in force")
    try:
        _of_user()
        found = tune(shape, asked.topk or None, asked.dtype, operation=asked.operation)
    except ValueError as error:
        parser.error(str(error))
    part, _ = launch.part_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    for (kernel, dtype, width), (best, ms, shipped_ms) in found.items():
        name = f"{kernel}/{dtype}/{configs.width_class(width)}"
        print(f"{name:<40}{tuple(best)!s:<22}{ms:8.3f} ms   shipped {shipped_ms:8.3f} ms")
    save(part, found)
    print(f"written to {configs.users_file()}")


if __name__ == "__main__":
    main()
