"""A feature bank of M rows of C channels spread over W ranks; slot g is row g div W of rank g mod W.

Retrieval, gradients and pushes equal those of one bank with all rows; no rank ever holds it, nor a B x topk x C tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._checks import FLOATS, INT32_MAX, Said, check_flag, check_number, check_tensor, check_topk, refuse
from ..reference.modules._bank_reading import unit, wide_dtype
from . import state as states
from .candidates import shard_rows
from .exchange import Exchange
from .handshake import DTYPES, OPERATIONS, Header, agree, bits
from .retrieval import Call, ShardedRetrieval, retrieve

NONFINITE = ("skip", "raise", "keep")
NAME = "ShardedFeatureBank"


class ShardedFeatureBank(nn.Module):
    """A ring buffer of features and retrieval from it, sharded over the ranks of a process group.

    Every rank constructs it alike, several of them in the same order, and calls ``update``, ``forward`` and, where
    gradients are wanted, backward, each with its own features and queries: any number of them, also none.  Features are
    taken in rank-major order.  Before anything is sent the ranks agree on what they do; a call that does not fit, or
    that one rank refuses, raises the same error on all of them, changes nothing and leaves the group usable.  After a
    ShardError it is not: then every call raises at once, until a new group and a new module take the state over.

    Args:
        bank_size: M, slots in all; less than 2^31 on each rank.
        feature_dim: C.
        topk: how many rows a query retrieves; more than there are pads.
        scale: of the scores in the softmax: a number, or a tensor of one element (a Parameter is registered and gets a
            gradient).  The same value on every rank.
        process_group: of torch.distributed, gloo or nccl; None is the default group, or this process alone where
            torch.distributed was not initialised.
        timeout: seconds for one call, all its collectives together; None leaves it to the group.
        normalize: features are scaled to length 1 before they are written, queries before they are looked up.
        on_nonfinite: features that hold NaN or infinity, or would in the bank's dtype, are left out and counted
            ("skip"), refuse the call ("raise") or are written ("keep").
        dtype: of the bank: float32, bfloat16, float16 or float64; device: where the shard lives.

    State:
        bank [ceil or floor of M / W, C]: this rank's rows, zeros at first, kept out of ``buffers()``, because
        DistributedDataParallel would overwrite every rank's with those of rank 0.  It is in state_dict and moves with
        ``to``.  Buffers, the same on every rank: ptr int64 (1,), the next slot; filled int64 (), how many slots hold a
        row; skipped int64 (), how many rows were left out.

    Raises:
        ValueError, TypeError: a malformed argument.
    """

    def __init__(
        self,
        bank_size: int,
        feature_dim: int,
        *,
        topk: int,
        scale: float | Tensor = 1.0,
        process_group: Any = None,
        timeout: float | None = None,
        normalize: bool = False,
        on_nonfinite: str = "skip",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.bank_size = _size("bank_size", bank_size)
        self.feature_dim = _size("feature_dim", feature_dim)
        if topk is None:
            refuse(TypeError, NAME, "topk", "an int of at least 1", topk)
        self.topk = check_topk(NAME, topk)
        if self.topk > INT32_MAX:
            refuse(ValueError, NAME, "topk", "less than 2^31", topk)
        check_flag(NAME, "normalize", normalize)
        self.normalize = normalize
        if not isinstance(on_nonfinite, str) or on_nonfinite not in NONFINITE:
            kind = ValueError if isinstance(on_nonfinite, str) else TypeError
            refuse(kind, NAME, "on_nonfinite", f"one of {', '.join(map(repr, NONFINITE))}", on_nonfinite)
        self.on_nonfinite = on_nonfinite
        if dtype not in FLOATS:
            refuse(TypeError, NAME, "dtype", "torch.float32, bfloat16, float16 or float64", dtype)
        if timeout is not None:
            timeout = check_number(NAME, "timeout", timeout)
            if timeout <= 0:
                refuse(ValueError, NAME, "timeout", "more than 0 seconds, or None", timeout)
        if isinstance(scale, Tensor):
            if not scale.is_floating_point() or scale.numel() != 1:
                refuse(ValueError, NAME, "scale", "a number or a floating point tensor of one element", scale)
        else:
            scale = check_number(NAME, "scale", scale)
        if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
            self.register_buffer("scale", scale, persistent=False)
        else:
            self.scale = scale
        self.exchange = Exchange(process_group, timeout)
        if self.exchange.rank < 0:
            refuse(ValueError, NAME, "process_group", "a group that this process belongs to", Said("another"))
        local = shard_rows(self.bank_size, self.exchange.rank, self.exchange.size)
        if shard_rows(self.bank_size, 0, self.exchange.size) > INT32_MAX:
            refuse(ValueError, NAME, "bank_size", "fewer than 2^31 slots on each rank", bank_size)
        self.bank = torch.zeros(local, self.feature_dim, dtype=dtype, device=device)
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.int64, device=device))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        return (
            f"bank_size={self.bank_size}, feature_dim={self.feature_dim}, topk={self.topk}, "
            f"rank {self.exchange.rank} of {self.exchange.size}"
        )

    @torch.compiler.disable
    def forward(self, query: Tensor, exclude: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What every rank's queries retrieve from all shards; a collective call.

        Args:
            query: float32, bfloat16, float16 or float64 [B, C], float64 exactly where the bank is; B may differ from
                rank to rank and be 0, the dtype may not differ.
            exclude: int32 or int64 [B], for each query a global slot that is not valid, -1 for none; on every rank or
                on none.

        Returns:
            retrieved [B, C] in query's dtype; scores [B, topk], raw dot products in float32 (float64 for float64),
            descending; indices int64 [B, topk] of global slots, ties ascending.  -inf and -1 where rows run out, and
            NaN, as in ``hivilt.ops.bank_retrieval``.

        Gradients reach query and scale, through retrieved and scores; that of scale is the part of this rank's
        queries, so their sum over the ranks is the gradient of one bank.  Backward is collective too: every rank calls
        it, for its forward calls in the same order.  It uses the rows as they were: a push in between changes nothing.
        Second derivatives raise.

        Raises:
            ValueError, TypeError: on every rank alike, nothing was done.  ShardError: a rank is gone, stalled, failed.

        Cost: 2 (sum of B) (M / W) C flops per rank; memory O(sum of B (C + topk)) and, for backward, C elements for
        each winner in this shard.  Bytes: docs/sharded_bank.md and ``payload_bytes``.  The host waits for the device.
        """
        with self.exchange.call("forward"):
            scale = self.scale if isinstance(self.scale, Tensor) else None

            def prepare() -> Header:
                self._check_rows("query", query, self.bank)
                if exclude is not None:
                    self._check_exclude(exclude, query)
                records = torch.is_grad_enabled() and (
                    query.requires_grad or (scale is not None and scale.requires_grad)
                )
                return {
                    "rows": query.shape[0],
                    "dtype": DTYPES.index(query.dtype),
                    "scale_is_tensor": int(scale is not None),
                    "scale": bits(float(self.scale if scale is None else scale.detach())),
                    "exclude": int(exclude is not None),
                    "records": int(records),
                }

            number = self.exchange.sequence
            every = self._agree("forward", prepare)
            rows = [header["rows"] for header in every]
            wire = torch.float64 if query.dtype == torch.float64 else torch.float32
            dtype = query.dtype
            if self.normalize:  # not rounded to a half type again
                query = unit(query)
            filled = int(self.filled)
            call = Call(
                exchange=self.exchange,
                rows=rows,
                shard=self.bank,
                count=shard_rows(filled, self.exchange.rank, self.exchange.size),
                topk=self.topk,
                exclude=None if exclude is None else exclude.to(torch.int64),
                scale=0.0 if scale is not None else self.scale,
                wire=wire,
                number=number,
            )
            if every[self.exchange.rank]["records"]:
                retrieved, scores, indices = ShardedRetrieval.apply(query, scale, call)
            else:
                with torch.no_grad():
                    retrieved, scores, indices = retrieve(call, query, scale, save=False)
            return retrieved.to(dtype), scores, indices

    @torch.compiler.disable
    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Writes every rank's features, rank after rank, to the next slots of the ring; a collective call.

        Args:
            features: floating point [B, C], rounded to the bank's dtype, without gradients; B may differ and be 0.  Of
                more than M rows in all the last M are written.

        Raises:
            ValueError, TypeError: on every rank alike, nothing was written.  ShardError: a rank is gone or stalled;
            this rank wrote nothing, others may have: the next call on a new group tells.

        Cost: each row travels once, to the rank that keeps it.
        """
        with self.exchange.call("update"):
            rank, size, M = self.exchange.rank, self.exchange.size, self.bank_size
            stays = features

            def prepare() -> Header:
                nonlocal stays
                self._check_rows("features", features)
                wide = wide_dtype(features.dtype, self.bank.dtype)
                stays = (unit(features.to(wide)) if self.normalize else features).to(self.bank.dtype)
                if self.on_nonfinite != "keep":
                    finite = stays.isfinite().all(1)
                    if self.on_nonfinite == "raise" and not bool(finite.all()):
                        what = f"rows that are finite in {str(stays.dtype)[6:]}, because on_nonfinite is 'raise'"
                        refuse(ValueError, f"{NAME}.update", "features", what, Said("NaN or infinity"))
                    stays = stays[finite]
                return {"rows": features.shape[0], "kept": stays.shape[0]}

            every = self._agree("update", prepare)
            kept = [header["kept"] for header in every]
            total, ptr = sum(kept), int(self.ptr)
            # Every rank knows every row's place: those before the last M are never sent, no counts are exchanged.
            places = torch.arange(max(0, total - M), total)
            slots = (ptr + places) % M
            source = torch.repeat_interleave(torch.arange(size), torch.tensor(kept))[places]
            target = slots % size
            own = places[source == rank] - sum(kept[:rank])
            order = target[source == rank].argsort(stable=True)
            send = target[source == rank].bincount(minlength=size).tolist()
            receive = source[target == rank].bincount(minlength=size).tolist()
            rows = stays[own[order].to(stays.device)]
            rows = self.exchange.all_to_all(rows, send, receive, "features")
            at = slots[target == rank] // size  # in rank-major order, as they come
            self.bank[at.to(self.bank.device)] = rows
            self.skipped.add_(sum(header["rows"] for header in every) - total)
            self.filled.copy_((self.filled + total).clamp(max=M))
            self.ptr.copy_((self.ptr + total) % M)

    def payload_bytes(self) -> dict[str, dict[str, int]]:
        """What the last call of each operation received from other ranks on this rank: operation -> phase -> bytes."""
        return {operation: dict(phases) for operation, phases in self.exchange.received.items()}

    def full_state(self) -> dict[str, Tensor]:
        """The whole bank on every rank, a collective call: bank [M, C] in slot order, ptr, filled, skipped.

        Cost: M C elements on every rank; where that is too much, save state_dict() of every rank and ``reshard`` those.
        """
        with self.exchange.call("full_state"):
            self._agree("full_state", dict)
            size = self.exchange.size
            rows = [shard_rows(self.bank_size, rank, size) for rank in range(size)]
            shards = self.exchange.all_gather_rows(self.bank, rows, "rows").split(rows)
            bank = self.bank.new_empty(self.bank_size, self.feature_dim)
            for rank, shard in enumerate(shards):
                bank[rank::size] = shard
            return {"bank": bank, **{name: getattr(self, name).clone() for name in states.COUNTERS}}

    @torch.no_grad()
    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """Takes this rank's rows from a state of the whole bank, whatever the number of ranks it came from.

        Not collective: every rank loads the same state.  ValueError, with nothing changed, for another size.
        """
        op = f"{NAME}.load_full_state"
        for name in ("bank", *states.COUNTERS):
            if not isinstance(state.get(name), Tensor):
                refuse(ValueError, op, "state", f"a tensor {name!r}", state.get(name))
        if tuple(state["bank"].shape) != (self.bank_size, self.feature_dim):
            refuse(ValueError, op, "bank", f"shape {(self.bank_size, self.feature_dim)}", state["bank"])
        states.check_counters(op, state, self.bank_size)
        self.bank.copy_(state["bank"][self.exchange.rank :: self.exchange.size])
        for name in states.COUNTERS:
            getattr(self, name).copy_(state[name])

    def _agree(self, operation: str, prepare: Callable[[], Header]) -> list[Header]:
        """Every rank's header.  ``prepare`` checks the arguments and says what the header holds of them; what it raises
        is told to the others before it is raised."""
        header: Header = {
            "operation": OPERATIONS.index(operation),
            "bank_size": self.bank_size,
            "feature_dim": self.feature_dim,
            "topk": self.topk,
            "normalize": int(self.normalize),
            "on_nonfinite": NONFINITE.index(self.on_nonfinite),
        }
        refusal = None
        try:
            header["bank_dtype"] = DTYPES.index(self.bank.dtype)
            header |= {name: int(getattr(self, name)) for name in states.COUNTERS}
            header |= prepare()
        except Exception as error:
            refusal = error
        return agree(self.exchange, header, refusal, self.bank.device)

    def _check_rows(self, name: str, x: Any, bank: Tensor | None = None) -> None:
        op = f"{NAME}.{'forward' if name == 'query' else 'update'}"
        check_tensor(op, name, x, 2, "(B, C)")
        if x.shape[1] != self.feature_dim:
            refuse(ValueError, op, name, f"shape (B, {self.feature_dim})", x)
        if x.device != self.bank.device:
            refuse(ValueError, op, name, f"the bank's device {self.bank.device}", x)
        if bank is not None and (x.dtype == torch.float64) != (bank.dtype == torch.float64):
            refuse(TypeError, op, name, "float64 exactly when the bank is float64", x)

    def _check_exclude(self, exclude: Any, query: Tensor) -> None:
        op, B = f"{NAME}.forward", query.shape[0]
        if not isinstance(exclude, Tensor) or exclude.dtype not in (torch.int32, torch.int64):
            refuse(TypeError, op, "exclude", "an int32 or int64 tensor", exclude)
        if tuple(exclude.shape) != (B,):
            refuse(ValueError, op, "exclude", f"shape ({B},)", exclude)
        if exclude.device != query.device:
            refuse(ValueError, op, "exclude", f"query's device {query.device}", exclude)
        if B and not bool(((exclude >= -1) & (exclude < self.bank_size)).all()):
            refuse(ValueError, op, "exclude", f"values from -1 to {self.bank_size - 1}", Said("one outside"))

    # ``bank`` is no buffer (see the class), so what a buffer gets from nn.Module is done here.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedFeatureBank:
        super()._apply(fn, recurse)
        self.bank = fn(self.bank)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bank"] = self.bank
        layout = [self.bank_size, self.feature_dim, self.exchange.rank, self.exchange.size]
        destination[prefix + "layout"] = torch.tensor(layout)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        """All of a shard's state or nothing: one that is of another size, rank or number of ranks changes nothing."""
        rest = {key: value for key, value in state_dict.items() if key not in (prefix + "bank", prefix + "layout")}
        bank, layout = state_dict.get(prefix + "bank"), state_dict.get(prefix + "layout")
        names = [prefix + name for name in ("bank", "layout", *states.COUNTERS)]
        absent = [name for name in names if not isinstance(state_dict.get(name), Tensor)]
        if absent:
            if strict:
                missing.extend(absent)
            return
        expected = [self.bank_size, self.feature_dim, self.exchange.rank, self.exchange.size]
        if layout.tolist() != expected or bank.shape != self.bank.shape:
            errors.append(
                f"{prefix}bank: expected the shard (bank_size, feature_dim, rank, world size) = {tuple(expected)}; "
                f"got {tuple(layout.tolist())} of shape {tuple(bank.shape)}; hivilt.distributed.reshard converts"
            )
            return
        try:
            states.check_counters(NAME, {name: state_dict[prefix + name] for name in states.COUNTERS}, self.bank_size)
        except ValueError as error:
            errors.append(str(error))
            return
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        with torch.no_grad():
            self.bank.copy_(bank)


def _size(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        refuse(TypeError, NAME, name, "an int", value)
    value = value.__index__()
    if value < 1:
        refuse(ValueError, NAME, name, "at least 1", value)
    return value
