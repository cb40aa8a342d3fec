"""From a launch that was written down to what Triton compiles for it, on a part that is not there: the same binder and
the same packing of signature, constants and attributes that a launch goes through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from ..triton_kernels import launch
from .calls import Call

PARTS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Job(NamedTuple):
    """One kernel to compile, in the terms of ``triton.compiler.ASTSource``; plain values, for another process."""

    part: str
    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]


def job(part: str, kernel: Any, args: tuple, constants: dict[str, Any], warps: int, stages: int) -> Job:
    """What ``kernel[grid](*args, num_warps=warps, num_stages=stages, **constants)`` compiles on the part."""
    backend = make_backend(PARTS[part])
    debug = kernel.debug or triton.knobs.runtime.debug
    keywords = {**constants, "num_warps": warps, "num_stages": stages, "debug": debug}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = bind(*args, **keywords)
    options, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialization, extra)
    return Job(part, kernel.fn.__module__, kernel.fn.__name__, signature, constexprs, attrs, dict(options.__dict__))


def jobs(part: str, wanted: Iterable[Call], only: str = "") -> list[tuple[Call, Job]]:
    """What the calls start on a part: each specialisation once, beside the first call that starts it."""
    found: dict[str, tuple[Call, Job]] = {}
    for call in wanted:
        with launch.recording(part) as recorded:
            call.run()
        for r in recorded:
            name = r.kernel.fn.__name__
            if only in name and call.kernel in name:
                new = job(part, r.kernel, r.args, r.constants, r.warps, r.stages)
                found.setdefault(repr(new), (call, new))
    return list(found.values())
