"""The torch.library handle of namespace ``hivilt``: defines operators with everything torch asks of them, and loads
the C++ library.  Every operator is opaque to tracing; schemas stand in Python, so they exist without the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

FOLDER = Path(__file__).resolve().parent
LIBRARY = torch.library.Library("hivilt", "FRAGMENT")

# Which instruction set the C++ library chose; implemented there, for any device.
LIBRARY.define("isa() -> str")

loaded = False  # the C++ library is there
_load_failure: str | None = "hivilt.ops was not imported"


def define(
    schema: str,
    *,
    fake: Callable,
    run: Callable | None = None,
    vmap: Callable | None = None,
    flops: Callable | None = None,
) -> torch._ops.OpOverload:
    """Defines ``hivilt::<schema>`` and returns its overload, bound once.

    Args:
        fake: shapes, dtypes and strides of the results, for meta and fake tensors.
        run: the implementation for CPU and CUDA tensors; None where C++ brings one.
        vmap: batching rule ``(info, in_dims, *args) -> (results, out_dims)``.
        flops: ``(*argument shapes, out_shape=...) -> int`` for torch.utils.flop_counter.
    """
    name = schema.split("(", 1)[0]
    # Implementations take any strides, so Inductor need not copy arguments into their eager layout.
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    packet = getattr(torch.ops.hivilt, name)
    if run is not None:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"hivilt::{name}", fake, lib=LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(f"hivilt::{name}", vmap, lib=LIBRARY)
    if flops is not None:
        _unregistered_flops[packet] = flops
    return packet.default


_unregistered_flops: dict[torch._ops.OpOverloadPacket, Callable] = {}


def register_flops() -> None:
    """Hands the flop formulas to torch.utils.flop_counter once somebody has imported it; it imports Triton, we do not.

    Called where a dispatch mode may be counting; one that is already active took its copy of the registry before.
    """
    counting = sys.modules.get("torch.utils.flop_counter")
    if not _unregistered_flops or counting is None or not hasattr(counting, "register_flop_formula"):
        return
    mine = dict(_unregistered_flops)
    _unregistered_flops.clear()
    for packet, formula in mine.items():
        counting.register_flop_formula(packet)(formula)
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            registry.update({packet: counting.flop_registry[packet] for packet in mine})


def load() -> None:
    """Loads the C++ library that implements the ``*_cpu`` operators; a failure is remembered, never raised."""
    global loaded, _load_failure
    path = next(iter(sorted(FOLDER.glob("_cpu*.so"))), None)
    if path is None:
        _load_failure = f"the C++ library is not built ({_why_not_built()})"
        return
    try:
        torch.ops.load_library(str(path))
        loaded, _load_failure = True, None
    except (OSError, RuntimeError) as error:
        _load_failure = f"the C++ library {path.name} does not load: {str(error).splitlines()[0]}"


def _why_not_built() -> str:
    try:
        skipped = json.loads((FOLDER / "_build_info.json").read_text(encoding="utf-8"))["skipped"]
        return skipped["_cpu"]
    except (OSError, ValueError, KeyError, TypeError):
        return "pip install -e . --no-build-isolation builds it"


def load_failure() -> str | None:
    """Why the C++ library is absent; None when it is loaded."""
    return _load_failure
