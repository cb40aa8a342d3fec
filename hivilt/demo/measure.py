"""Time and peak memory of models that take turns, for inference and for a training step."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .model import CrossModalModel

PATIENCE = 45  # seconds of measuring after which no further round starts


def inference(model: CrossModalModel, patches: Tensor, words: Tensor) -> None:
    with torch.inference_mode():
        model(patches, words)


def training_step(model: CrossModalModel, patches: Tensor, words: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model.loss(patches, words).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=1e-4)


def extra_memory(call: Callable[[], None]) -> float | None:
    """Bytes by which the process grows at its peak during the call (Linux keeps a high-water mark that can be reset).

    Everything counts, not only tensors: kernels' own buffers and what the allocator cannot give back.
    """

    def read(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.M)[1]) * 1024

    try:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = read("VmRSS")
        call()
        return max(0, read("VmHWM") - before)
    except (OSError, TypeError):
        return None


def measure(models: dict[str, CrossModalModel], patches: Tensor, words: Tensor, rounds: int) -> dict[tuple, dict]:
    """(model, work) -> milliseconds of each round and extra bytes; models take turns, so that all see one machine.

    On a slow machine there are fewer rounds than asked for, at least three.
    """
    work = {"inference": inference, "training step": training_step}
    found = {(name, what): {"ms": [], "bytes": None} for name in models for what in work}
    with tqdm(total=len(found) * (rounds + 2), desc="measuring", leave=False) as bar:
        began = time.perf_counter()
        for turn in range(rounds + 2):
            if turn > 4 and time.perf_counter() - began > PATIENCE:
                break
            for (name, what), cell in found.items():
                model = models[name].train(what != "inference")
                if turn == 1:
                    cell["bytes"] = extra_memory(lambda f=work[what], m=model: f(m, patches, words))
                else:
                    start = time.perf_counter()
                    work[what](model, patches, words)
                    if turn > 1:  # turn 0 warms up
                        cell["ms"].append(1e3 * (time.perf_counter() - start))
                model.zero_grad(set_to_none=True)
                bar.update()
    return found


def table(found: dict[tuple, dict], pairs: list[tuple[str, str]]) -> str:
    """Median and half the distance between the quartiles; each model against the one before it in its pair."""
    lines = [f"{'':<28}{'inference':>17}{'':>8}{'memory':>9}   {'training step':>17}{'':>8}{'memory':>9}"]
    for pair in pairs:
        for name in pair:
            line = f"  {name:<26}"
            for what in ("inference", "training step"):
                cell, base = found[name, what], found[pair[0], what]
                low, middle, high = statistics.quantiles(cell["ms"], n=4, method="inclusive")
                ratio = statistics.median(a / b for a, b in zip(base["ms"], cell["ms"], strict=True))
                size = "n/a" if cell["bytes"] is None else f"{cell['bytes'] / 2**20:.0f} MiB"
                faster = f"{ratio:.2f}x" if name != pair[0] else ""
                line += f"{middle:>8.0f} ms ±{(high - low) / 2:>3.0f}{'':>1}{faster:>8}{size:>9}   "
            lines.append(line.rstrip())
    return "\n".join(lines)
