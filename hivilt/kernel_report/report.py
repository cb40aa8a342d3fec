"""Rows of the report, what of them is an offence, and the command line."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton

from ..triton_kernels import configs
from .calls import calls
from .compiling import compile_all
from .specialise import PARTS, jobs

ABOUT = "Compiles every GPU kernel that ships, without a GPU, and prints what it uses."
FACTS = ("part", "kernel", "call", "dtype", "warps", "stages")
FOUND = ("registers", "spills", "shared", "instructions", "matrix")
NO_SPILLS = ("sm_90",)  # parts on which a spill is an offence


class Row(NamedTuple):
    """One kernel on one part. spills: bytes of a thread's stack, on AMD vector registers; error: "" or its lines."""

    part: str
    kernel: str
    call: str
    dtype: str
    warps: int
    stages: int
    constants: dict[str, int]  # tile sizes and the like, by the kernel's names for them
    registers: int = 0
    spills: int = 0
    scalar_spills: int = 0  # on AMD, to lanes of a vector register
    shared: int = 0
    instructions: int = 0
    matrix: str = ""
    seconds: float = 0.0
    error: str = ""


def offences(rows: Iterable[Row]) -> list[str]:
    """One line for each thing that must not be: an error, a spill on sm_90, more shared memory than a part has."""
    found = []
    for row in rows:
        limit = configs.limits(row.part).shared_bytes
        where = f"{row.part} {row.kernel} {row.call} {row.dtype}"
        if row.error:
            found.append(f"{where}: does not compile: {' | '.join(row.error.splitlines())}")
        if row.shared > limit:
            found.append(f"{where}: {row.shared} bytes of shared memory, more than {limit}")
        if row.spills and row.part in NO_SPILLS:
            found.append(f"{where}: {row.spills} bytes spilled")
    return found


def conclude(rows: list[Row]) -> int:
    """Prints the offences and what was compiled; returns the exit code."""
    wrong = offences(rows)
    for text in wrong:
        print(text)
    parts = ", ".join(f"{part} {count}" for part, count in Counter(row.part for row in rows).items())
    print(f"{len(rows)} kernels ({parts}), Triton {triton.__version__}: {len(wrong)} offences")
    return int(bool(wrong))


def line(row: dict[str, Any], widths: dict[str, int]) -> str:
    """One line of the table; a kernel that does not compile has no numbers."""
    left = [str(row[name]).ljust(widths[name]) for name in FACTS[:4]]
    right = [*FACTS[4:], *FOUND] if not row.get("error") else FACTS[4:]
    cells = left + [str(row[name]).rjust(widths[name]) for name in right]
    return "  ".join([*cells, "error"] if row.get("error") else cells).rstrip()


def main(arguments: list[str] | None = None) -> None:
    """Prints the table and the offences; exits with 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m hivilt.kernel_report", description=ABOUT)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; by default all of them")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels with this in their name")
    parser.add_argument("--call", default="", metavar="TEXT", help="calls with this in their label, dtype included")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every row, and Triton's version, as JSON")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; run without that variable")

    wanted = [call for call in calls() if options.call in f"{call}-{call.dtype}"]
    work = [pair for part in options.part or PARTS for pair in jobs(part, wanted, options.only)]
    if not work:
        parser.error("no kernel is left to compile")
    widths = {name: len(name) for name in FACTS + FOUND}
    widths["part"] = max(map(len, PARTS))
    widths["kernel"] = max(len(job.kernel) for _, job in work)
    widths["call"] = max(len(str(call)) for call, _ in work)
    print(line(dict(zip(widths, widths, strict=True)), widths))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # Users keep theirs by setting TRITON_CACHE_DIR.
        private = triton.knobs.cache.dir == triton.knobs.cache.get_triton_dir("cache")
        results = compile_all([job for _, job in work], folder if private else None)
        for (call, job), found in zip(work, results, strict=True):
            names = list(job.signature)
            constants = {names[at[0]]: value for at, value in job.constants.items() if names[at[0]].isupper()}
            row = Row(job.part, job.kernel, str(call), call.dtype, job.options["num_warps"], job.options["num_stages"],
                      constants, **found)  # fmt: skip
            rows.append(row)
            print(line(row._asdict(), widths), flush=True)

    if options.json:
        record = {"triton": triton.__version__, "rows": [row._asdict() for row in rows], "offences": offences(rows)}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(conclude(rows))
