"""Which tile sizes, warps and pipeline stages a kernel runs with: a table, so that a first call measures nothing.

A key is (kernel, dtype, width class).  In ``TABLE``, of family A, the class is the larger head width rounded up to 64,
128 or 256; float16 runs with the rows of bfloat16 where it has none, and so does float32 in kernels that work in
float32 anyway.  It holds what ships, for the GPUs that can hold it; parts with less shared memory have rows of their
own.
In ``TILES``, of the other families, the class is the number of channels up to which a row serves, on every part.
``hivilt.tune`` measures on the machine at hand and writes a file of the user's, which ``lookup`` prefers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .. import _settings

# With "_heavy" behind the name: for selections with masks and attention with dropout or a bias, which take registers.
# Attention itself has the same tiles with and without masks, so that what is masked changes no bit.
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


class Tile(NamedTuple):
    """rows: tokens (of a weight's gradient: its rows; of a bank: queries); cols: channels; inner: what is summed over
    in one step; warps of a program, pipeline stages."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


LEGAL = {
    "rows": (1, 2, 4, 8, 16, 32, 64, 128),
    "cols": (4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "inner": (16, 32, 64, 128),
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

Key = tuple[str, str, int]
Table = dict[str, dict[Key, "Config | Tile"]]
_HALF, _SINGLE = "bfloat16", "float32"
DTYPES = (_HALF, "float16", _SINGLE)
TABLE: dict[str, dict[tuple[str, str, int], Config]] = {
    "sm_90": {
        # One tile: the number of columns is part of the name.
        ("one_tile_128", _HALF, 64): Config(64, 0, 8, 1),
        ("one_tile_256", _HALF, 64): Config(64, 0, 8, 1),
        ("one_tile_512", _HALF, 64): Config(32, 0, 8, 1),
        ("one_tile_512", _HALF, 256): Config(16, 0, 8, 1),
        ("one_tile_512_heavy", _HALF, 64): Config(16, 0, 8, 1),
        ("one_tile_512_heavy", _HALF, 256): Config(16, 0, 8, 1),
        ("one_tile_1024", _HALF, 64): Config(16, 0, 8, 1),
        ("one_tile_128", _SINGLE, 64): Config(16, 0, 4, 1),
        ("one_tile_256", _SINGLE, 64): Config(16, 0, 4, 1),
        ("stream_select", _HALF, 64): Config(32, 64, 8, 1),
        ("stream_select", _HALF, 128): Config(32, 64, 8, 1),
        ("stream_select", _HALF, 256): Config(16, 64, 8, 1),
        ("stream_select_heavy", _HALF, 64): Config(16, 64, 8, 1),
        ("stream_select_heavy", _HALF, 256): Config(16, 64, 8, 1),
        ("stream_select", _SINGLE, 64): Config(16, 64, 8, 1),
        ("stream_select", _SINGLE, 128): Config(16, 64, 8, 1),
        ("stream_select", _SINGLE, 256): Config(16, 64, 8, 1),
        ("merge_lists", _HALF, 64): Config(2, 0, 4, 1),
        ("pack_lists", _HALF, 64): Config(16, 32, 4, 1),
        ("gather_forward", _HALF, 64): Config(4, 16, 4, 2),
        ("gather_forward", _HALF, 128): Config(4, 8, 4, 2),
        ("gather_forward", _HALF, 256): Config(2, 8, 4, 2),
        ("gather_forward", _SINGLE, 64): Config(4, 8, 4, 2),
        ("gather_forward", _SINGLE, 128): Config(4, 8, 4, 2),
        ("gather_forward", _SINGLE, 256): Config(2, 8, 4, 2),
        ("gather_backward", _HALF, 64): Config(4, 16, 4, 2),
        ("gather_backward", _HALF, 128): Config(4, 8, 4, 2),
        ("gather_backward", _HALF, 256): Config(2, 8, 4, 2),
        ("dense_forward", _HALF, 64): Config(64, 64, 8, 2),
        ("dense_forward", _HALF, 128): Config(64, 32, 8, 2),
        ("dense_forward", _HALF, 256): Config(32, 16, 8, 2),
        ("dense_forward", _SINGLE, 64): Config(32, 16, 8, 1),
        ("dense_forward", _SINGLE, 128): Config(16, 16, 8, 1),
        ("dense_forward", _SINGLE, 256): Config(16, 32, 8, 1),
        ("dense_forward_heavy", "float16", 64): Config(64, 32, 8, 2),
        ("dense_forward_heavy", "float16", 128): Config(32, 64, 8, 2),
        ("dense_forward_heavy", "float16", 256): Config(32, 16, 8, 2),
        ("dense_forward_heavy", _HALF, 128): Config(32, 64, 8, 2),
        ("dense_forward_heavy", _HALF, 256): Config(32, 32, 8, 2),
        ("dense_forward_heavy", _SINGLE, 128): Config(16, 16, 4, 1),
        ("delta", _HALF, 64): Config(32, 0, 4, 1),
        ("dense_query_gradient_heavy", _HALF, 64): Config(64, 32, 4, 1),
        ("dense_query_gradient_heavy", _HALF, 128): Config(64, 32, 8, 2),
        ("dense_query_gradient_heavy", _SINGLE, 64): Config(32, 16, 8, 1),
        ("dense_query_gradient_heavy", _SINGLE, 128): Config(16, 16, 4, 1),
        ("dense_key_gradient_heavy", _HALF, 64): Config(32, 64, 8, 1),
        ("dense_key_gradient_heavy", _HALF, 256): Config(16, 32, 8, 1),
        ("dense_key_gradient_heavy", "float16", 256): Config(32, 16, 8, 1),
        ("dense_key_gradient_heavy", _SINGLE, 64): Config(32, 16, 8, 1),
        ("dense_key_gradient_heavy", _SINGLE, 128): Config(16, 16, 4, 1),
        ("gather_backward_heavy", _HALF, 64): Config(2, 16, 4, 1),
        ("gather_backward_heavy", _HALF, 128): Config(2, 16, 4, 1),
        ("gather_backward_heavy", _HALF, 256): Config(2, 8, 4, 1),
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
    "sm_100": {
        ("dense_query_gradient_heavy", _SINGLE, 256): Config(16, 16, 8, 1),
    },
    "sm_86": {},
    "gfx942": {},
}

ANY = 10**9  # channels
# (kernel, works in float32) -> channels up to which the tile serves, ascending -> tile.
TILES: dict[tuple[str, bool], dict[int, Tile]] = {
    ("interpolate", False): {32: Tile(64, 32, 0, 4, 1), ANY: Tile(32, 64, 0, 4, 1)},
    ("rows_product", False): {ANY: Tile(64, 64, 64, 4, 3)},
    ("rows_product", True): {ANY: Tile(32, 64, 16, 4, 2)},
    ("weight_gradient", False): {ANY: Tile(64, 64, 64, 4, 3)},
    ("weight_gradient", True): {ANY: Tile(32, 64, 16, 4, 2)},
    ("fusion", False): {
        64: Tile(64, 0, 32, 4, 2), 256: Tile(64, 0, 32, 8, 2), 512: Tile(32, 0, 32, 8, 2), 1024: Tile(16, 0, 32, 8, 1),
    },
    ("fusion", True): {128: Tile(32, 0, 32, 8, 1), 256: Tile(16, 0, 32, 8, 1), 512: Tile(16, 0, 16, 8, 1)},
    ("finish", True): {ANY: Tile(4, 512, 0, 4, 1)},
    ("finish_gradient", False): {
        128: Tile(32, 128, 0, 8, 1), 256: Tile(16, 0, 0, 8, 1), 512: Tile(8, 0, 0, 8, 1), 1024: Tile(4, 0, 0, 8, 1),
    },
    ("token_scores", False): {ANY: Tile(64, 64, 64, 4, 2)},
    ("token_scores", True): {ANY: Tile(32, 32, 64, 4, 1)},
    ("pool", False): {64: Tile(64, 0, 64, 4, 1), 256: Tile(32, 0, 64, 8, 1), ANY: Tile(32, 128, 16, 4, 2)},
    ("pool", True): {ANY: Tile(32, 128, 16, 4, 1)},
    ("score_gradient", False): {ANY: Tile(64, 64, 64, 8, 2)},
    ("score_gradient", True): {ANY: Tile(32, 32, 64, 4, 1)},
    ("pool_gradient", False): {ANY: Tile(64, 64, 64, 8, 2)},
    ("pool_gradient", True): {ANY: Tile(32, 64, 32, 4, 1)},
    # 128 bank rows are the columns of a tile.
    ("bank_maxima", False): {
        128: Tile(128, 0, 64, 8, 3), 256: Tile(128, 0, 64, 8, 2), ANY: Tile(128, 0, 32, 8, 3),
    },
    ("bank_maxima", True): {ANY: Tile(32, 0, 16, 8, 2)},
    ("bank_stream", True): {ANY: Tile(4, 0, 32, 8, 2)},
    # rows of x, columns, channels
    ("contrast", False): {ANY: Tile(64, 128, 64, 8, 2)},
    ("contrast", True): {ANY: Tile(32, 64, 16, 4, 2)},
}  # fmt: skip
TILE_KERNELS = frozenset(kernel for kernel, _ in TILES)


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
    for kind in kinds:
        # A row of the width itself comes before a wider one, whoever's they are.
        for w, name, table in itertools.product(widths, names, tables):
            if (name, kind, w) in table:
                return table[name, kind, w]
        for name in names:
            if (name, kind, 64) in TABLE["sm_90"]:  # one row serves every width
                return TABLE["sm_90"][name, kind, 64]
    raise KeyError((part, kernel, dtype, width))


@functools.cache
def tile(part: str, kernel: str, dtype: str, channels: int) -> Tile:
    """The same for a kernel of ``TILES`` and so many channels."""
    single = dtype == _SINGLE
    rows = TILES.get((kernel, single)) or TILES[kernel, not single]
    limit = next(limit for limit in rows if channels <= limit)
    _asked.add((kernel, dtype, limit))
    for kind in (dtype, _SINGLE if single else _HALF):
        for table in (_tried, _users().get(part, {})):
            if (kernel, kind, limit) in table:
                return table[kernel, kind, limit]
    return rows[limit]


def found(part: str, key: Key) -> Config | Tile:
    """What a call would run with."""
    return tile(part, *key) if key[0] in TILE_KERNELS else lookup(part, *key)


# Tuning: what a call asks for, and one configuration tried in place of the table's.

_asked: set[Key] = set()
_tried: dict[Key, Config | Tile] = {}


@contextlib.contextmanager
def asked() -> Iterator[set[Key]]:
    """Collects the keys that the calls inside look up."""
    forget()
    _asked.clear()
    yield _asked


@contextlib.contextmanager
def trying(key: Key, config: Config | Tile) -> Iterator[None]:
    """Calls inside run with this configuration."""
    _tried[key] = config
    _forget_lookups()
    try:
        yield
    finally:
        del _tried[key]
        _forget_lookups()


def _forget_lookups() -> None:
    lookup.cache_clear()
    tile.cache_clear()


# The user's file.


def users_file() -> Path:
    """Where ``hivilt.tune`` writes: $XDG_CACHE_HOME/hivilt/triton.json, by default under ~/.cache."""
    return Path(_settings.cache_folder()) / "triton.json"


@functools.cache
def _users() -> Table:
    """The user's table.  A file that cannot be read is as if it were not there, and said once: no call fails for it."""
    try:
        return parse(users_file().read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        warnings.warn(f"hivilt: the tile sizes of the user are ignored: {error}", RuntimeWarning, stacklevel=2)
        return {}


def give_up(error: Exception) -> bool:
    """Whether a call that Triton refused is worth another try: where it may be the fault of the user's table, which is
    then ignored in this process, and said."""
    if _tried or not _users() or not type(error).__module__.startswith("triton"):
        return False
    text = (str(error).splitlines() or [""])[0]
    warnings.warn(
        f"hivilt: the tile sizes of {users_file()} are ignored: {type(error).__name__}: {text}", RuntimeWarning,
        stacklevel=2,
    )  # fmt: skip
    _users().clear()
    _forget_lookups()
    return True


def parse(text: str) -> Table:
    """The user's table from JSON {part: {"kernel/dtype/width": sizes}}; ValueError on anything else."""
    try:
        read = json.loads(text)
        return {
            part: {(key := _key(name)): _config(key, sizes) for name, sizes in rows.items()}
            for part, rows in read.items()
        }
    except (AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{users_file()}: expected what hivilt.tune writes; got {error}") from None


def _shipped_rows(kernel: str) -> dict[str, list[Config | Tile]]:
    """Those of any dtype, by the spelling of their width class."""
    rows: dict[str, list[Config | Tile]] = {}
    if kernel in TILE_KERNELS:
        for (name, _), limits_of_name in TILES.items():
            for limit, one in limits_of_name.items() if name == kernel else ():
                rows.setdefault(width_class(limit), []).append(one)
    elif kernel.removesuffix("_heavy") in KERNELS:
        name = kernel.removesuffix("_heavy")
        rows = {str(w): [one for key, one in TABLE["sm_90"].items() if key[0] == name] for w in (64, 128, 256)}
    return rows


def width_class(limit: int) -> str:
    """How a key spells it."""
    return "any" if limit == ANY else str(limit)


def _key(text: str) -> Key:
    kernel, dtype, width = (text.split("/") + ["", ""])[:3]
    rows = _shipped_rows(kernel)
    if width not in rows or dtype not in DTYPES:
        raise ValueError(f"{users_file()}: expected kernel/dtype/{'|'.join(rows) or 'width'}; got {text!r}")
    return kernel, dtype, ANY if width == "any" else int(width)


def _config(key: Key, values: list[int]) -> Config | Tile:
    """A size may be 0 only where a kernel does not use it."""
    shipped = _shipped_rows(key[0])[width_class(key[2])]
    kind = type(shipped[0])
    legal = [(*LEGAL[name], *{0 for one in shipped if not getattr(one, name)}) for name in kind._fields]
    if len(values) != len(legal) or any(
        type(v) is not int or v not in some for v, some in zip(values, legal, strict=True)
    ):
        raise ValueError(f"{users_file()}: expected {list(kind._fields)} from {legal}; got {values!r}")
    return kind(*values)


def dump(table: Table) -> str:
    """What ``parse`` reads."""
    rows = {
        part: {
            "/".join((kernel, dtype, width_class(width))): list(config)
            for (kernel, dtype, width), config in rows.items()
        }
        for part, rows in table.items()
    }
    return json.dumps(rows, indent=2, sort_keys=True) + "\n"


def forget() -> None:
    """Makes the next lookup read the user's file again."""
    _users.cache_clear()
    _forget_lookups()
