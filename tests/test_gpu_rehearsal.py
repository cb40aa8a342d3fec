"""``make gpu`` without a GPU: the driver walks through every step but the build, in Triton's interpreter."""

import fcntl
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # as bench/conftest.py does
pytest.importorskip("pytest_benchmark")
pytest.importorskip("pytest_timeout")

import bank_rivals
import gpu
import gpu_targets
import loss_rivals
import record
import report
import torch

# The driver, with everything that its steps import loaded: each of its commands runs in a fork instead of a new Python,
# which would import it again, eleven times. Session.call itself is tested below.
DRIVER = """
import os, runpy, signal, sys, time
bench, *arguments = sys.argv[1:]
os.environ |= {"TRITON_INTERPRET": "1", "REHEARSE": "1"}  # as the driver sets them for all commands
sys.path[:] = [bench, *(x for x in sys.path if not os.path.abspath(x).startswith(os.path.dirname(bench) + os.sep)
                        or "site-packages" in x)]
import hypothesis, pytest, torch._dynamo, triton.language, gpu

def fork(session, command, limit, **environment):
    log = session.scratch / f"{next(session.logs):02}.log"
    end, child = time.monotonic() + limit, os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            for descriptor in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
            os.chdir(gpu.ROOT)
            os.environ.clear()
            os.environ.update(session.environment | environment)
            assert command[0] == sys.executable
            sys.argv = [x for x in command[1:] if x not in ("-P", "-m")]
            run = runpy.run_module if "-m" in command else runpy.run_path
            run(sys.argv[0], run_name="__main__", **({"alter_sys": True} if "-m" in command else {}))
            status = 0
        except SystemExit as done:
            status = done.code if isinstance(done.code, int) else int(done.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    done = 0
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return gpu.Done(os.waitstatus_to_exitcode(status) if done else None, log.read_text(errors="replace"))

gpu.Session.call, sys.argv = fork, ["gpu.py", *arguments]
sys.exit(gpu.main())
"""


def test_rehearsal(tmp_path):
    pytest.importorskip("triton", reason="Triton, whose interpreter stands for the GPU, is not installed")
    path = tmp_path / "rehearsal.json"
    options = ["--rehearse", "--brief", "--without", "build", "--out", str(path), "--seconds", "400"]
    # TMPDIR is where it leaves its logs.
    done = fresh.run(DRIVER, str(Path(gpu.__file__).parent), *options, timeout=460, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    data = json.loads(path.read_text())
    steps = data["gpu"]["steps"]
    assert list(steps) == [name for name in gpu.STEPS if name != "build"]
    assert {name: step["outcome"] for name, step in steps.items()} == {
        "parity": "passed", "tests": "passed", "memcheck": "skipped", "benchmarks": "passed", "scale_fusion": "passed",
        "token_pool": "passed", "bank_retrieval": "passed", "contrastive_loss": "passed", "overhead": "passed",
    }, done.stdout  # fmt: skip
    assert steps["parity"]["counts"]["passed"] > 0 and steps["tests"]["counts"]["passed"] > 1
    assert "never started: none" in steps["memcheck"]["why"][0]  # compute-sanitizer would see every kernel
    machine = data["gpu"]["machine"]
    assert machine["rehearsal"] and machine["torch"] and machine["triton"]

    results = report.Results(path)
    shape = gpu_targets.name(gpu_targets.REHEARSAL["small"])
    group = f"topk_attention forward {shape}-bf16-cpu"
    assert results.fact(group, "hivilt", "ran") == "hivilt backend triton"
    assert results.fact(group, "flash", "ran") == "scaled_dot_product_attention on FLASH_ATTENTION alone"
    assert "cudnn" in results.fact(group, "hivilt", "left_out")
    assert {"eager", "flex", "math_masked", "floor"} <= set(results.groups[group])
    assert "overhead no-grad cpu" in results.groups

    # The table comes last: the steps, then the targets with what was measured, then the times.
    table = done.stdout.index("| step "), done.stdout.index("| what "), done.stdout.index("| median ms ")
    assert list(table) == sorted(table)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout[table[1] :].splitlines()]
    targets = [row for row in rows if row and row[0].startswith(("forward", "shared"))]
    assert len([row for row in targets if row[-1] in ("yes", "no", "not measured")]) == len(gpu_targets.TARGETS) + 1
    assert [row[-1] for row in targets if row[1] == shape] == ["no"]  # measured, and an interpreter reaches no target
    assert [row[-1] for row in rows if row and row[0] == "bank_retrieval forward: times faster than eager"] == ["no"]
    (bank,) = gpu_targets.bank_names(machine)
    assert results.fact(f"bank_retrieval forward {bank}-fp32-cpu", "hivilt", "ran") == "hivilt backend triton"
    for family in gpu.RACES:
        assert any(title.startswith(family) for title in results.groups), family


def test_counts_of_a_record():
    """A process that died, one that hung, one that was merely ended: the last two differ by how long the test ran."""

    def started(test: str, at: float) -> dict:
        return {"test": test, "outcome": "started", "at": at}

    lines = [started("a", 1.0), {"test": "a", "outcome": "passed"}, started("b", 2.0), started("c", 3.0)]
    lines += [{"test": "c", "outcome": "failed", "why": "1 != 2"}, {"test": "d", "outcome": "not reached", "at": 4.0}]
    counts = record.Counts()
    counts.add([*lines, {"end": 1}], None)
    assert (counts.passed, counts.failed, counts.not_reached, counts.ran) == (1, 2, 1, 3)
    assert {f["test"]: f["why"] for f in counts.failures} == {"b": "the process ended while it ran", "c": "1 != 2"}
    for killed_at, failed in ((30.0, 0), (300.0, 1), (None, 1)):
        counts = record.Counts()
        counts.add([started("e", 10.0)], killed_at)
        assert (counts.failed, counts.unfinished) == (failed, 1 - failed)


CRASHING = """
import os, pytest
def test_fine(): pass
def test_wrong(): assert 1 == 2
def test_left_out(): pytest.skip("for a reason")
def test_crash(): os._exit(1)
@pytest.mark.parametrize("i", range(3))
def test_behind(i): pass
"""


def test_a_crash_costs_one_test(tmp_path):
    (tmp_path / "test_crashing.py").write_text(CRASHING)
    session = gpu.Session(True, True, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        outcome = session.tests("crashing", [str(tmp_path / "test_crashing.py"), "--breadth-first"], 60, 1, pool)
    counts = outcome.counts
    assert (outcome.outcome, counts.passed, counts.failed, counts.skipped) == ("failed", 4, 2, 1), outcome
    assert counts.reasons == {"Skipped: for a reason": 1}
    assert "process ended" in str(counts.failures) and "assert 1 == 2" in str(counts.failures)
    order = [line["test"].split("::")[1] for line in record.read(tmp_path / "crashing-1.jsonl") if "at" in line]
    assert order.index("test_crash") < len(order) - 3 and [name[:11] for name in order[-2:]] == ["test_behind"] * 2


def test_steps_share_the_time_and_survive_each_other(monkeypatch, tmp_path, capsys):
    limits = {}

    def step(name: str, outcome: str):
        def run(session, limit):
            limits[name] = limit
            if outcome == "raises":
                raise RuntimeError("planted")
            return gpu.Outcome(outcome)

        return run

    steps = {
        "a": (step("a", "raises"), 1, True),
        "b": (step("b", "passed"), 2, False),
        "c": (step("c", "cut short"), 1, True),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    outcomes = gpu.walk(gpu.Session(True, True, tmp_path), list(steps), 100.0)
    assert [round(limits[name]) for name in "abc"] == [25, 67, 100]  # what one leaves is the others'
    assert {name: done.outcome for name, done in outcomes.items()} == {"a": "failed", "b": "passed", "c": "cut short"}
    assert "RuntimeError: planted" in gpu.trouble(outcomes) and "| a " in gpu.steps_table(outcomes)


def test_a_process_is_ended_with_its_children(tmp_path):
    code = "import fcntl, os, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); os.fork(); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    done = gpu.Session(True, True, tmp_path).call(command, 1.5)
    assert done.status is None
    deadline = time.monotonic() + 20  # the kernel ends them in its own time; they would sleep for 60 s
    with (tmp_path / "lock").open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while any of them lives
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "a child outlived its process"
                time.sleep(0.1)


CHECKERS = {
    "passed": "echo '========= ERROR SUMMARY: 0 errors'; exit 0",
    "failed": "echo '========= Invalid __global__ write of size 4'; echo '========= ERROR SUMMARY: 1 error'; exit 99",
    "skipped": "echo '========= Error: Device not supported'; exit 99",
    "cut short": "exec sleep 60",
}


@pytest.mark.parametrize("outcome", CHECKERS)
def test_verdict_of_the_memory_checker(monkeypatch, tmp_path, outcome):
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(f"#!/bin/sh\n{CHECKERS[outcome]}\n")
    checker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "SMALLEST", [sys.executable, "-c", "pass"])
    found = gpu.memory_checker(gpu.Session(False, False, tmp_path), 1.0 if outcome == "cut short" else 20.0)
    assert found.outcome == outcome
    assert outcome != "failed" or "Invalid __global__ write" in "\n".join(found.why)


def test_commands_of_a_gpu(monkeypatch, tmp_path):
    """What a GPU machine runs and a rehearsal does not: many processes, tests by their names there, no interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(gpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**37))
    session, commands = gpu.Session(False, False, tmp_path), []

    def call(command, limit, **environment):
        commands.append(command)
        return gpu.Done(5, "")

    monkeypatch.setattr(session, "call", call)
    outcomes = gpu.walk(session, list(gpu.STEPS), 480.0)
    assert "TRITON_INTERPRET" not in session.environment and "REHEARSE" not in session.environment
    assert [outcomes[name].outcome for name in ("parity", "tests")] == ["failed"] * 2  # nothing ran
    text = [" ".join(command) for command in commands]
    assert len([line for line in text if "-k triton-cuda" in line]) == 11 and any(
        "--share 11/11" in line for line in text
    )
    assert len([line for line in text if "--warm-up" in line]) == 3
    assert len([line for line in text if "tests/test_gpu.py" in line]) == 11
    assert [line for line in text if "setup.py -q build_ext --inplace" in line] and "--rounds" not in "".join(text)
    data = gpu.collect(session, outcomes)
    path = tmp_path / "nothing.json"
    path.write_text(json.dumps(data))
    results = report.Results(path)
    assert "not measured" in report.summary(results) or "Not measured" in report.compose(results, None)
    assert "no test was found" in gpu.trouble(outcomes)


def test_what_compiles_too_long_is_left_out_of_the_installation(monkeypatch, tmp_path):
    """Without the package nothing else could run."""
    session, calls = gpu.Session(False, False, tmp_path), []
    monkeypatch.setattr(
        session, "call", lambda *a, **environment: calls.append((a, environment)) or gpu.Done(statuses.pop(0), "late")
    )
    for first, outcome in ((None, "cut short"), (0, "passed"), (1, "failed")):
        statuses = [first, 0]
        assert gpu.build(session, 1.0).outcome == outcome
        (command, limit), environment = calls[-1]
        assert command[2:5] == ["pip", "install", "-q"] and limit == gpu.INSTALL_SECONDS
        assert environment == ({"CXX": "none", "HIVILT_STRICT": ""} if first is None else {})
    statuses = [0, 1]
    assert gpu.build(session, 1.0).outcome == "failed"


@pytest.mark.parametrize("case", [bank_rivals.Case(B=2, M=9, C=8, topk=2), loss_rivals.Case(B=4, C=8)], ids=str)
def test_torch_compile_is_the_compiler_on_a_gpu(case, monkeypatch):
    """Only a rehearsal leaves the compiling out."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options["backend"]))
    for rehearsed in (True, False):
        room = sys.modules[type(case).__module__]
        monkeypatch.setattr(room, "LIKE_GPU", True)
        monkeypatch.setattr(room, "REHEARSED", rehearsed)
        room.compiled(case)
    assert asked == ["eager", "inductor"]
