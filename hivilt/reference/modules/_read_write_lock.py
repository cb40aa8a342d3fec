"""Many readers or one writer at a time, for modules whose forward reads what another thread updates in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """A thread may read or write again inside its own ``reading`` or ``writing``; only reading -> writing is refused.

    Readers that come while a writer waits queue behind it, and those that waited out a writer go before the next one,
    so that neither side starves.  A copy or an unpickled one is a new lock that nobody holds.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._readers: dict[int, int] = {}  # thread -> how often it reads, one inside the other
        self._writer: int | None = None
        self._depth = 0  # of the writer
        self._waiting_readers = self._waiting_writers = 0
        self._admitted = 0  # readers that the next writer lets go first

    def __reduce__(self):
        return type(self), ()

    @contextmanager
    def reading(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            inside = self._writer == me or me in self._readers
            if not inside and (self._writer is not None or self._waiting_writers):
                self._waiting_readers += 1
                try:
                    while self._writer is not None or (self._waiting_writers and not self._admitted):
                        self._changed.wait()
                finally:
                    self._waiting_readers -= 1
                    self._admitted = max(0, self._admitted - 1)
                    self._changed.notify_all()
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                    self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            if self._writer != me:
                if me in self._readers:
                    raise RuntimeError("a thread that reads a bank may not write to it before it is done reading")
                self._waiting_writers += 1
                try:
                    while self._writer is not None or self._readers or self._admitted:
                        self._changed.wait()
                finally:
                    self._waiting_writers -= 1
                    self._changed.notify_all()
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._admitted = self._waiting_readers
                    self._changed.notify_all()
