"""Peak memory of one call beyond its inputs: results, everything saved for backward, and every temporary.

On the CPU it is measured from outside, because not all memory comes from torch's allocator: a process that has only
imported torch is forked, makes a tiny call of the same kind, then the inputs, and the growth of its resident memory
during one call is what counts.  On a GPU the allocator is asked.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import device
import family
import torch

M_MMAP_THRESHOLD = -3
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["__main__", "torch"])


def peak_bytes(name: str, case: Any, threads: int, run: Callable[[], object], timeout_s: float = 120) -> int | None:
    """Peak memory of one call of a rival, ``run`` in this process; None where it cannot be measured."""
    if device.LIKE_GPU:
        return device.peak_bytes(run)
    if not Path("/proc/self/clear_refs").exists():
        return None
    ours, theirs = _server.Pipe()
    child = _server.Process(target=_child, args=(theirs, name, case, threads), daemon=True)
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(timeout_s) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()


def _child(pipe, name: str, case: Any, threads: int) -> None:
    draw, runner = family.of(case).draw, family.of(case).runner
    # Freed blocks go back to the system at once, so that they cannot hide what comes after.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    torch.set_num_threads(threads)
    if name != "compile":  # it would only compile twice
        small = case.smallest()
        runner(name, small, draw(small))()
    call = runner(name, case, draw(case))
    if name == "compile":
        call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    results = call()
    pipe.send(max(0, _status("VmHWM") - before) * 1024)
    del results


def _status(field: str) -> int:
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1])
