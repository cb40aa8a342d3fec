"""What the Triton rows of all families refuse: the device and the dtype.  Triton itself is imported by the first call
that its kernels can run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import _settings

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_no_device(x: Tensor) -> str | None:
    """Why no kernel runs where x is, or None."""
    if not _installed():
        return "Triton is not installed"
    if x.is_cuda:
        if torch.version.hip is None and _capability(x.device.index) < (8, 0):
            return f"compute capability {'.'.join(map(str, _capability(x.device.index)))}: the kernels need 8.0"
        return None
    if not x.is_cpu:
        return f"the tensors are on {x.device}"
    if not _settings.interprets():
        return "the tensors are on cpu, where only Triton's interpreter runs the kernels (TRITON_INTERPRET=1)"
    from ..triton_kernels import launch

    return None if launch.INTERPRETED else "TRITON_INTERPRET=1 was set after Triton was imported"


def why_no_dtype(x: Tensor) -> str | None:
    if x.dtype in DTYPES:
        return None
    return f"dtype {str(x.dtype)[6:]}: the kernels take float32, bfloat16 and float16"


def guarded(run: Callable) -> Callable:
    """run, and once more with the tile sizes that ship where Triton refuses those of the user's file."""

    @functools.wraps(run)
    def twice(*args):
        try:
            return run(*args)
        except Exception as error:
            configs = sys.modules.get("hivilt.triton_kernels.configs")
            if configs is None or not configs.give_up(error):
                raise
        return run(*args)

    return twice
