"""What a figure depends on beside the code; ``python bench/machine.py`` prints it as JSON.

On a GPU that is the GPU first: its name, driver, multiprocessors, memory, L2, and its clocks where nvidia-smi is there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
from device import DEVICE, LIKE_GPU, REHEARSED

import hivilt
from hivilt import info

CLOCKS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit",
          "temperature.gpu", "utilization.gpu")  # fmt: skip


def describe(threads: int) -> dict:
    gpus = info.cuda_devices()
    facts = {
        "cpu": info.cpu_model(),
        "cpus": psutil.cpu_count(),
        "isa": info.isa_in_use() or "none",
        "threads": threads,
        "gpu": gpus[0] if gpus else None,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "hivilt": hivilt.__version__,
    }
    if LIKE_GPU:
        facts |= {"rehearsal": REHEARSED, "device": DEVICE, "triton": installed("triton"), "cuda": torch.version.cuda}
    return facts | (gpu_facts() if gpus else {})


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu_facts(index: int = 0) -> dict:
    found = torch.cuda.get_device_properties(index)
    return {
        "gpu_name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "gpus": torch.cuda.device_count(),
        "cudnn": torch.backends.cudnn.version(),
    } | clocks(index)


def clocks(index: int = 0) -> dict[str, str]:
    """What nvidia-smi says now, MHz, W and degrees Celsius; empty without it."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(CLOCKS, values, strict=True)) if len(values) == len(CLOCKS) else {}


if __name__ == "__main__":
    print(json.dumps(describe(torch.get_num_threads())))
