"""Which tile sizes, warps and pipeline stages a kernel runs with: a table, so that a first call measures nothing.

A key is (kernel, dtype, width class), the class being the larger head width rounded up to 64, 128 or 256.  float16 runs
with the rows of bfloat16 where it has none, and so does float32 in kernels that work in float32 anyway.
``TABLE`` holds what ships, for the GPUs that can hold it; parts with less shared memory have rows of their own.
``hivilt.tune`` measures on the machine at hand and writes a file of the user's, which ``lookup`` prefers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import _settings

# With "_heavy" behind the name: for selections with masks and gradients with dropout, which take registers.  Attention
# itself has the same tiles with and without masks, so that what is masked changes no bit.
KERNELS = (
    "one_tile_128", "one_tile_256", "one_tile_512", "one_tile_1024", "stream_select", "merge_lists", "pack_lists",
    "gather_forward", "gather_backward", "dense_forward", "delta",
    "dense_query_gradient", "dense_key_gradient", "bias_gradient",
)  # fmt: skip


class Config(NamedTuple):
    """Rows and columns of a tile (of a list kernel: rows and list entries), warps of a program, pipeline stages."""

    rows: int
    cols: int
    warps: int
    stages: int


LEGAL = {
    "rows": (1, 2, 4, 8, 16, 32, 64, 128),
    "cols": (4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4),
}


class Limits(NamedTuple):
    """What decides between kernels on a part."""

    one_tile_half: int  # columns up to which a whole row of scores of half-type inputs fits into a tile
    one_tile_single: int  # the same for float32
    programs: int  # persistent programs per multiprocessor
    shared_bytes: int  # shared memory that one program may use


BIG = Limits(1024, 256, 2, 232448)
LIMITS = {
    "sm_90": BIG,
    "sm_100": BIG,
    "sm_80": Limits(1024, 256, 2, 166912),
    "sm_86": Limits(512, 128, 2, 101376),
    "gfx942": Limits(256, 128, 2, 65536),
}

_HALF, _SINGLE = "bfloat16", "float32"
DTYPES = (_HALF, "float16", _SINGLE)
TABLE: dict[str, dict[tuple[str, str, int], Config]] = {
    "sm_90": {
        # One tile: the number of columns is part of the name.
        ("one_tile_128", _HALF, 64): Config(64, 0, 8, 1),
        ("one_tile_256", _HALF, 64): Config(64, 0, 8, 1),
        ("one_tile_512", _HALF, 64): Config(32, 0, 8, 1),
        ("one_tile_512", _HALF, 256): Config(16, 0, 8, 1),
        ("one_tile_512_heavy", _HALF, 256): Config(16, 0, 8, 1),
        ("one_tile_1024", _HALF, 64): Config(16, 0, 8, 1),
        ("one_tile_128", _SINGLE, 64): Config(16, 0, 4, 1),
        ("one_tile_256", _SINGLE, 64): Config(16, 0, 4, 1),
        ("stream_select", _HALF, 64): Config(32, 64, 8, 1),
        ("stream_select", _HALF, 128): Config(32, 64, 8, 1),
        ("stream_select", _HALF, 256): Config(16, 64, 8, 1),
        ("stream_select_heavy", _HALF, 256): Config(16, 64, 8, 1),
        ("stream_select", _SINGLE, 64): Config(16, 64, 8, 1),
        ("stream_select", _SINGLE, 128): Config(16, 64, 8, 1),
        ("stream_select", _SINGLE, 256): Config(16, 64, 8, 1),
        ("merge_lists", _HALF, 64): Config(2, 0, 4, 1),
        ("pack_lists", _HALF, 64): Config(16, 32, 4, 1),
        ("gather_forward", _HALF, 64): Config(4, 16, 4, 2),
        ("gather_forward", _HALF, 128): Config(4, 8, 4, 2),
        ("gather_forward", _HALF, 256): Config(2, 8, 4, 2),
        ("gather_backward", _HALF, 64): Config(4, 16, 4, 2),
        ("gather_backward", _HALF, 128): Config(4, 8, 4, 2),
        ("gather_backward", _HALF, 256): Config(2, 8, 4, 2),
        ("dense_forward", _HALF, 64): Config(64, 64, 8, 2),
        ("dense_forward", _HALF, 128): Config(64, 32, 8, 2),
        ("dense_forward", _HALF, 256): Config(32, 32, 8, 2),
        ("dense_forward", _SINGLE, 64): Config(32, 16, 8, 1),
        ("dense_forward", _SINGLE, 128): Config(16, 16, 8, 1),
        ("dense_forward", _SINGLE, 256): Config(16, 32, 8, 1),
        ("delta", _HALF, 64): Config(32, 0, 4, 1),
        ("dense_query_gradient_heavy", _HALF, 64): Config(64, 32, 4, 1),
        ("dense_key_gradient_heavy", _HALF, 64): Config(32, 64, 8, 1),
        ("gather_backward_heavy", _HALF, 64): Config(2, 16, 4, 1),
        ("dense_query_gradient", _HALF, 64): Config(64, 64, 4, 2),
        ("dense_query_gradient", _HALF, 128): Config(64, 64, 8, 2),
        ("dense_query_gradient", _HALF, 256): Config(32, 32, 8, 1),
        ("dense_query_gradient", _SINGLE, 64): Config(32, 32, 8, 1),
        ("dense_query_gradient", _SINGLE, 128): Config(16, 16, 8, 1),
        ("dense_query_gradient", _SINGLE, 256): Config(32, 32, 8, 1),
        ("dense_key_gradient", _HALF, 64): Config(64, 64, 8, 2),
        ("dense_key_gradient", "float16", 64): Config(32, 64, 8, 2),
        ("dense_key_gradient", "float16", 128): Config(32, 64, 8, 1),
        ("dense_key_gradient", "float16", 256): Config(32, 32, 8, 1),
        ("dense_key_gradient", _HALF, 128): Config(32, 64, 8, 1),
        ("dense_key_gradient", _HALF, 256): Config(32, 32, 8, 1),
        ("dense_key_gradient", _SINGLE, 64): Config(32, 32, 8, 1),
        ("dense_key_gradient", _SINGLE, 128): Config(16, 32, 8, 1),
        ("dense_key_gradient", _SINGLE, 256): Config(16, 16, 8, 1),
        ("bias_gradient", _HALF, 64): Config(64, 64, 4, 1),
        ("bias_gradient", _HALF, 256): Config(16, 16, 8, 1),
        ("bias_gradient", _SINGLE, 64): Config(32, 32, 8, 1),
        ("bias_gradient", _SINGLE, 256): Config(16, 16, 8, 1),
    },
    "sm_86": {},
    "gfx942": {},
}


def family(part: str) -> str:
    """The part of the table that a GPU uses: its own, or that of the nearest one with as much shared memory."""
    if part in LIMITS:
        return part
    if part.startswith("gfx"):
        return "gfx942"
    number = int(part.removeprefix("sm_"))
    return "sm_86" if number in (86, 87, 89) or number >= 120 else "sm_100" if number >= 100 else "sm_90"


def limits(part: str) -> Limits:
    return LIMITS[family(part)]


@functools.cache
def lookup(part: str, kernel: str, dtype: str, width: int) -> Config:
    """The configuration of a kernel for a dtype and head width: the user's, the part's, or that of sm_90."""
    widths = tuple(w for w in (64, 128, 256) if w >= width)
    _asked.add((kernel, dtype, widths[0]))
    kinds = tuple(dict.fromkeys((dtype, _HALF)))
    tables = (_tried, _users().get(part, {}), TABLE.get(family(part), {}), TABLE["sm_90"])
    names = tuple(dict.fromkeys((kernel, kernel.removesuffix("_heavy"))))
    for kind, name in itertools.product(kinds, names):
        for table, w in itertools.product(tables, widths):
            if (name, kind, w) in table:
                return table[name, kind, w]
        if (name, kind, 64) in TABLE["sm_90"]:  # one row serves every width
            return TABLE["sm_90"][name, kind, 64]
    raise KeyError((part, kernel, dtype, width))


# Tuning: what a call asks for, and one configuration tried in place of the table's.

_asked: set[tuple[str, str, int]] = set()
_tried: dict[tuple[str, str, int], Config] = {}


@contextlib.contextmanager
def asked() -> Iterator[set[tuple[str, str, int]]]:
    """Collects the keys that the calls inside look up."""
    forget()
    _asked.clear()
    yield _asked


@contextlib.contextmanager
def trying(key: tuple[str, str, int], config: Config) -> Iterator[None]:
    """Calls inside run with this configuration."""
    _tried[key] = config
    lookup.cache_clear()
    try:
        yield
    finally:
        del _tried[key]
        lookup.cache_clear()


# The user's file.


def users_file() -> Path:
    """Where ``hivilt.tune`` writes: $XDG_CACHE_HOME/hivilt/triton.json, by default under ~/.cache."""
    return Path(_settings.cache_folder()) / "triton.json"


@functools.cache
def _users() -> dict[str, dict[tuple[str, str, int], Config]]:
    try:
        return parse(users_file().read_text(encoding="utf-8"))
    except OSError:
        return {}


def parse(text: str) -> dict[str, dict[tuple[str, str, int], Config]]:
    """The user's table from JSON {part: {"kernel/dtype/width": [rows, cols, warps, stages]}}; ValueError on anything
    else."""
    try:
        found = json.loads(text)
        return {part: {_key(key): _config(values) for key, values in rows.items()} for part, rows in found.items()}
    except (AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{users_file()}: expected what hivilt.tune writes; got {error}") from None


def _key(text: str) -> tuple[str, str, int]:
    kernel, dtype, width = (text.split("/") + ["", ""])[:3]
    if kernel.removesuffix("_heavy") not in KERNELS or dtype not in DTYPES or width not in ("64", "128", "256"):
        raise ValueError(f"{users_file()}: expected kernel/dtype/64|128|256; got {text!r}")
    return kernel, dtype, int(width)


def _config(values: list[int]) -> Config:
    if len(values) != 4 or any(
        type(v) is not int or (v and v not in legal) for v, legal in zip(values, LEGAL.values(), strict=True)
    ):
        raise ValueError(f"{users_file()}: expected [rows, cols, warps, stages] from {LEGAL}; got {values!r}")
    return Config(*values)


def dump(table: dict[str, dict[tuple[str, str, int], Config]]) -> str:
    """What ``parse`` reads."""
    rows = {
        part: {"/".join(map(str, key)): list(config) for key, config in rows.items()} for part, rows in table.items()
    }
    return json.dumps(rows, indent=2, sort_keys=True) + "\n"


def forget() -> None:
    """Makes the next lookup read the user's file again."""
    _users.cache_clear()
    lookup.cache_clear()
