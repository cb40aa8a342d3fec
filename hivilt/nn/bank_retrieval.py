"""The feature bank on hivilt.ops, and its file: top-k without B x M scores, dense reading in one pass, a ring that one
operator writes.  Constructor, buffers and meaning are those of the plain twin in hivilt.reference.modules."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import bank_attention, bank_push_, bank_retrieval
from ..ops._bank_shadow import SHADOW_QUERIES
from ..reference import modules as plain
from ..reference.modules._bank_arguments import check_count, check_number
from ..reference.modules._bank_reading import INF
from . import _bank_file
from ._bank_file import BankFileError, BankState
from ._bank_shadow import Shadow
from ._choice import kernel_exists

DTYPES = {str(dtype)[6:]: dtype for dtype in _bank_file.DTYPES}
SETTINGS = ("momentum", "update_mode", "topk", "normalize", "on_nonfinite")


class FeatureBank(plain.FeatureBank):
    """The twin, on kernels where there are some for the call, and with a file of its own.

    With shadow="int8", reading ``topk`` rows on the CPU for up to 64 queries reads a quarter of the bank and less, with
    the same result, where that pays.  The copy takes M (C + 31) bytes at most.  ``update`` keeps it up to date; after
    any other write through torch (load_state_dict, to, rows assigned) it is made anew when the bank is read for the
    second time.  Writes that torch does not count, through ``.data``, NumPy or another process, it cannot know of: set
    ``shadow`` to None where there are such.

    Cost: memory beyond the result O(B topk), and B topk C where gradients are wanted; dense O(B C).  Second derivatives
    raise.  With topk=None an update between forward and backward makes backward raise a RuntimeError.
    """

    def _select(
        self, query: Tensor, topk: int, scale: float | Tensor, mask: Tensor | None, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not kernel_exists("bank_retrieval", query.device.type, query.dtype, self.feature_dim):
            return super()._select(query, topk, scale, mask, exclude)
        count, mask = self._count(mask)
        shadow = self._shadow_for(query)
        return bank_retrieval(
            query, self.bank, topk, scale=scale, count=count, mask=mask, exclude=exclude, shadow=shadow
        )

    def _attend(self, query: Tensor, scale: float | Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if not kernel_exists("bank_attention", query.device.type, query.dtype, self.feature_dim):
            return super()._attend(query, scale, mask)
        count, mask = self._count(mask)
        return bank_attention(query, self.bank, scale=scale, count=count, mask=mask)

    def _count(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """count and mask of the operators: a ring is written from slot 0 on, anything else row by row."""
        if self.update_mode == "fifo":
            return self.filled, mask
        return None, self._valid(mask)

    def _shadow_for(self, query: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() or query.shape[0] > SHADOW_QUERIES:
            return None
        if self.shadow is None:
            self.__dict__.pop("_copy", None)
            return None
        return self.__dict__.setdefault("_copy", Shadow()).of(self.bank)

    def _write(self, rows: Tensor, slots: Tensor | None) -> None:
        copy = None if torch.compiler.is_compiling() else self.__dict__.get("_copy")
        known = copy is not None and copy.knows(self.bank)
        super()._write(rows, slots)
        if known:
            if slots is None:  # the last that the ring may have written
                slots = (self.ptr - 1 - torch.arange(min(len(rows), self.bank_size))) % self.bank_size
            copy.follow(self.bank, slots.long())

    def _load_from_state_dict(self, *args) -> None:
        self.__dict__.pop("_copy", None)  # its rows go, and torch swaps no tensor that is weakly referred to
        super()._load_from_state_dict(*args)

    def _push(self, rows: Tensor) -> None:
        # Rounded first, so that a row that overflows the bank's dtype counts as not finite.
        rows = rows.to(self.bank.dtype)
        how = "skip" if self.on_nonfinite == "skip" else "keep"  # "raise" was seen to before anything was written
        bank_push_(self.bank, self.ptr, self.filled, rows, skipped=self.skipped, on_nonfinite=how)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the bank and its settings to a file; the file that was there stays as ``<path>.old``.

        Whatever happens meanwhile, ``load`` finds a whole file, this one or the one before: the new one takes the name
        when it is on the disk.  Other threads may go on reading and updating; the file is of one moment.

        Args:
            path: the file; its folder must exist.

        Raises:
            TypeError: path is no path.  ValueError: a scale that is not finite.  OSError: what the system says; the
            file is then what it was.

        Cost: the bank once in memory and once on the disk, and two SHA-256 of as much.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"FeatureBank.save: path: expected a str or os.PathLike; got a {type(path).__name__}")
        with self.reading():
            rows = self.bank.detach().to("cpu", copy=True)
            counts = int(self.ptr), int(self.filled), int(self.skipped)
            written = self.written.to("cpu", copy=True) if self.update_mode == "ema" else None
            settings = {name: getattr(self, name) for name in SETTINGS} | {"scale": describe_scale(self.scale)}
        _bank_file.write(path, BankState(rows, *counts, written, settings))

    @classmethod
    def load(cls, path: str | os.PathLike[str], bank_size: int | None = None) -> FeatureBank:
        """A bank from a file that ``save`` wrote, on the CPU.

        Args:
            path: the file.  Where it is damaged or missing, ``<path>.old`` is read instead, with a warning.
            bank_size: M of the new bank, by default that of the file.  With another one, the newest min(filled, M) rows
                are kept, in slots from 0 on, the oldest first.

        Raises:
            TypeError, ValueError: a malformed argument.  hivilt.nn.BankFileError, a ValueError: no intact file of a
            bank; it is found out before memory for its rows is taken.  OSError: what the system says.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"FeatureBank.load: path: expected a str or os.PathLike; got a {type(path).__name__}")
        if bank_size is not None:
            bank_size = check_count("FeatureBank.load", "bank_size", bank_size)
        state = _bank_file.read(path)
        M, C = state.rows.shape
        try:
            given = dict(state.settings)
            scale = make_scale(given.pop("scale"))
            if set(given) != set(SETTINGS):
                raise ValueError(f"expected {', '.join(SETTINGS)} and scale")
            if (given["update_mode"] == "ema") != (state.written is not None):
                raise ValueError("marks of written rows go with update_mode 'ema'")
            size = M if bank_size is None else bank_size
            bank = cls(size, C, scale=scale, dtype=state.rows.dtype, **given)
        except (KeyError, TypeError, ValueError) as error:
            raise BankFileError(f"{path}: settings: {error}") from None
        if size == M:
            bank.bank.copy_(state.rows)
            bank.ptr.fill_(state.ptr)
            bank.filled.fill_(state.filled)
            if state.written is not None:
                bank.written.copy_(state.written)
        else:
            slots = (torch.arange(M) + state.ptr) % M  # the oldest first
            slots = slots[slots < state.filled if state.written is None else state.written[slots]][-size:]
            bank.bank[: len(slots)] = state.rows[slots]
            bank.ptr.fill_(len(slots) % size)
            bank.filled.fill_(len(slots))
            if state.written is not None:
                bank.written[: len(slots)] = True
        bank.skipped.fill_(state.skipped)
        return bank


def describe_scale(scale: float | Tensor) -> float | dict[str, Any]:
    if not isinstance(scale, Tensor):
        return scale
    kind = "parameter" if isinstance(scale, nn.Parameter) else "buffer"
    value, dtype = float(scale.detach()), str(scale.dtype)[6:]
    if value != value or abs(value) == float("inf"):
        raise ValueError(f"FeatureBank.save: scale: expected a finite number; got {value}")
    return {"kind": kind, "value": value, "dtype": dtype, "shape": list(scale.shape)}


def make_scale(x: Any) -> float | Tensor:
    if not isinstance(x, dict):
        return x
    shape = x["shape"]
    if not isinstance(shape, list) or len(shape) > 8 or any(n != 1 for n in shape):
        raise ValueError(f"scale: expected one element; got shape {shape}")
    if x["kind"] not in ("parameter", "buffer") or x["dtype"] not in DTYPES:
        raise ValueError(f"scale: expected a parameter or buffer of floats; got {x['kind']!r} of {x['dtype']!r}")
    value = check_number("FeatureBank.load", "scale", x["value"], -INF, INF)
    scale = torch.tensor(value, dtype=torch.float64).to(DTYPES[x["dtype"]]).reshape([1] * len(shape))
    if not scale.isfinite():
        raise ValueError(f"scale: expected a number that a {x['dtype']} can hold; got {value}")
    return nn.Parameter(scale) if x["kind"] == "parameter" else scale
