"""What this installation can do: ``python -m hivilt.info`` prints versions, processor, instruction sets, GPUs, every
backend's state, what was built, what was skipped and why, and the HIVILT_* variables in force. Computes nothing."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import _backends, _library, _settings, ops

FOLDER = Path(__file__).resolve().parent

# What each object of the CPU library needs, in the words of cpu_features(); csrc/cpu/isa.cpp asks the CPU for the same.
ISA_NEEDS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c", "bmi", "bmi2", "popcnt"},
    "avx512": {"avx2", "fma", "f16c", "bmi", "bmi2", "popcnt", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
ISA_NEEDS["avx512_bf16"] = ISA_NEEDS["avx512"] | {"avx512bf16", "avx512vnni"}


def build_record() -> dict[str, Any]:
    """The record that setup.py left: built, skipped (part -> reason), isas, flags, compiler, git; empty without one."""
    try:
        return json.loads((FOLDER / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def cpu_features() -> list[str]:
    """Instruction set extensions of this CPU that the kernels know, from the host module, else from /proc/cpuinfo."""
    try:
        from . import _C
    except ImportError:
        known = sorted(ISA_NEEDS["avx512_bf16"])
        spelled = {"bmi": "bmi1", "avx512bf16": "avx512_bf16", "avx512vnni": "avx512_vnni"}
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())
        return [name for name in known if spelled.get(name, name) in flags]
    return _C.cpu_features()


def isas_supported() -> list[str]:
    """The instruction sets that this CPU can run, oldest first, whether or not they were built."""
    features = set(cpu_features())
    return [name for name, needs in ISA_NEEDS.items() if needs <= features]


def isa_in_use() -> str | None:
    """The instruction set of the kernels that run here; None without the C++ library."""
    try:
        return torch.ops.hivilt.isa()
    except (AttributeError, RuntimeError):
        return None


def installed(package: str) -> str:
    """Version of an installed package, or that it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def backends(device: str) -> dict[str, str | None]:
    """Each backend's verdict on a smallest call of every kind of device: None (it can run it) or its reason."""
    x = torch.zeros(1, 1, 1, 8, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        return _backends.explain(ops.topk_attention, x, x, x, topk=1)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    return found


def collect() -> dict[str, dict[str, str]]:
    """Everything that is printed: heading -> label -> text."""
    record = build_record()
    built, skipped = record.get("built", []), record.get("skipped", {})
    gpus = cuda_devices()
    states = {
        f"{name} on {device}": "available" if reason is None else f"no: {reason}"
        for device in ("cpu", *(["cuda"] if gpus else []))
        for name, reason in backends(device).items()
    }
    failure = _library.load_failure()
    revision = f" ({record['git']})" if record.get("git") else ""
    return {
        "versions": {
            "hivilt": f"{installed('hivilt')}{revision}, {FOLDER}",
            "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
            "triton": installed("triton"),
            "numpy": installed("numpy"),
            "python": f"{platform.python_version()}, {sys.executable}",
            "platform": platform.platform(),
        },
        "processor": {
            "model": cpu_model(),
            "threads": f"torch {torch.get_num_threads()}, CPUs {os.cpu_count()}",
            "features": " ".join(cpu_features()) or "unknown",
            "isa built": ", ".join(record.get("isas", [])) or "none",
            "isa of this CPU": ", ".join(isas_supported()),
            "isa in use": isa_in_use() or f"none: {failure or 'the C++ library does not say'}",
        },
        "gpu": {f"cuda:{index}": text for index, text in enumerate(gpus)} or {"cuda": "no device visible to torch"},
        "backends": states,
        "build": {
            "built": ", ".join(built) or "nothing",
            "for": f"torch {record.get('torch')}, stable ABI {record.get('torch_target')}" if record else "no record",
            "compiler": str(record.get("compiler")),
            "flags": " ".join(record.get("flags", [])) or "none",
            "cuda archs": ", ".join(record.get("cuda_archs", [])) or "none",
            **{f"skipped {part}": why for part, why in skipped.items()},
        },
        "variables": {name: _settings.in_force().get(name, "not set") for name in _settings.ALLOWED},
    }


def main() -> None:
    argparse.ArgumentParser(prog="python -m hivilt.info", description=__doc__.splitlines()[0]).parse_args()
    for heading, rows in collect().items():
        print(heading)
        for label, text in rows.items():
            print(f"  {label:<18} {text}")


if __name__ == "__main__":
    main()
