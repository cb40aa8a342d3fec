"""What the ranks send each other: few collectives on fixed layouts, each within the deadline of its call, each counted.

Every payload travels as bytes, so that a backend's list of dtypes does not matter.  Nothing is ever pickled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

MODULES: WeakKeyDictionary = WeakKeyDictionary()  # group -> modules constructed on it


class ShardError(RuntimeError):
    """A rank did not answer within the timeout, is gone, or failed while the others waited for its part."""


class Exchange:
    """One rank's end of a process group.

    After a collective that failed, what the group's connections hold is unknown: every later call raises at once.
    ``received`` holds, for the last call of each operation, the bytes that came from other ranks in each phase.
    """

    def __init__(self, group: Any, timeout: float | None, owner: str = "ShardedFeatureBank"):
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group, self.timeout, self.owner = group, timeout, owner
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.received: dict[str, dict[str, int]] = {}
        self.sequence = 0  # handshakes so far, the same number on every rank
        # Which of the modules on this group it is: ranks that call two like ones in different orders are told.
        self.module = 0 if group is None else MODULES.get(group, 0)
        if group is not None:
            MODULES[group] = self.module + 1
        self._failure: str | None = None
        self._operation, self._deadline, self._under_way = "", None, False

    def __deepcopy__(self, memo: dict) -> Exchange:
        """A copied module talks through the same group: one process has one end of it."""
        return self

    @contextmanager
    def call(self, operation: str):
        """All collectives inside share one deadline.  What fails while a payload is under way fails the group: the
        other ranks are in the middle of it, and the next header would meet their payload."""
        if self._failure is not None:
            raise ShardError(f"{self.owner}.{operation}: the process group failed before: {self._failure}")
        self._operation = operation
        self._deadline = None if self.timeout is None else time.monotonic() + self.timeout
        self.received[operation] = {}
        self._under_way = False
        try:
            yield
        except BaseException as error:
            if self._under_way and self._failure is None:
                self._failure = f"rank {self.rank} of {self.size}: {operation} failed here ({type(error).__name__})"
            raise

    def set_out(self) -> None:
        """From here on every rank is bound to all collectives of the call."""
        self._under_way = self.size > 1

    def turn_back(self) -> None:
        """All ranks leave the call together, having agreed to."""
        self._under_way = False

    def all_gather(self, x: Tensor, phase: str) -> Tensor:
        """[W, *x.shape] of equally shaped tensors."""
        if self.size == 1:
            return x[None]
        source = _bytes(x)
        result = source.new_empty(self.size * source.numel())
        if not result.numel():  # on every rank alike
            return x.new_empty(self.size, *x.shape)
        self._count(phase, (self.size - 1) * source.numel())
        options = dist.distributed_c10d.AllgatherOptions()
        self._run(phase, options, lambda: self.group._allgather_base(result, source, options))
        return result.view(x.dtype).view(self.size, *x.shape)

    def all_gather_rows(self, x: Tensor, rows: list[int], phase: str) -> Tensor:
        """[sum(rows), ...] in rank order; rank r passes rows[r] of them, and all send as many as the largest."""
        most = max(rows)
        if min(rows) == most:
            return self.all_gather(x, phase).flatten(0, 1)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: x.shape[0]] = x
        every = self.all_gather(padded, phase)
        return torch.cat([part[:n] for part, n in zip(every, rows, strict=True)])

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int], phase: str) -> Tensor:
        """Rows of x, send[r] of them to rank r in order; returns receive[r] rows from rank r, in rank order."""
        if self.size == 1:
            return x
        source = _bytes(x)
        width = x.element_size() * math.prod(x.shape[1:])
        result = source.new_empty(sum(receive) * width)
        self._count(phase, (sum(receive) - receive[self.rank]) * width)
        options = dist.distributed_c10d.AllToAllOptions()
        sizes = [n * width for n in receive], [n * width for n in send]
        self._run(phase, options, lambda: self.group.alltoall_base(result, source, *sizes, options))
        return result.view(x.dtype).view(sum(receive), *x.shape[1:])

    def all_max(self, x: Tensor, phase: str) -> Tensor:
        """The largest of every element; no NaN inside.  Counted as a ring moves it: 2 (W - 1) / W of the tensor."""
        if self.size == 1:
            return x
        result = x.clone()
        self._count(phase, 2 * (self.size - 1) * x.numel() * x.element_size() // self.size)
        options = dist.distributed_c10d.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self._run(phase, options, lambda: self.group.allreduce([result], options))
        return result

    def _count(self, phase: str, received: int) -> None:
        seen = self.received[self._operation]
        seen[phase] = seen.get(phase, 0) + received

    def _run(self, phase: str, options: Any, start: Callable[[], Any]) -> None:
        """The timeout goes to the operation itself, which ends it, and to the wait, should the backend only wait."""
        left = None if self._deadline is None else self._deadline - time.monotonic()
        try:
            if left is not None:
                if left <= 0:
                    raise RuntimeError("no time is left")
                # Whole milliseconds, as backends count them: 0 would mean no limit at all.
                options.timeout = timedelta(milliseconds=max(1, int(left * 1000)))
            work = start()
            if left is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=left + 0.5))
        except RuntimeError as error:  # whatever a backend reports, timeouts included, is one
            limit = "the group's timeout" if self.timeout is None else f"{self.timeout:g} s"
            self._failure = (
                f"rank {self.rank} of {self.size}: {phase}: not every rank answered within {limit}, or one is gone "
                f"({str(error).strip().splitlines()[0][:300]})"
            )
            raise ShardError(f"{self.owner}.{self._operation}: {self._failure}") from error


def _bytes(x: Tensor) -> Tensor:
    """The same memory, flat; of a strided tensor a copy."""
    return x.contiguous().flatten().view(torch.uint8)
