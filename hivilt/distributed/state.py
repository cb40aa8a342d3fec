"""Checkpoints of a sharded bank: the state of one shard, of the whole, and from one number of ranks to another.

One shard's state_dict holds ``bank`` [local rows, C], the counters ``ptr`` (1,), ``filled`` () and ``skipped`` () of
the whole bank, and ``layout`` int64 (4,): bank_size, feature_dim, rank, world size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .candidates import shard_rows

COUNTERS = {"ptr": (1,), "filled": (), "skipped": ()}
State = dict[str, Tensor]


def reshard(states: Sequence[Mapping[str, Tensor]], world_size: int) -> list[State]:
    """The state_dicts of all shards of one bank, for another number of ranks.

    Args:
        states: state_dict() of every rank, in rank order; without a prefix.
        world_size: how many shards to make.

    Returns:
        world_size state_dicts, in rank order; rank r loads the r-th.

    Raises:
        TypeError, ValueError: something missing, of a wrong shape, or shards that do not belong together.

    Cost: one copy of the bank, in this process; no rank talks to another.
    """
    _check_world_size(world_size)
    full = join(states)
    return [split(full, rank, world_size) for rank in range(world_size)]


def join(states: Sequence[Mapping[str, Tensor]]) -> State:
    """One state of the whole bank, ``bank`` [M, C] in slot order, from the states of all its shards."""
    size = len(states)
    if size == 0:
        raise ValueError("reshard: states: expected the state of every rank; got none")
    for rank, state in enumerate(states):
        for name in ("bank", "layout", *COUNTERS):
            if not isinstance(state.get(name), Tensor):
                raise ValueError(f"reshard: states: expected a tensor {name!r} in each; got none in state {rank}")
        if state["layout"].shape != (4,) or state["layout"].tolist()[2:] != [rank, size]:
            raise ValueError(
                f"reshard: states: expected shard {rank} of {size} in place {rank}; got the layout "
                f"{state['layout'].tolist()} (bank_size, feature_dim, rank, world size)"
            )
        for name, shape in COUNTERS.items():
            if state[name].shape != shape or not torch.equal(state[name].cpu(), states[0][name].cpu()):
                raise ValueError(f"reshard: states: expected the same {name} in each; got another in state {rank}")
    M, C = states[0]["layout"].tolist()[:2]
    bank = states[0]["bank"].new_zeros(M, C)
    for rank, state in enumerate(states):
        expected = (shard_rows(M, rank, size), C)
        if state["layout"].tolist()[:2] != [M, C] or tuple(state["bank"].shape) != expected:
            got = tuple(state["bank"].shape)
            raise ValueError(f"reshard: states: expected a bank of shape {expected} in state {rank}; got {got}")
        bank[rank::size] = state["bank"]
    check_counters("reshard", states[0], M)
    return {"bank": bank, **{name: states[0][name].clone() for name in COUNTERS}}


def split(full: Mapping[str, Tensor], rank: int, world_size: int) -> State:
    """The state of one shard, from that of the whole bank."""
    M, C = full["bank"].shape
    return {
        "bank": full["bank"][rank::world_size].clone(),
        **{name: full[name].clone() for name in COUNTERS},
        "layout": torch.tensor([M, C, rank, world_size]),
    }


def check_counters(op: str, state: Mapping[str, Tensor], bank_size: int) -> None:
    """A cursor outside the bank would be written through: ValueError."""
    for name, shape in COUNTERS.items():
        value = state[name]
        if value.dtype != torch.int64 or value.shape != shape:
            raise ValueError(
                f"{op}: {name}: expected an int64 tensor of shape {shape}; got a {str(value.dtype)[6:]} tensor of "
                f"shape {tuple(value.shape)}"
            )
    ptr, filled, skipped = (int(state[name]) for name in COUNTERS)
    for name, value, most in (("ptr", ptr, bank_size - 1), ("filled", filled, bank_size), ("skipped", skipped, None)):
        if value < 0 or (most is not None and value > most):
            limit = "at least 0" if most is None else f"from 0 to {most}"
            raise ValueError(f"{op}: {name}: expected {limit}; got {value}")


def _check_world_size(world_size: int) -> None:
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        raise TypeError(f"reshard: world_size: expected an int; got a {type(world_size).__name__}")
    if world_size < 1:
        raise ValueError(f"reshard: world_size: expected at least 1; got {world_size}")
