"""The file of a feature bank: what it holds byte by byte, crashes at every step of a save, damage, hostile files."""

import collections
import hashlib
import itertools
import json
import os
import struct
import threading
import time
import tracemalloc
import warnings
import zlib

import pytest
import torch
from torch import nn

import hivilt
from hivilt.nn import BankFileError, FeatureBank, _bank_file

NAN = float("nan")
SETTINGS = {
    "momentum": 0.9, "update_mode": "fifo", "topk": None, "normalize": False, "on_nonfinite": "skip", "scale": 1.0,
}  # fmt: skip


def sealed(settings=None, rows=b"\0" * 24, written=b"", **numbers) -> bytes:
    """A file written by hand, with right checksums whatever it says."""
    text = settings if isinstance(settings, bytes) else json.dumps(SETTINGS | (settings or {})).encode()
    n = {"magic": b"\x89HVBANK\n", "version": 1, "dtype": 0, "M": 3, "C": 2, "ptr": 0, "filled": 0, "skipped": 0}
    n |= {"length": len(text), "flags": 0} | numbers
    header = struct.pack("<8sIIQQQQQII", *n.values())
    body = header + struct.pack("<I", zlib.crc32(header)) + text + written + rows
    return body + hashlib.sha256(body).digest()


def bank_of(value: float, size: int = 4) -> FeatureBank:
    bank = FeatureBank(size, 3)
    bank.update(torch.full((2, 3), value))
    return bank


def value_in(path, warns: str | None = None) -> float:
    """The number in the first row of what loads."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bank = FeatureBank.load(path)
    assert [bool(warns) and warns in str(w.message) for w in said] == ([True] if warns else []), said
    assert int(bank.filled) == 2 and bank.bank[:2].unique().numel() == 1
    return float(bank.bank[0, 0])


# What a file holds.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["fifo", "ema"])
def test_round_trip(tmp_path, dtype, mode):
    """Every bit, every setting, and what later updates do."""
    scales = (0.07, nn.Parameter(torch.tensor([0.1])), torch.tensor(3.0, dtype=torch.float64))
    for scale, topk in zip(scales, (None, 3, 1), strict=True):
        options = {"update_mode": mode, "topk": topk, "scale": scale, "normalize": topk == 3, "dtype": dtype}
        bank = FeatureBank(7, 5, 0.25, on_nonfinite="keep" if topk == 1 else "skip", **options)
        rows = torch.randn(9, 5, dtype=torch.float64).to(dtype)
        rows[4, 2] = NAN
        bank.update(rows)
        if mode == "ema":
            bank.reset()
            bank.update(rows, torch.tensor([1, 1, 6, 6, 3, 3, 3, 1, 6]))
        bank.save(tmp_path / "bank")
        other = FeatureBank.load(str(tmp_path / "bank"))
        assert repr(other) == repr(bank) and type(other) is FeatureBank
        for more in (False, True):
            if more:
                bank.update(rows[5:] * 2)
                other.update(rows[5:] * 2)
            assert list(other.state_dict()) == list(bank.state_dict())
            for name, x in bank.state_dict().items():
                y = other.state_dict()[name]
                assert x.dtype == y.dtype and x.shape == y.shape
                assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in bank.named_parameters()]


def test_bytes_of_a_file(tmp_path):
    """As the module describes them, read and written here by struct alone."""
    bank = FeatureBank(3, 2, update_mode="ema", topk=2)
    bank.update(torch.tensor([[1.5, -2.0], [NAN, 0.0]]), torch.tensor([2, 0]))
    bank.save(tmp_path / "bank")
    marks, rows = bytes([0, 0, 1]), struct.pack("<6f", 0, 0, 0, 0, 1.5, -2.0)
    data = (tmp_path / "bank").read_bytes()
    length = struct.unpack_from("<I", data, 56)[0]
    text = data[68 : 68 + length]
    assert json.loads(text) == SETTINGS | {"update_mode": "ema", "topk": 2}
    assert data == sealed(text, rows, marks, filled=1, skipped=1, flags=1)

    (tmp_path / "hand").write_bytes(sealed(None, struct.pack("<6f", *range(6)), ptr=2, filled=2, skipped=9))
    loaded = FeatureBank.load(tmp_path / "hand")
    assert loaded.bank.flatten().tolist() == list(range(6)) and loaded.ptr.tolist() == [2]
    assert int(loaded.filled) == 2 and int(loaded.skipped) == 9 and loaded.momentum == 0.9


def test_another_size_keeps_the_newest_rows(tmp_path):
    for M, pushed, size in itertools.product((1, 3, 4), range(9), (1, 2, 3, 4, 7)):
        bank, rows = FeatureBank(M, 2), collections.deque(maxlen=M)
        for number in range(pushed):
            bank.update(torch.full((1, 2), float(number)))
            rows.append(number)
        bank.save(tmp_path / "bank")
        other = FeatureBank.load(tmp_path / "bank", size)
        if size == M:
            assert torch.equal(other.bank, bank.bank) and torch.equal(other.ptr, bank.ptr)
            continue
        kept = list(rows)[-size:]
        assert other.bank[: len(kept), 0].tolist() == kept and not other.bank[len(kept) :].any()
        assert int(other.filled) == len(kept) and other.ptr.tolist() == [len(kept) % size]
        other.update(torch.full((1, 2), 99.0))
        assert sorted(other.bank[: int(other.filled), 0].tolist()) == [*kept, 99][-size:]
    bank = FeatureBank(4, 2, update_mode="ema")
    bank.update(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([1, 3]))
    bank.save(tmp_path / "bank")
    other = FeatureBank.load(tmp_path / "bank", 5)
    assert other.bank[:, 0].tolist() == [1, 3, 0, 0, 0] and other.written.tolist() == [True, True, False, False, False]
    assert FeatureBank.load(tmp_path / "bank", 1).bank.tolist() == [[3.0, 3.0]]


def test_arguments(tmp_path):
    bank = bank_of(1.0)
    for call in (bank.save, FeatureBank.load):
        with pytest.raises(TypeError, match=r"path: expected a str or os\.PathLike; got a int"):
            call(7)
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "no folder" / "bank")
    bank.save(tmp_path / "bank")
    for size, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="bank_size: expected an int of at least 1"):
            FeatureBank.load(tmp_path / "bank", size)
    with pytest.raises(ValueError, match="scale: expected a finite number; got nan"):
        FeatureBank(4, 3, scale=nn.Parameter(torch.tensor(NAN))).save(tmp_path / "bank")
    assert value_in(tmp_path / "bank") == 1.0
    with pytest.raises(IsADirectoryError):
        (tmp_path / "folder").mkdir()
        bank.save(tmp_path / "folder")


# Generations and crashes.


def test_the_generation_before_is_kept(tmp_path):
    path = tmp_path / "bank"
    for value in (1.0, 2.0, 3.0):
        bank_of(value).save(path)
    assert value_in(path) == 3.0 and value_in(tmp_path / "bank.old") == 2.0
    assert sorted(os.listdir(tmp_path)) == ["bank", "bank.old"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.write_bytes(path.read_bytes()[:-1])
    assert value_in(path, "is damaged") == 2.0
    bank_of(4.0).save(path)  # the damaged file does not become the generation before
    assert value_in(path) == 4.0 and value_in(tmp_path / "bank.old") == 2.0
    path.unlink()
    assert value_in(path, "is missing") == 2.0
    (tmp_path / "bank.old").write_bytes(b"")
    with pytest.raises(FileNotFoundError):
        FeatureBank.load(path)
    path.write_bytes(b"not a bank")
    with pytest.raises(BankFileError, match="bank: not a file of a feature bank"):
        FeatureBank.load(path)


STEPS = ("open", "fsync", "link", "replace", "write")


class Crash(BaseException):
    """What no handler of errors catches."""


def break_at(monkeypatch, step: str, number: int, how) -> list:
    """Lets the call ``number`` of a step, and each after it, do ``how()`` instead; returns the list of calls made."""
    calls = []

    def wrapped(real):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) > number:
                how()
            return real(*args, **kwargs)

        return call

    if step == "write":
        real = _bank_file.parts

        def parts(*args):
            for part in real(*args):
                calls.append(part)
                if len(calls) > number:
                    how()
                yield part

        monkeypatch.setattr(_bank_file, "parts", parts)
    else:
        monkeypatch.setattr(os, step, wrapped(getattr(os, step)))
    return calls


@pytest.mark.parametrize("error", [OSError, Crash])
@pytest.mark.parametrize("step", STEPS)
def test_an_error_at_any_step_leaves_a_whole_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "bank"

    def fail():
        raise error("planted")

    for number in range(6):
        for value in (1.0, 2.0):
            bank_of(value).save(path)
        with monkeypatch.context() as patch:
            calls = break_at(patch, step, number, fail)
            try:
                bank_of(3.0).save(path)
                failed = False
            except error:
                failed = True
        renamed = step == "open" or (step, number) == ("fsync", 1)  # then only the folder was not flushed
        assert value_in(path) == (2.0 if failed and not renamed else 3.0)
        assert value_in(tmp_path / "bank.old") in (1.0, 2.0)
        assert sorted(os.listdir(tmp_path)) == ["bank", "bank.old"]  # nothing is left behind
        assert failed or len(calls) <= number or step == "link"


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_a_whole_file(tmp_path, monkeypatch, step):
    """The process ends where it stands, in a child: not even ``finally`` runs."""
    path = tmp_path / "bank"
    for number in range(4):
        for value in (1.0, 2.0):
            bank_of(value).save(path)
        bank = bank_of(3.0)
        child = os.fork()
        if child == 0:
            try:
                break_at(monkeypatch, step, number, lambda: os._exit(9))
                bank.save(path)
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert value_in(path) in ((2.0, 3.0) if killed else (3.0,))
        assert killed or number > 0 or step == "open"
        bank_of(4.0).save(path)  # and what a kill left behind is in nobody's way
        assert value_in(path) == 4.0 and value_in(tmp_path / "bank.old") in (2.0, 3.0)


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "bank"
    bank_of(1.0).save(path)
    bank_of(2.0).save(path)
    assert value_in(path) == 2.0 and value_in(tmp_path / "bank.old") == 1.0
    real = os.replace

    def once(source, target):
        if str(target).endswith("bank"):
            raise Crash
        real(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(Crash):
        bank_of(3.0).save(path)
    assert value_in(path, "is missing") == 2.0


def test_what_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    """The file is flushed before it is renamed and the folder after."""
    said = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda f: said.append("folder" if os.path.isdir(f"/proc/self/fd/{f}") else "file") or fsync(f)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: said.append(os.path.basename(b)) or replace(a, b))
    bank_of(1.0).save(tmp_path / "bank")
    bank_of(2.0).save(tmp_path / "bank")
    assert said == ["file", "bank", "folder", "file", "bank.old", "bank", "folder"]


def test_save_waits_for_a_writer(tmp_path):
    """What is written is of one moment, though the writer is half done when the save begins."""
    bank = bank_of(1.0)
    saving = threading.Thread(target=bank.save, args=(tmp_path / "bank",))
    with bank.writing():
        bank.bank[0] = 2.0
        saving.start()
        time.sleep(0.2)
        bank.bank[1] = 2.0
    saving.join(30)
    assert value_in(tmp_path / "bank") == 2.0


# Damage and malice.


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "bank"
    bank = FeatureBank(3, 2, update_mode="ema")
    bank.update(torch.randn(2, 2), torch.tensor([0, 2]))
    bank.save(path)
    return path.read_bytes()


def refused(path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(BankFileError) as refusal:
        FeatureBank.load(path)
    return str(refusal.value)


def test_every_flipped_bit_is_found(tmp_path, whole):
    for i in range(len(whole)):
        for bit in (1 << i % 8, 255):
            refused(tmp_path / "bank", whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])


def test_every_other_length_is_found(tmp_path, whole):
    for n in range(len(whole)):
        refused(tmp_path / "bank", whole[:n])
        if n % 16 == 0:
            refused(tmp_path / "bank", whole[n:] + whole[:n] if n else whole + b"\0")
            refused(tmp_path / "bank", whole[:n] + whole[n + 1 :])


@pytest.mark.parametrize(
    "numbers, said",
    [
        ({"magic": b"\x89HVBANK\r"}, "not a file of a feature bank"),
        ({"version": 2}, "version 2, where 1 is known"),
        ({"dtype": 4}, "dtype 4 or flags 0"),
        ({"flags": 2}, "flags 2"),
        ({"M": 0}, "numbers that no bank has"),
        ({"C": 0}, "numbers that no bank has"),
        ({"ptr": 3}, "numbers that no bank has"),
        ({"filled": 4}, "numbers that no bank has"),
        ({"skipped": 1 << 63}, "numbers that no bank has"),
        ({"length": 1 << 17}, "numbers that no bank has"),
        ({"M": 1 << 40}, "where its header asks for"),
        ({"C": 1 << 62}, "where its header asks for"),
        ({"M": (1 << 64) - 1, "C": (1 << 64) - 1}, "where its header asks for"),
        ({"M": 1 << 63, "C": 2}, "where its header asks for"),  # 2^64 numbers: 0, where sizes wrap
        ({"length": 0}, "where its header asks for"),
    ],
)
def test_hostile_numbers(tmp_path, numbers, said):
    """With right checksums; and nothing is allocated for what they claim."""
    data = sealed(**numbers)
    tracemalloc.start()
    try:
        assert said in refused(tmp_path / "bank", data)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_large_file_is_not_read_into_memory_before_its_checksum_is_right(tmp_path):
    """256 MiB of nothing, as long as its header says."""
    data = sealed(M=1 << 20, C=64)
    path = tmp_path / "bank"
    path.write_bytes(data)
    os.truncate(path, len(data) - 24 + (256 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(BankFileError, match="the checksum is wrong"):
            FeatureBank.load(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "settings",
    [
        b"",
        b"7",
        b"[]",
        b"\xff\xfe",
        b"[" * 60000,
        b'{"a":' * 12000,
        b'{"scale": NaN}',
        b'{"scale": 1.0}',
        b"9" * 60000,
        *(
            json.dumps(SETTINGS | wrong).encode()
            for wrong in (
                {"momentum": 2.0},
                {"momentum": "high"},
                {"momentum": 10**400},
                {"update_mode": "lifo"},
                {"update_mode": "ema"},
                {"topk": 0},
                {"topk": 10**30},
                {"topk": [1]},
                {"normalize": 1},
                {"on_nonfinite": None},
                {"scale": None},
                {"scale": "1"},
                {"scale": {}},
                {"scale": {"kind": "parameter", "value": 1.0, "dtype": "int64", "shape": [1]}},
                {"scale": {"kind": "parameter", "value": 1.0, "dtype": "float32", "shape": [1 << 40]}},
                {"scale": {"kind": "parameter", "value": 1.0, "dtype": "float32", "shape": 1}},
                {"scale": {"kind": "parameter", "value": "x", "dtype": "float32", "shape": []}},
                {"scale": {"kind": "parameter", "value": 1.0, "dtype": [], "shape": []}},
                {"scale": {"kind": "parameter", "value": "nan", "dtype": "float32", "shape": []}},
                {"scale": {"kind": "buffer", "value": 10**400, "dtype": "float32", "shape": []}},
                {"scale": {"kind": "buffer", "value": 1e300, "dtype": "float16", "shape": [1]}},
                {"scale": {"kind": "module", "value": 1.0, "dtype": "float32", "shape": []}},
                {"bank_size": 1 << 40},
                {"device": "cuda"},
            )
        ),
    ],
)
def test_hostile_settings(tmp_path, settings):
    refused(tmp_path / "bank", sealed(settings))


def test_hostile_marks(tmp_path):
    ema = {"update_mode": "ema"}
    for marks, filled in ((b"\1\1\0", 1), (b"\2\0\0", 2), (b"\0\0\0", 3)):
        assert "marks" in refused(tmp_path / "bank", sealed(ema, written=marks, flags=1, filled=filled))
    assert "marks" in refused(tmp_path / "bank", sealed(written=b"\0\0\0", flags=1))
    (tmp_path / "bank").write_bytes(sealed(ema, written=b"\1\0\1", flags=1, filled=2))
    assert FeatureBank.load(tmp_path / "bank").written.tolist() == [True, False, True]


def test_other_things_than_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(BankFileError, match="not a regular file"):
            FeatureBank.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        FeatureBank.load(tmp_path / "nothing")
    assert issubclass(BankFileError, ValueError) and hivilt.nn.BankFileError is BankFileError


def test_a_pickle_is_not_run(tmp_path):
    torch.save(bank_of(1.0).state_dict(), tmp_path / "bank")
    assert "not a file of a feature bank" in refused(tmp_path / "bank", (tmp_path / "bank").read_bytes())
