"""`python -m hivilt.kernel_report`: what it would compile, how it reads the result, and what it takes for an offence.
Kernels are compiled in other processes, where Triton's interpreter is off whatever this one uses."""

import json
import os
import subprocess
import sys

import fresh
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from hivilt.kernel_report.compiling import amd_resources, explanation, nvidia_resources
from hivilt.kernel_report.report import Row, conclude, offences

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def _copy_kernel(to, source, mask, n, scale, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(source[0] + at * source[3], mask=at < n, other=0.0)
    if mask is not None:
        x += tl.load(mask[0] + at)
    tl.store(to + at, x * scale + source[1] + source[2])

@triton.jit
def _wrong_kernel(to, BLOCK: tl.constexpr):
    tl.store(to + tl.arange(0, BLOCK), tl.zeros([BLOCK, BLOCK], tl.float32))
"""


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HIVILT_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, *arguments], env={**kept, **variables}, capture_output=True, text=True, timeout=240
    )


def run_script(folder, text: str):
    """What the script prints as JSON in its last line."""
    gone = dict.fromkeys(name for name in os.environ if name.startswith(("HIVILT_", "TRITON_")))
    text = f"import sys; sys.path.insert(0, {str(folder)!r}){text}"
    done = fresh.run(text, timeout=240, **gone, XDG_CACHE_HOME=str(folder))  # without what hivilt.tune wrote
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def row(part: str, **found) -> Row:
    return Row(part, "_a_kernel", "B1-H1-Q8-N8-D64-top2", "bf16", 4, 1, {}, **found)


def test_job_is_what_a_launch_compiles(tmp_path):
    (tmp_path / "small_kernels.py").write_text(KERNELS)
    found = run_script(
        tmp_path,
        """
import json, torch
from hivilt.kernel_report.specialise import job
from small_kernels import _copy_kernel
source = (torch.empty(48, device="meta"), 48, 2**40, 1)
to = torch.empty(48, dtype=torch.bfloat16, device="meta")
args = (to, source, None, 7, 0.5)
def told(part):
    one = job(part, _copy_kernel, args, {"BLOCK": 64}, 2, 3)
    constants, attrs = ([[list(at), value] for at, value in named.items()] for named in (one.constants, one.attrs))
    return [one.signature, constants, attrs, one.options["num_warps"], one.options["num_stages"]]
print(json.dumps([told("sm_90"), told("gfx942")]))
""",
    )
    nvidia, amd = found
    types, constants, attrs, warps, stages = nvidia
    assert types == {"to": "*bf16", "source": ["*fp32", "i32", "i64", "constexpr"], "mask": "constexpr", "n": "i32",
                     "scale": "fp32", "BLOCK": "constexpr"}  # fmt: skip
    assert sorted(constants, key=str) == [[[1, 3], 1], [[2], None], [[5], 64]]
    by_16 = [["tt.divisibility", 16]]
    told = {tuple(at): value for at, value in attrs if value}
    assert told == {(0,): by_16, (1, 0): by_16, (1, 1): by_16, (1, 2): by_16}
    assert (warps, stages) == (2, 3)
    assert {tuple(at): value for at, value in amd[2]}[0,] == [*by_16, ["tt.pointer_range", 32]]


def test_compilers_are_judged_one_by_one(tmp_path):
    """A kernel that compiles, one that does not, and a compiler that dies, in one run."""
    (tmp_path / "small_kernels.py").write_text(KERNELS)
    (tmp_path / "fatal_kernels.py").write_text("import os\nos.abort()\n")
    (tmp_path / "script.py").write_text(
        """
import json, torch
if __name__ == "__main__":
    from hivilt.kernel_report.compiling import compile_all
    from hivilt.kernel_report.specialise import job
    from small_kernels import _copy_kernel, _wrong_kernel
    to = torch.empty(64, device="meta")
    good = job("sm_90", _copy_kernel, (to, (to, 2, 3, 1), None, 7, 0.5), {"BLOCK": 64}, 1, 1)
    wrong = job("sm_90", _wrong_kernel, (to,), {"BLOCK": 64}, 1, 1)
    dead = good._replace(module="fatal_kernels")
    print(json.dumps(list(compile_all([good, wrong, dead], "cache"))))
""".replace('"cache"', repr(str(tmp_path / "cache"))),
        encoding="utf-8",
    )
    done = run_python(str(tmp_path / "script.py"), XDG_CACHE_HOME=str(tmp_path))  # its workers import it again
    assert done.returncode == 0, done.stderr
    good, wrong, dead = json.loads(done.stdout.splitlines()[-1])
    assert good["registers"] > 0 and good["instructions"] > 8
    assert (good["spills"], good["shared"], good["matrix"]) == (0, 0, "")
    assert "tl.store(" in wrong["error"] or "shape" in wrong["error"]
    assert "exit code -6" in dead["error"]


def test_calls_reach_every_kernel_and_configuration(tmp_path):
    started, shipped, unused = run_script(
        tmp_path,
        """
import importlib, json, pkgutil, triton
from hivilt import triton_kernels
from hivilt.kernel_report.calls import calls
from hivilt.kernel_report.specialise import PARTS, jobs
from hivilt.triton_kernels import configs
used, lookup = set(), configs.lookup
def noted(part, kernel, dtype, width):
    config = lookup(part, kernel, dtype, width)
    used.add((configs.family(part), kernel, config))
    return config
configs.lookup = noted
started = {job.kernel for part in PARTS for _, job in jobs(part, list(calls()))}
shipped = set()
for found in pkgutil.iter_modules(triton_kernels.__path__):
    names = vars(importlib.import_module(f"hivilt.triton_kernels.{found.name}"))
    shipped |= {name for name, x in names.items() if name.endswith("_kernel") and isinstance(x, triton.JITFunction)}
rows = [(part, key, config) for part in PARTS for key, config in configs.TABLE.get(part, {}).items()]
unused = [[part, *key] for part, key, config in rows if (part, key[0], config) not in used]
print(json.dumps([sorted(started), sorted(shipped), unused]))
""",
    )
    assert started == shipped
    assert unused == []


def test_nvidia_resources_are_read():
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function _a_kernel:
  REG:168 STACK:40 SHARED:1024 LOCAL:8 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0

\t\tFunction : _a_kernel
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x60 ;                             /* 0x0000001400008947 */
        /*0020*/             @!UP0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;  /* 0x00e0000004187df0 */
        /*1fff0*/                  HMMA.16816.F32 R8, R4, R16, R8 ;       /* 0x000000100408723c */
"""
    assert nvidia_resources(text) == {"registers": 168, "spills": 48, "instructions": 4, "matrix": "wgmma+mma"}


def test_amd_resources_are_read():
    text = """
\t.globl\t_a_kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
\ts_endpgm
    .sgpr_count:     34
    .sgpr_spill_count: 6
    .vgpr_count:     256
    .vgpr_spill_count: 12
"""
    found = {"registers": 256, "spills": 12, "instructions": 3, "matrix": "mfma", "scalar_spills": 6}
    assert amd_resources(text) == found


def test_explanation_is_the_first_cause_and_what_was_printed():
    try:
        try:
            raise TypeError("at 5:4:\ndef segment(side, b):\n    tl.load(None)\n    ^\nno type")
        except TypeError as cause:
            raise RuntimeError("at 9:1") from cause
    except RuntimeError as error:
        text = explanation(error, "module {\nfile.py:3:0: error: no such layout\n}")
    assert text.splitlines() == [
        "TypeError", "at 5:4:", "    tl.load(None)", "    ^", "no type", "file.py:3:0: error: no such layout",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "bad, text",
    [
        (row("sm_90", spills=8), "8 bytes spilled"),
        (row("sm_90", shared=232449), "232449 bytes of shared memory, more than 232448"),
        (row("gfx942", shared=65537), "65537 bytes of shared memory, more than 65536"),
        (row("sm_80", error="RuntimeError\nno"), "does not compile: RuntimeError | no"),
    ],
)
def test_offence_fails_the_report(capsys, bad, text):
    assert conclude([row("sm_100"), bad]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{bad.part} _a_kernel B1-H1-Q8-N8-D64-top2 bf16: {text}"
    assert len(told) == 2 and told[1].endswith(": 1 offences")


def test_spill_elsewhere_is_no_offence(capsys):
    good = [row("sm_80", spills=8), row("gfx942", spills=8, shared=65536), row("sm_100", spills=8), row("sm_90")]
    assert offences(good) == []
    assert conclude(good) == 0
    assert capsys.readouterr().out.startswith("4 kernels (sm_80 1, gfx942 1, sm_100 1, sm_90 1), Triton ")


def test_dense_forward_uses_matrix_instructions(tmp_path):
    path = tmp_path / "rows.json"
    done = run_python(
        "-m", "hivilt.kernel_report", "--part", "sm_90", "--part", "gfx942", "--only", "_attention_forward",
        "--call", "Q1024-N512-D64-dense-bf16", "--json", str(path),
    )  # fmt: skip
    record = json.loads(path.read_text())
    assert done.returncode == bool(record["offences"]), done.stderr
    by_part = {row["part"]: row for row in record["rows"]}
    assert "wgmma" in by_part["sm_90"]["matrix"] and by_part["gfx942"]["matrix"] == "mfma"
    for row in by_part.values():
        assert row["registers"] > 32 and row["instructions"] > 500 and row["shared"] > 8192
    head, first, second = (line.split() for line in done.stdout.splitlines()[:3])
    assert head[:4] == ["part", "kernel", "call", "dtype"]
    assert first[:4] == ["sm_90", "_attention_forward_kernel", "B8-H12-Q1024-N512-D64-dense", "bf16"]
    assert second[0] == "gfx942"


def test_float32_products_stay_links(tmp_path):
    """Every product starts from zero: one that went on from another's sum would be a chain as long as the head."""
    starts = run_script(
        tmp_path,
        """
import importlib, json, re, triton
from dataclasses import replace
from triton.compiler import ASTSource
from hivilt.kernel_report.calls import DENSE
from hivilt.kernel_report.specialise import PARTS, jobs
(_, job), = jobs("sm_90", [replace(DENSE, dtype="fp32")], "_attention_forward")
kernel = getattr(importlib.import_module(job.module), job.kernel)
binary = triton.compile(ASTSource(kernel, job.signature, job.constants, job.attrs), PARTS["sm_90"], job.options)
print(json.dumps(re.findall(r"tt\\.dot %\\S+, %\\S+, (%\\w+)", binary.asm["ttgir"])))
""",
    )
    assert len(starts) >= 4 and all(name.startswith("%cst") for name in starts)


def test_interpreter_is_refused():
    done = fresh.module("hivilt.kernel_report", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr
