"""The int8 copy that a feature bank keeps of its rows, and when it may be used: while every write since was seen."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from torch import Tensor

from ..ops._bank_shadow import bank_shadow, is_used


@dataclass(eq=False)
class State:
    """Of a tensor: any write through torch, or another tensor in its place, gives another one."""

    tensor: weakref.ref  # the same object as long as the tensor lives
    address: int
    version: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        # == of two references would compare the elements of the tensors.
        same = self.tensor is other.tensor
        return same and self.address == other.address and self.version == other.version


def is_counted(bank: Tensor) -> bool:
    """Whether torch counts writes to it, and a copy of it would be used."""
    return not bank.is_inference() and is_used(bank)


def state_of(bank: Tensor) -> State:
    return State(weakref.ref(bank), bank.data_ptr(), bank._version)


class Shadow:
    """Of a bank, which is copied when it is read for the second time without a change between: so a bank that others
    write to all the time costs nothing."""

    def __init__(self) -> None:
        self._bytes: Tensor | None = None
        self._copied: State | None = None  # the bank's when the copy was made
        self._seen: State | None = None  # and when it was last asked for
        self._lock = threading.Lock()  # several threads may read a bank

    def __reduce__(self):
        return type(self), ()  # a copy of the module has another bank

    def of(self, bank: Tensor) -> Tensor | None:
        """The copy; None where there is none yet, or none would be used."""
        if not is_counted(bank):
            return None
        state = state_of(bank)
        with self._lock:
            if self._copied != state:
                if self._seen != state:
                    self._seen = state
                    return None
                self._bytes = bank_shadow(bank)
                self._copied = state
            return self._bytes

    def knows(self, bank: Tensor) -> bool:
        """Whether there is a copy of the bank as it is."""
        return self._copied is not None and is_counted(bank) and self._copied == state_of(bank)

    def follow(self, bank: Tensor, slots: Tensor) -> None:
        """After a write to these slots of a bank that it knew."""
        bank_shadow(bank, shadow=self._bytes, slots=slots)
        self._copied = self._seen = state_of(bank)
