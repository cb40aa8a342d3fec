"""A bank of feature rows, written in a ring or by moving average, read by softmax over dot products, in plain PyTorch.

The meaning of reading is that of hivilt/reference/bank_retrieval.py; here B x M scores are written.  Nothing waits for
the device: pointer and counts stay on it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ._bank_arguments import FLOATS, check_count, check_number, check_read, check_scale, check_update
from ._bank_reading import attend, select, unit, wide_dtype
from ._checks import check_choice, check_size, refuse
from ._read_write_lock import ReadWriteLock

UPDATE_MODES = ("fifo", "ema")
NONFINITE = ("skip", "raise", "keep")
SHADOWS = ("int8",)


class FeatureBank(nn.Module):
    """M rows of C features that a model fills while it runs and reads by similarity.

    Args:
        bank_size: M.
        feature_dim: C.
        momentum: from 0 to 1, the share of the old row in an update of mode "ema".
        update_mode: "fifo" is a ring, the oldest rows are overwritten; "ema" blends rows with what their slots hold.
        topk: how many rows a query reads; None: all rows.
        scale: of the dot products in the softmax: a number, a Parameter of one element, which learns, or a tensor of
            one element, which becomes a buffer.
        normalize: rows (when they are written) and queries have length 1; a row of zeros stays zeros.
        on_nonfinite: what ``update`` does with rows that hold NaN or infinity, or would in the bank's dtype: "skip"
            leaves them out and counts them in ``skipped``, "raise" refuses them all (and waits for the device to
            know), "keep" writes them.
        shadow: None, or "int8": on the CPU ``hivilt.nn.FeatureBank`` keeps a copy of the rows in bytes, by which few
            queries find the same ones sooner; an attribute that may be set at any time.  Here it changes nothing.
        compat: None, or "seed": the bank starts as random rows that all count as written.
        device, dtype: of the bank; float32, bfloat16, float16 or float64.

    Buffers: ``bank`` [M, C]; ``ptr`` int64 [1], the slot that is written next; ``filled`` int64 [], how many slots were
    written; ``skipped`` int64 []; with "ema" also ``written`` bool [M].  A slot that was never written is never read.
    A checkpoint that has ``bank`` and no ``filled`` loads, with all rows counted as written.

    Threads: readers beside a writer see the bank before or after an update, never in between.  Compiled functions take
    no lock, as a graph cannot hold one, and streams of a GPU run on after it was given back: put ``reading()`` or
    ``writing()`` around them, and synchronise streams, where threads share a bank that way.

    DistributedDataParallel: every process has a bank of its own, provided that ``keep_banks_local(model)`` was called
    before the model was wrapped (or ``broadcast_buffers=False``); otherwise rank 0's bank replaces all others.
    """

    def __init__(
        self,
        bank_size: int,
        feature_dim: int,
        momentum: float = 0.9,
        *,
        update_mode: str = "fifo",
        topk: int | None = None,
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        on_nonfinite: str = "skip",
        shadow: str | None = None,
        compat: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "FeatureBank"
        self.bank_size = check_size(where, "bank_size", bank_size)
        self.feature_dim = check_size(where, "feature_dim", feature_dim)
        self.momentum = check_number(where, "momentum", momentum, 0.0, 1.0)
        self.update_mode = check_choice(where, "update_mode", update_mode, UPDATE_MODES)
        self.topk = None if topk is None else check_count(where, "topk", topk)
        if not isinstance(normalize, bool):
            refuse(TypeError, where, "normalize", "a bool", normalize)
        self.normalize = normalize
        self.on_nonfinite = check_choice(where, "on_nonfinite", on_nonfinite, NONFINITE)
        self.shadow = None if shadow is None else check_choice(where, "shadow", shadow, SHADOWS)
        if compat is not None:
            check_choice(where, "compat", compat, ("seed",))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATS:
            refuse(TypeError, where, "dtype", "float32, bfloat16, float16 or float64", dtype)
        scale = check_scale(where, scale)
        if isinstance(scale, nn.Parameter):
            self.scale = scale
        elif isinstance(scale, Tensor):
            if scale.requires_grad:
                expected = "a torch.nn.Parameter where it learns, or scale= of forward"
                refuse(ValueError, where, "scale", expected, "a tensor that requires grad")
            self.register_buffer("scale", scale.clone())
        else:
            self.scale = scale
        seed, size = compat == "seed", (self.bank_size, self.feature_dim)
        rows = torch.randn(size, device=device, dtype=dtype) if seed else torch.zeros(size, device=device, dtype=dtype)
        self.register_buffer("bank", rows)
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.int64, device=device))
        filled = self.bank_size if seed else 0
        self.register_buffer("filled", torch.full((), filled, dtype=torch.int64, device=device))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=device))
        if update_mode == "ema":
            self.register_buffer("written", torch.full((self.bank_size,), seed, dtype=torch.bool, device=device))
        self._ddp_params_and_buffers_to_ignore = self._own_buffers()  # read where the bank itself is wrapped
        # An update writes in place, because a copy of the bank per update would cost more than the update, and kernels
        # read without Python's global lock: so readers and writers exclude each other, at about 2 us per call.
        self._lock = ReadWriteLock()

    def reading(self) -> AbstractContextManager[None]:
        """Within it no other thread updates the bank; any number of threads may be in one."""
        return self._lock.reading()

    def writing(self) -> AbstractContextManager[None]:
        """Within it no other thread reads or updates the bank."""
        return self._lock.writing()

    def forward(
        self,
        query: Tensor,
        *,
        scale: float | Tensor | None = None,
        mask: Tensor | None = None,
        exclude: Tensor | None = None,
        return_scores: bool = False,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Reads the bank: softmax of scale <query, row> over the ``topk`` best rows, or all rows, times the rows.

        Args:
            query: [..., C]; float64 exactly when the bank is.
            scale: takes the place of the module's: a number or a tensor of one element, which gets a gradient.
            mask: bool [M] or [..., M], True takes part.
            exclude: int64 [...], a slot that a query does not read, -1 for none; not with topk=None.
            return_scores: also return the raw dot products and slots of the rows; not with topk=None.
            return_lse: also return the log-sum-exp of the scaled scores [...]; only with topk=None.

        Returns:
            retrieved [..., C] in query's dtype; with return_scores a tuple with scores [..., topk] in float32 (float64
            for float64), descending, ties by slot ascending, and slots int64 [..., topk], -inf and -1 where rows run
            out.  Before anything was written: zeros, without gradient.  A NaN among a query's scores makes its result
            NaN.

        Raises:
            ValueError, TypeError: an argument that does not fit.  In backward of topk=None RuntimeError, where a kernel
            read the bank and an update came between; reading ``topk`` rows keeps them, so updates change nothing.

        Cost: 2 B M C flops for topk, twice that for all rows.
        """
        where = "FeatureBank"
        for name, flag in (("return_scores", return_scores), ("return_lse", return_lse)):
            if not isinstance(flag, bool):
                refuse(TypeError, where, name, "a bool", flag)
        if self.topk is None:
            if return_scores:
                refuse(ValueError, where, "return_scores", "False, because topk is None", return_scores)
            if exclude is not None:
                refuse(ValueError, where, "exclude", "None, because topk is None", exclude)
            found = self._read(query, None, scale, mask, None)
            return found if return_lse else found[0]
        if return_lse:
            refuse(ValueError, where, "return_lse", f"False, because topk is {self.topk}", return_lse)
        found = self._read(query, self.topk, scale, mask, exclude)
        return found if return_scores else found[0]

    def sample_from_bank(
        self,
        query: Tensor,
        k: int = 100,
        *,
        scale: float | Tensor | None = None,
        mask: Tensor | None = None,
        exclude: Tensor | None = None,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """What ``forward`` gives with topk = k, whatever the module's topk; k may be more than the rows there are."""
        k = check_count("FeatureBank.sample_from_bank", "k", k)
        found = self._read(query, k, scale, mask, exclude)
        return found if return_scores else found[0]

    @torch.no_grad()
    def update(self, features: Tensor, slots: Tensor | None = None) -> None:
        """Writes rows, without gradients and without waiting for the device.

        Args:
            features: any floating dtype [B, C], on the bank's device.  Row i goes to slot (ptr + i) mod M, of more than
                M rows the last M; rows that are left out take no slot.  Mode "ema" blends each with what its slot
                holds: momentum old + (1 - momentum) row; a slot that was never written takes the row.
            slots: only in mode "ema": int32 or int64 [B], the slot of each row.  Rows of one slot count as their mean,
                the same bits every time.  ``ptr`` stays where it is.

        Raises:
            ValueError, TypeError: an argument that does not fit, before anything is written.  A slot outside 0..M-1
            raises on the CPU; on other devices and in compiled code, where asking would wait, its row is left out and
            counted in ``skipped``.

        Cost: O(B C), and with slots a sort of B numbers.  With normalize, blended rows get length 1 again.
        """
        rows = check_update(self, features, slots)
        if features.shape[0] == 0:
            return
        if torch.compiler.is_compiling():
            self._write(rows, slots)
        else:
            with self._lock.writing():
                self._write(rows, slots)

    @torch.no_grad()
    def reset(self) -> None:
        """Empties the bank, as after construction without compat; ``skipped`` too is 0 again."""
        if torch.compiler.is_compiling():
            self._clear()
        else:
            with self._lock.writing():
                self._clear()

    def _clear(self) -> None:
        for name in self._own_buffers():
            self.get_buffer(name).zero_()

    # Reading.

    def _read(self, query: Tensor, topk: int | None, scale, mask, exclude) -> tuple[Tensor, ...]:
        """(retrieved, scores, slots), or with topk None (retrieved, lse)."""
        flat, scale, mask, exclude = check_read(self, query, scale, mask, exclude)
        if torch.compiler.is_compiling():
            found = self._look(flat, topk, scale, mask, exclude)
        else:
            with self._lock.reading():
                found = self._look(flat, topk, scale, mask, exclude)
        lead = query.shape[:-1]
        return tuple(x.reshape((*lead, *x.shape[1:])) for x in (found[0].to(query.dtype), *found[1:]))

    def _look(self, query: Tensor, topk: int | None, scale, mask, exclude) -> tuple[Tensor, ...]:
        device = query.device.type
        autocast = device == "cpu" or torch.amp.is_autocast_available(device)
        # Under autocast the bank would be rounded before selection.
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if self.normalize:
                query = unit(query)
            if topk is None:
                return self._attend(query, scale, mask)
            return self._select(query, topk, scale, mask, exclude)

    def _valid(self, mask: Tensor | None) -> Tensor:
        """bool [M] or [B, M]: written, and allowed by the mask."""
        if self.update_mode == "ema":
            valid = self.written
        else:
            valid = torch.arange(self.bank_size, device=self.bank.device) < self.filled
        return valid if mask is None else valid & mask

    def _attend(self, query: Tensor, scale: float | Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """query [B, C]: retrieved and log-sum-exp."""
        return attend(query, self.bank, scale, self._valid(mask))

    def _select(
        self, query: Tensor, topk: int, scale: float | Tensor, mask: Tensor | None, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, C]: retrieved, scores and slots."""
        return select(query, self.bank, topk, scale, self._valid(mask), exclude)

    # Writing.

    def _write(self, rows: Tensor, slots: Tensor | None) -> None:
        if self.update_mode == "fifo":
            self._push(rows)
        elif slots is None:
            self._blend_ring(rows, self._stays(rows))
        else:
            self._blend_slots(rows, slots.long(), self._stays(rows))

    def _stays(self, rows: Tensor) -> Tensor:
        """bool [B]: the rows that are written."""
        if self.on_nonfinite == "keep":
            return torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
        return rows.to(self.bank.dtype).isfinite().all(1)

    def _push(self, rows: Tensor) -> None:
        source, slots, new, number = self._places(self._stays(rows))
        self.bank[slots] = torch.where(new[:, None], rows[source].to(self.bank.dtype), self.bank[slots])
        self.filled.copy_((self.filled + number).clamp(max=self.bank_size))
        self._advance(number, rows.shape[0])

    def _blend_ring(self, rows: Tensor, stays: Tensor) -> None:
        source, slots, new, number = self._places(stays)
        old, written = self.bank[slots], self.written[slots]
        self.bank[slots] = torch.where(new[:, None], self._blend(old, rows[source], written), old)
        self.written[slots] = written | new
        self.filled.copy_(self.written.sum())
        self._advance(number, rows.shape[0])

    def _places(self, stays: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows to write and their slots, min(B, M) of them and all slots different: ``new`` says which are written; the
        others stand where as many more rows would have gone, and what is there stays."""
        B, M = stays.shape[0], self.bank_size
        number = stays.sum()
        order = (~stays).to(torch.uint8).argsort(stable=True)  # rows that stay first, as they came
        place = torch.arange(min(B, M), device=stays.device) + (number - M).clamp(min=0)
        return order[place.clamp(max=B - 1)], (self.ptr + place) % M, place < number, number

    def _advance(self, number: Tensor, count: int) -> None:
        self.ptr.copy_((self.ptr + number) % self.bank_size)
        self.skipped.add_(count - number)

    def _blend_slots(self, rows: Tensor, slots: Tensor, stays: Tensor) -> None:
        B, M = rows.shape[0], self.bank_size
        stays = stays & (slots >= 0) & (slots < M)
        slots, order = torch.where(stays, slots, M).sort(stable=True)  # rows left out are a last segment, of slot M
        starts = torch.ones_like(stays)
        starts[1:] = slots[1:] != slots[:-1]
        segment = starts.cumsum(0) - 1
        lengths = torch.zeros_like(slots).scatter_add_(0, segment, torch.ones_like(slots))
        # Each sum runs through its rows in their order: unlike index_add_ on a GPU, the same bits every time.
        wide = wide_dtype(rows.dtype, self.bank.dtype)
        sums = torch.segment_reduce(rows[order].to(wide), "sum", lengths=lengths, axis=0, unsafe=True)
        means = sums / lengths.clamp(min=1)[:, None]
        # All rows of a slot write the same number.  Rows left out write what the first slot gets, or, where nothing is
        # written, what slot 0 holds.
        inside = slots < M
        at = torch.where(inside, slots, slots[0] % M)
        old, written = self.bank[at], self.written[at]
        blended = self._blend(old, means[torch.where(inside, segment, 0)], written)
        self.bank[at] = torch.where(inside[0], blended, old)
        self.written[at] = written | inside[0]
        self.filled.copy_(self.written.sum())
        self.skipped.add_(B - stays.sum())

    def _blend(self, old: Tensor, new: Tensor, written: Tensor) -> Tensor:
        """momentum old + (1 - momentum) new, and new itself where nothing was; in float32 at least, rounded once."""
        wide = wide_dtype(old.dtype, new.dtype)
        new = new.to(wide)
        blended = self.momentum * old.to(wide) + (1.0 - self.momentum) * new
        if self.normalize:
            blended = unit(blended)
        return torch.where(written[:, None], blended, new).to(old.dtype)

    # Checkpoints and processes.

    def _own_buffers(self) -> list[str]:
        return [name for name in ("bank", "ptr", "filled", "skipped", "written") if name in self._buffers]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """All or nothing: torch itself would load pointer and counts of a bank whose rows it refuses."""
        state_dict, M = dict(state_dict), self.bank_size
        given = {name: state_dict[prefix + name] for name in self._own_buffers() if prefix + name in state_dict}
        wrong = []
        for name, x in given.items():
            mine = self.get_buffer(name)
            if isinstance(x, Tensor) and x.shape != mine.shape and not (mine.dim() == 0 and x.shape == (1,)):
                wrong.append(
                    f"size mismatch for {prefix}{name}: copying a param with shape {x.shape} from checkpoint, "
                    f"the shape in current model is {mine.shape}."
                )
        for name, most in (("ptr", M), ("filled", M), ("skipped", None)) if not wrong else ():
            x = given.get(name)
            if isinstance(x, Tensor) and not x.is_meta and not 0 <= int(x) <= (int(x) if most is None else most):
                wrong.append(f"{prefix}{name}: expected a number from 0 to {most or 'infinity'}; got {int(x)}.")
        if wrong:
            error_msgs += wrong
            return
        if "bank" in given:  # checkpoints from before there were counts
            device = given["bank"].device
            if "filled" not in given:
                state_dict[prefix + "filled"] = torch.full((), M, dtype=torch.int64, device=device)
            if "skipped" not in given:
                state_dict[prefix + "skipped"] = torch.zeros((), dtype=torch.int64, device=device)
            if self.update_mode == "ema" and "written" not in given:
                filled = state_dict[prefix + "filled"]
                state_dict[prefix + "written"] = torch.arange(M, device=device) < filled.to(device)
        with self._lock.writing():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if not self.ptr.is_meta:
                with torch.no_grad():
                    self.ptr.remainder_(M)  # one past the end is slot 0

    def extra_repr(self) -> str:
        said = f"{self.bank_size}, {self.feature_dim}, momentum={self.momentum}, update_mode={self.update_mode!r}"
        said += f", topk={self.topk}" + ("" if isinstance(self.scale, Tensor) else f", scale={self.scale:g}")
        said += f", normalize={self.normalize}, on_nonfinite={self.on_nonfinite!r}"
        return said + ("" if self.shadow is None else f", shadow={self.shadow!r}")


def keep_banks_local(model: nn.Module) -> nn.Module:
    """Tells DistributedDataParallel to leave the banks of a model alone; call it right before wrapping the model.

    Without it rank 0's banks replace those of all other processes at every forward pass, because torch asks only the
    module that is wrapped, not the bank inside it, which buffers to leave out (or pass broadcast_buffers=False).  Names
    that other code put there stay.  A learned scale is synchronised as any parameter.

    Returns:
        model.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        refuse(TypeError, "keep_banks_local", "model", "a torch.nn.Module", model)
    names = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for path, module in model.named_modules():
        if isinstance(module, FeatureBank):
            for name in module._own_buffers():
                names.append(f"{path}.{name}" if path else name)
                module.get_buffer(name)._ddp_ignored = True  # mixed precision would make a half of the pointer
    model._ddp_params_and_buffers_to_ignore = list(dict.fromkeys(names))
    return model
