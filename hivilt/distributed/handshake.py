"""Before any payload every rank tells every other what it is about to do, in a header of fixed size.

So a call that does not fit, or that one rank refuses, raises the same error on every rank, before anything is sent,
waited for or written, and the group stays usable.
"""

from __future__ import annotations

import struct
from typing import NoReturn

import torch

from .exchange import Exchange

WORDS = 64  # of 8 bytes; never another number, so that versions can tell each other apart
PROTOCOL = 0x4856_4250_0001
OPERATIONS = ("update", "forward", "backward", "full_state")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ERRORS = (None, ValueError, TypeError, MemoryError, RuntimeError)  # status words; any other kind travels as the last

# What a rank may have of its own, then what must be the same on every rank, in the order in which it is compared.
OWN = ("status", "rows", "kept")
SHARED = (
    "protocol", "module", "operation", "sequence", "bank_size", "feature_dim", "bank_dtype", "topk", "normalize",
    "on_nonfinite", "ptr", "filled", "skipped", "dtype", "scale_is_tensor", "scale", "exclude", "records",
    "grad_retrieved", "grad_scores", "of_call",
)  # fmt: skip
FIELDS = OWN + SHARED
TEXT = 8 * (WORDS - len(FIELDS))  # bytes left for what a rank has to say about a refusal

Header = dict[str, int]


def agree(exchange: Exchange, header: Header, refusal: Exception | None, device: torch.device) -> list[Header]:
    """Every rank's header, in rank order; fields left out are 0.

    Raises:
        The refusal of the lowest rank that has one, on every rank with the same text.  ValueError: headers that differ.
        ShardError: a rank that does not answer.
    """
    header = {**header, "protocol": PROTOCOL, "module": exchange.module, "sequence": exchange.sequence}
    exchange.sequence += 1
    if exchange.size == 1:
        if refusal is not None:
            raise refusal
        return [header]
    text = b""
    if refusal is not None:
        kinds = [i for i, kind in enumerate(ERRORS) if kind is not None and isinstance(refusal, kind)]
        header["status"] = kinds[0] if kinds else len(ERRORS) - 1
        text = str(refusal).encode()[:TEXT]
    packed = struct.pack(f"<{len(FIELDS)}q", *(header.get(name, 0) for name in FIELDS)) + text.ljust(TEXT, b"\0")
    words = torch.frombuffer(bytearray(packed), dtype=torch.int64).to(device)
    every = exchange.all_gather(words, "header").cpu()
    found = [dict(zip(FIELDS, row, strict=True)) for row in every[:, : len(FIELDS)].tolist()]
    for rank, other in enumerate(found):
        if other["protocol"] == PROTOCOL and other["status"]:
            said = every[rank, len(FIELDS) :].numpy().tobytes().rstrip(b"\0").decode(errors="replace")
            raise ERRORS[min(max(other["status"], 1), len(ERRORS) - 1)](f"{said} (on rank {rank})")
    for name in SHARED:
        for rank, other in enumerate(found):
            if other[name] != found[0][name]:
                _differ(name, found[0][name], rank, other[name])
    exchange.set_out()
    return found


def _differ(name: str, first: int, rank: int, other: int) -> NoReturn:
    raise ValueError(
        f"ShardedFeatureBank: {name}: expected the same on every rank; got {_said(name, first)} on rank 0 and "
        f"{_said(name, other)} on rank {rank}"
    )


def _said(name: str, value: int) -> str:
    if name == "operation" and 0 <= value < len(OPERATIONS):
        return OPERATIONS[value]
    if name in ("dtype", "bank_dtype") and 0 <= value < len(DTYPES):
        return str(DTYPES[value])[6:]
    if name == "scale":
        return repr(struct.unpack("<d", struct.pack("<q", value))[0])
    return str(value)


def bits(x: float) -> int:
    """A float as a word, so that it is compared bit by bit."""
    return struct.unpack("<q", struct.pack("<d", x))[0]
