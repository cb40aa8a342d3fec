"""The file of a feature bank: rows and counts as bytes, checked before they are believed; no pickle.

    header     68 bytes, little endian: magic, version, dtype, M, C, ptr, filled, skipped, settings' length, flags, CRC
    settings   JSON, an object
    written    with flag 1: M bytes of 0 or 1
    rows       M C numbers, little endian, by slot
    SHA-256    32 bytes, of all that stands before

A file is written beside its name and takes it when it is on the disk, so the name always stands for a whole file; the
one before stays as ``<name>.old``, and is read with a warning where the newest is damaged or missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAGIC = b"\x89HVBANK\n"  # a text mode would change its first or its last byte
VERSION = 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HEADER = struct.Struct("<8sIIQQQQQII")
CRC = struct.Struct("<I")
WRITTEN = 1  # the only flag
SETTINGS_BYTES = 1 << 16
CHUNK = 1 << 20
INT64_MAX = (1 << 63) - 1


class BankFileError(ValueError):
    """A file is not one of a feature bank, or is damaged."""


class BankState(NamedTuple):
    """What a file holds: rows [M, C] on the CPU, written bool [M] or None, and settings as JSON knows them."""

    rows: Tensor
    ptr: int
    filled: int
    skipped: int
    written: Tensor | None
    settings: dict[str, Any]


class Header(NamedTuple):
    dtype: torch.dtype
    M: int
    C: int
    ptr: int
    filled: int
    skipped: int
    settings: int
    flags: int

    @property
    def total(self) -> int:
        """Bytes of the file; Python's integers do not overflow, whatever the header says."""
        rows = self.M * self.C * self.dtype.itemsize
        return (
            HEADER.size + CRC.size + self.settings + (self.M if self.flags else 0) + rows + hashlib.sha256().digest_size
        )


def write(path: str | os.PathLike[str], state: BankState) -> None:
    """Puts a state into a file, whole or not at all.

    Raises:
        ValueError: settings that JSON cannot hold, or more than 64 KiB of them.  OSError: what the system says; the
        file of that name is then what it was.
    """
    settings = json.dumps(state.settings, allow_nan=False).encode()
    if len(settings) > SETTINGS_BYTES:
        raise ValueError(f"save: settings: expected at most {SETTINGS_BYTES} bytes of JSON; got {len(settings)}")
    path = Path(path).absolute()
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    spare = fresh.with_suffix(".old")
    try:
        with open(fresh, "xb") as file:
            for part in parts(state, settings):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        # Only an intact file becomes the generation before: a damaged one must not take the place of a good one.
        if why_damaged(path) is None:
            try:  # a second name for it, so that there is no moment without a file of the first
                os.link(path, spare)
                os.replace(spare, old(path))
            except OSError:  # a file system without links: until the next line, ``load`` finds the old name
                os.replace(path, old(path))
        os.replace(fresh, path)
        sync_folder(path.parent)
    finally:
        for leftover in (fresh, spare):
            with suppress(OSError):
                os.unlink(leftover)


def parts(state: BankState, settings: bytes) -> Iterator[bytes | memoryview]:
    M, C = state.rows.shape
    flags = 0 if state.written is None else WRITTEN
    counts = state.ptr, state.filled, state.skipped
    header = HEADER.pack(MAGIC, VERSION, DTYPES.index(state.rows.dtype), M, C, *counts, len(settings), flags)
    digest = hashlib.sha256()
    blocks = [header + CRC.pack(zlib.crc32(header)), settings]
    if state.written is not None:
        blocks.append(memoryview(state.written.to(torch.uint8).contiguous().numpy()))
    blocks.append(memoryview(little_endian(state.rows)).cast("B"))
    for block in blocks:
        for first in range(0, len(block), CHUNK):
            part = block[first : first + CHUNK]
            digest.update(part)
            yield part
    yield digest.digest()


def little_endian(rows: Tensor) -> np.ndarray:
    """The bits of rows as integers, flat; a copy only on a big endian machine."""
    size = rows.dtype.itemsize
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return rows.contiguous().view(bits).numpy().reshape(-1).astype(f"<i{size}", copy=False)


def read(path: str | os.PathLike[str]) -> BankState:
    """The state in a file, or, with a warning, in the one before it where the newest is damaged or missing.

    Raises:
        BankFileError: both are damaged, or the newest is and there is no other.  OSError: what the system says.
        Nothing is allocated before the file has the length that its header says and the checksum that it ends with.
    """
    path = Path(path).absolute()
    try:
        return read_one(path)
    except (BankFileError, FileNotFoundError) as error:
        try:
            state = read_one(old(path))
        except (BankFileError, OSError):
            raise error from None
        said = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        warnings.warn(f"hivilt: {path} {said}; read the generation before it, {old(path)}", UserWarning, stacklevel=3)
        return state


def read_one(path: Path) -> BankState:
    with open_regular(path) as file:
        header = check(file, path)
        file.seek(HEADER.size + CRC.size)
        settings = parse_settings(file.read(header.settings), path)
        written = None
        if header.flags:
            marks = np.frombuffer(file.read(header.M), np.uint8)
            if marks.size != header.M or marks.max() > 1 or int(marks.sum(dtype=np.int64)) != header.filled:
                raise BankFileError(f"{path}: the marks of written rows do not add up to {header.filled}")
            written = torch.from_numpy(marks.astype(np.bool_))
        bits = np.empty(header.M * header.C, f"<i{header.dtype.itemsize}")
        if file.readinto(memoryview(bits).cast("B")) != bits.nbytes:
            raise BankFileError(f"{path}: it became shorter while it was read")
        native = bits.astype(bits.dtype.newbyteorder("="), copy=False)
        rows = torch.from_numpy(native).view(header.dtype).reshape(header.M, header.C)
    return BankState(rows, header.ptr, header.filled, header.skipped, written, settings)


def why_damaged(path: Path) -> str | None:
    """None for an intact file, else what is wrong with it or that there is none."""
    try:
        with open_regular(path) as file:
            check(file, path)
    except (BankFileError, OSError) as error:
        return str(error)
    return None


def open_regular(path: Path) -> BinaryIO:
    """An open file; a pipe would wait for its other end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BankFileError(f"{path}: not a regular file")
    return open(path, "rb")


def check(file: BinaryIO, path: Path) -> Header:
    """The header of a file whose length and checksum are right, in pieces of 1 MiB."""
    header = parse_header(file.read(HEADER.size + CRC.size), path)
    size = os.fstat(file.fileno()).st_size
    if size != header.total:
        raise BankFileError(f"{path}: {size} bytes, where its header asks for {header.total}")
    digest = hashlib.sha256()
    file.seek(0)
    left = size - digest.digest_size
    while left:
        piece = file.read(min(left, CHUNK))
        if not piece:
            raise BankFileError(f"{path}: it became shorter while it was read")
        digest.update(piece)
        left -= len(piece)
    if file.read() != digest.digest():
        raise BankFileError(f"{path}: the checksum is wrong")
    return header


def parse_header(data: bytes, path: Path) -> Header:
    if len(data) != HEADER.size + CRC.size or not data.startswith(MAGIC):
        raise BankFileError(f"{path}: not a file of a feature bank")
    if CRC.unpack(data[HEADER.size :])[0] != zlib.crc32(data[: HEADER.size]):
        raise BankFileError(f"{path}: the header's checksum is wrong")
    _, version, dtype, M, C, ptr, filled, skipped, settings, flags = HEADER.unpack(data[: HEADER.size])
    if version != VERSION:
        raise BankFileError(f"{path}: version {version}, where {VERSION} is known")
    if dtype >= len(DTYPES) or flags & ~WRITTEN:
        raise BankFileError(f"{path}: dtype {dtype} or flags {flags} are not known")
    if not (M and C) or ptr >= M or filled > M or skipped > INT64_MAX or settings > SETTINGS_BYTES:
        said = f"M {M}, C {C}, ptr {ptr}, filled {filled}, skipped {skipped}, {settings} bytes of settings"
        raise BankFileError(f"{path}: numbers that no bank has: {said}")
    return Header(DTYPES[dtype], M, C, ptr, filled, skipped, settings, flags)


def parse_settings(data: bytes, path: Path) -> dict[str, Any]:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        settings = json.loads(data.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BankFileError(f"{path}: settings: {error}") from None
    if not isinstance(settings, dict):
        raise BankFileError(f"{path}: settings: expected an object; got a {type(settings).__name__}")
    return settings


def old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def sync_folder(folder: Path) -> None:
    """A new name is on the disk when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
