"""python -m hivilt.tune --shape 8,12,1024,512,64 --topk 32: finds the fastest tile sizes for a call on the GPU at hand.

Nothing is tuned unless this is run.  It writes a file of the user's ($XDG_CACHE_HOME/hivilt/triton.json) that the
kernels prefer to the table they ship with; deleting the file undoes it.
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
Key = tuple[str, str, int]


def candidates(shipped: configs.Config) -> Iterator[configs.Config]:
    """Configurations one step around the shipped one, itself first."""

    def near(value: int, legal: tuple[int, ...]) -> list[int]:
        at = legal.index(value) if value in legal else None
        return [value] if at is None else [legal[i] for i in (at, at - 1, at + 1) if 0 <= i < len(legal)]

    every = itertools.product(*(near(v, configs.LEGAL[name]) for name, v in shipped._asdict().items()))
    return (configs.Config(*values) for values in every)


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


def tune(
    shape: tuple[int, ...], topk: int | None, dtype: str = "bf16", calls: int = 20, steps: int = 100
) -> dict[Key, tuple]:
    """Tunes forward and backward of one call, kernel by kernel, and returns {key: (best, its ms, shipped ms)}.

    Args:
        shape: B, H, Q, N, D.  topk: None is dense.
        calls: timed calls of each candidate.  steps: most candidates of a kernel.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, H, Q, N, D = shape
    query, key, value = (
        torch.randn(B, H, T, D, device=device, dtype=DTYPES[dtype]).requires_grad_() for T in (Q, N, N)
    )
    upstream = torch.randn(B, H, Q, D, device=device, dtype=DTYPES[dtype])

    def call() -> tuple[Tensor, ...]:
        out = ops.topk_attention(query, key, value, topk, backend="triton")
        return out, *torch.autograd.grad(out, (query, key, value), upstream)

    with configs.asked() as asked:
        truth = call()
        keys = sorted(asked)
    part, _ = launch.part_of(query)
    found = {}
    for name in keys:
        shipped = configs.lookup(part, *name)
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


def save(part: str, found: dict[Key, tuple]) -> None:
    """Adds what is faster than the shipped configuration by more than noise to the user's file."""
    path = configs.users_file()
    table = configs.parse(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = table.setdefault(part, {})
    rows.update({key: best for key, (best, ms, shipped_ms) in found.items() if ms < 0.98 * shipped_ms})
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_suffix(".part")
    temporary.write_text(configs.dump(table), encoding="utf-8")
    temporary.replace(path)
    configs.forget()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hivilt.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="8,12,1024,512,64", help="B,H,Q,N,D")
    parser.add_argument("--topk", type=int, default=32, help="0: dense")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not launch.INTERPRETED:
        raise SystemExit("hivilt.tune: no GPU is visible to torch; the shipped table stays in force")
    found = tune(tuple(map(int, asked.shape.split(","))), asked.topk or None, asked.dtype)
    part, _ = launch.part_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    for key, (best, ms, shipped_ms) in found.items():
        print(f"{'/'.join(map(str, key)):<40}{tuple(best)!s:<22}{ms:8.3f} ms   shipped {shipped_ms:8.3f} ms")
    save(part, found)
    print(f"written to {configs.users_file()}")


if __name__ == "__main__":
    main()
