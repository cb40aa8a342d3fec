"""Compiles a kernel and reads what came out.  Each compilation is a process of its own: an assertion in a compiler ends
that process alone, and what compilers print to stderr is kept for the error that it explains."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import triton
from triton.compiler import ASTSource

from .specialise import PARTS, Job

TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100; Triton refuses more when it starts the kernel


def compile_all(jobs: Iterable[Job], cache: str | None) -> Iterator[dict[str, Any]]:
    """What ``compiled`` returns for each job, in order, on all CPUs. cache: Triton's folder; None: its own choice."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def isolated(job: Job) -> dict[str, Any]:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(send, job, cache))
        process.start()
        send.close()
        try:
            found = receive.recv()
        except EOFError:
            found = None
        process.join()
        return found or {"error": f"the compiler ended with exit code {process.exitcode}"}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(isolated, jobs)


def _answer(send: Connection, job: Job, cache: str | None) -> None:
    if cache is not None:
        triton.knobs.cache.dir = cache
    send.send(compiled(job))


def compiled(job: Job) -> dict[str, Any]:
    """registers, spills, shared, instructions, matrix and seconds of a kernel; or error, in lines, and seconds."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attrs)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            binary = triton.compile(source, target=PARTS[job.part], options=job.options)
        except Exception as error:
            printed.seek(0)
            return {"error": explanation(error, printed.read()), "seconds": time.perf_counter() - start}
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    columns = getattr(binary.metadata, "tmem_size", 0) or 0
    if columns > TENSOR_MEMORY:
        return {"error": f"{columns} columns of tensor memory, more than {TENSOR_MEMORY}"}
    if "cubin" in binary.asm:
        found = nvidia_resources(disassembled(binary.asm["cubin"]))
    else:
        found = amd_resources(binary.asm["amdgcn"])
    return {**found, "shared": binary.metadata.shared, "seconds": time.perf_counter() - start}


def explanation(error: BaseException, printed: str) -> str:
    """The error that caused it all, the line of the kernel that it points at, and what the compilers printed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines()
    at = next((i for i, line in enumerate(lines) if re.fullmatch(r"\s*\^\s*", line)), 0)
    told = [line for line in (lines[:1] + lines[max(1, at - 1) :])[:6] if line.strip()]
    printed_errors = [line[:300] for line in printed.splitlines() if re.search(r"\b(error|note|ERROR): ", line)]
    return "\n".join([type(error).__name__, *told, *printed_errors[:4]])


def disassembled(cubin: bytes) -> str:
    """Resource usage and SASS, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_resources(text: str) -> dict[str, Any]:
    """Of cuobjdump's text: spills are bytes of a thread's stack."""
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", text, re.MULTILINE)
    known = {"HGMMA": "wgmma", "UTCHMMA": "tcgen05", "HMMA": "mma"}
    return {
        "registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"], "instructions": len(opcodes),
        "matrix": "+".join(name for opcode, name in known.items() if opcode in opcodes),
    }  # fmt: skip


def amd_resources(text: str) -> dict[str, Any]:
    """Of assembly: spills are vector registers; a scalar one goes to a lane of a vector register, not to memory."""
    number = {name: int(n) for name, n in re.findall(r"^\s+\.(\w+_count):\s+(\d+)", text, re.MULTILINE)}
    opcodes = re.findall(r"^\t([a-z]\w*)", text, re.MULTILINE)
    return {
        "registers": number["vgpr_count"], "spills": number["vgpr_spill_count"], "instructions": len(opcodes),
        "matrix": "mfma" if any(opcode.startswith("v_mfma") for opcode in opcodes) else "",
        "scalar_spills": number["sgpr_spill_count"],
    }  # fmt: skip
