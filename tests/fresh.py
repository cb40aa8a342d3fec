"""Scripts in processes of their own that start at once: forks of a process that has imported torch and done nothing.

A new Python would spend two seconds on that import.  What runs here finds torch loaded, no threads, nothing of hivilt
imported, and the environment that it is given, as long as torch itself does not read it while it is imported.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch"])


def work(code: str, args: tuple[str, ...], environment: dict[str, str | None], folder: str) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(f"{folder}/{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
    faulthandler.enable()
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.argv = ["-c", *args]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


def run(code: str, *args: str, timeout: float = 120, **environment: str | None) -> subprocess.CompletedProcess:
    """As ``subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, ...)``; None
    takes a variable out of the environment."""
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=work, args=(code, args, environment, folder))
        process.start()
        process.join(timeout)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(code, timeout)
        said = [Path(folder, name) for name in "12"]
        return subprocess.CompletedProcess(code, status, *(x.read_text() if x.exists() else "" for x in said))


def module(name: str, *args: str, timeout: float = 120, **environment: str | None) -> subprocess.CompletedProcess:
    """As ``python -m name *args``."""
    return run(f"import runpy; runpy.run_module({name!r}, {{}}, '__main__')", *args, timeout=timeout, **environment)
