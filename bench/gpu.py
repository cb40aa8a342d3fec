"""python bench/gpu.py [--rehearse]: everything that needs a GPU, in eight minutes; ``make gpu`` sets up and calls it.

Builds, holds the kernels against the oracle, runs tests/test_gpu.py, compute-sanitizer and the benchmarks.  No step
stops another, each gets its share of the time that is left.  One JSON file holds the machine, the steps and the
benchmarks; bench/report.py reads it.  Fails when a result was wrong, not when a target was missed.  --rehearse walks
through the same lines on a CPU, in Triton's interpreter, and writes to a temporary folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import report
from record import Counts, read

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 460  # with start and report, eight minutes
INSTALL_SECONDS = 60  # for pip, whatever compiling has left of its time
FAMILY = "tests/test_topk_attention"
PARITY = [f"{FAMILY}{part}.py" for part in ("", "_masks", "_special", "_varlen", "_select", "_order")]
PARITY += [f"tests/test_scale_fusion{part}.py" for part in ("", "_interpolate", "_dropout", "_special", "_autograd")]
PARITY += ["tests/test_token_pool.py"]
PARITY += [f"tests/test_bank_retrieval{part}.py" for part in ("", "_exact", "_autograd")]
PARITY += ["tests/test_contrastive_loss.py"]
# Of every family, and of a rehearsal's least the one race that is run.
RACES = {
    "topk_attention": "bench_topk_attention_forward and not backward and Q19",
    "scale_fusion": "bench_scale_fusion_inference", "token_pool": "inference",
    "bank_retrieval": "bench_bank_retrieval_forward and not backward", "contrastive_loss": "forward and not backward",
}  # fmt: skip
SMALLEST = [sys.executable, "bench/gpu_calls.py"]
CALL_DTYPES = "float32", "bfloat16"
WARM_UP_JOBS = 3 + len(CALL_DTYPES)


@dataclass
class Done:
    """A process that has ended; status None: it was ended from here."""

    status: int | None
    output: str
    at: float = field(default_factory=time.time)

    def tail(self, lines: int = 15) -> list[str]:
        return [line[:400] for line in self.output.splitlines() if line.strip()][-lines:]


@dataclass
class Outcome:
    """What became of a step: passed, failed, skipped or cut short."""

    outcome: str
    counts: Counts = field(default_factory=Counts)
    why: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Session:
    """The settings of one run and the ways to start a process in it."""

    def __init__(self, rehearse: bool, brief: bool, scratch: Path):
        self.rehearse, self.brief, self.scratch = rehearse, brief, scratch
        path = os.pathsep.join(filter(None, [str(ROOT / "bench"), os.environ.get("PYTHONPATH")]))
        self.environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        for name in [name for name in self.environment if name.startswith("PYTEST_")]:
            del self.environment[name]  # of a pytest that this runs under
        self.environment.pop("TRITON_INTERPRET", None)
        self.environment.pop("REHEARSE", None)
        if rehearse:
            self.environment |= {"TRITON_INTERPRET": "1", "REHEARSE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.machine: dict = {}
        self.logs = itertools.count(1)

    def call(self, command: list[str], limit: float, **environment: str) -> Done:
        """Runs a command for ``limit`` seconds at most; then ends it, and its children, which would hold the GPU."""
        log = self.scratch / f"{next(self.logs):02}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=self.environment | environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(max(1.0, limit))
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Done(status, log.read_text(errors="replace"))

    def pytest(self, *arguments: str) -> list[str]:
        # -P, where Python has it, keeps the repository root, and with it the bare name triton_kernels, off the path.
        safe = ["-P"] if sys.version_info >= (3, 11) else []
        return [sys.executable, *safe, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]

    def tests(self, name: str, arguments: list[str], limit: float, jobs: int, pool: ThreadPoolExecutor) -> Outcome:
        """Runs tests in ``jobs`` processes, each again after a crash, and counts what became of every test."""
        start = time.time()

        def work(number: int) -> tuple[list[dict], Done]:
            record, lines = self.scratch / f"{name}-{number}.jsonl", 0
            while True:
                command = self.pytest(
                    "-p", "gpu_tests", "--record", str(record), "--share", f"{number}/{jobs}", "--tb=short",
                    "--start-until", str(start + 0.8 * limit), "--timeout=100", "--timeout-method=thread", *arguments,
                )  # fmt: skip
                done = self.call(command, start + limit - time.time())
                found = read(record)
                over = done.status is None or time.time() > start + 0.8 * limit
                # Without a new line there is nothing to go on behind: it would only fail again.
                if over or len(found) == lines or "end" in found[-1]:
                    return found, done
                lines = len(found)

        counts, why = Counts(), []
        for found, done in pool.map(work, range(1, jobs + 1)):
            counts.add(found, done.at if done.status is None else None)
            if done.status not in (0, 5):  # 5: none of the tests was left for this process
                why = done.tail()
        if not counts.ran:
            return Outcome("cut short" if counts.not_reached else "failed", counts, why or ["no test was found"])
        late = counts.unfinished or counts.not_reached
        return Outcome("failed" if counts.failed else "cut short" if late else "passed", counts, why)

    def jobs(self, most: int) -> int:
        """Processes at a time: what keeps a rehearsal quiet, or what the CPUs and the memory bear."""
        free = psutil.virtual_memory().available
        return 1 if self.rehearse else max(1, min(most, (os.cpu_count() or 2) - WARM_UP_JOBS, free >> 32))


# The steps.


def build(session: Session, limit: float) -> Outcome:
    """Compiles the C++ part and installs: without that part where it is not done in time, as nothing behind this step
    runs where the package cannot be imported, and little of it asks for the CPU's kernels."""
    start = time.time()
    done = session.call([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], limit)
    late = done.status is None
    outcome = Outcome(
        "passed" if done.status == 0 else "cut short" if late else "failed", why=done.tail() if done.status != 0 else []
    )
    install = [sys.executable, "-m", "pip", "install", "-q", "-e", ".", "--no-build-isolation", "--no-deps"]
    without = {"CXX": "none", "HIVILT_STRICT": ""} if late else {}
    done = session.call(install, max(INSTALL_SECONDS, limit - (time.time() - start)), **without)
    if done.status != 0:
        outcome = Outcome("failed" if done.status else "cut short", why=[*outcome.why, *done.tail()])
    return outcome


def parity(session: Session, limit: float) -> Outcome:
    """The oracle's tests; beside them, as no time is taken yet, all that later steps will compile."""
    only, seconds = ("triton-cpu", 2) if session.rehearse else ("triton-cuda", 30)
    files, only = (PARITY[:1], f"{only} and by_hand") if session.brief else (PARITY, only)
    arguments = [*files, "-k", only, "--interpret-all", "--breadth-first", "--case-seconds", str(seconds)]
    benchmarks = ["--benchmark-only", "--warm-up", *only_one_race(session, "topk_attention")]
    names = list(RACES)[:1] if session.brief else RACES
    benchmarks = [*(f"bench/bench_{name}.py" for name in names), *benchmarks]
    jobs, parts = session.jobs(most=12), 1 if session.rehearse else WARM_UP_JOBS - len(CALL_DTYPES)
    with ThreadPoolExecutor(1 if session.rehearse else jobs + WARM_UP_JOBS) as pool:
        for part in range(1, parts + 1):
            record = str(session.scratch / f"warm-up-{part}.jsonl")
            plugin = ["-p", "gpu_tests", "--record", record, "--share", f"{part}/{parts}"]
            pool.submit(session.call, session.pytest(*plugin, *benchmarks), limit)
        for dtype in () if session.rehearse else CALL_DTYPES:
            pool.submit(session.call, [*SMALLEST, dtype], limit)
        return session.tests("parity", arguments, limit, jobs, pool)


def gpu_tests(session: Session, limit: float) -> Outcome:
    jobs, only = session.jobs(most=12), ["-k", "mask_beyond or at_once"] if session.brief else []
    with ThreadPoolExecutor(jobs) as pool:
        return session.tests("tests", ["tests/test_gpu.py", "--breadth-first", *only], limit, jobs, pool)


def memory_checker(session: Session, limit: float) -> Outcome:
    """Every kernel at its smallest, first alone, so that it is compiled, then under compute-sanitizer."""
    start, calls = time.time(), [*SMALLEST, *(CALL_DTYPES[:1] if session.rehearse else CALL_DTYPES)]
    done = session.call(calls, limit)
    if done.status != 0:
        return Outcome("failed" if done.status else "cut short", why=done.tail())
    checker = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if session.rehearse or checker is None:
        missing = "GPU to check" if session.rehearse else "compute-sanitizer on PATH or in /usr/local/cuda/bin"
        return Outcome("skipped", why=[*done.tail(1), f"no {missing}"])
    command = [checker, "--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "99"]
    command += ["--print-limit", "10", *calls]
    done = session.call(command, limit - (time.time() - start), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = [line for line in done.output.splitlines() if "ERROR SUMMARY" in line]
    if done.status == 0:
        return Outcome("passed", why=summary)
    if done.status == 99 and "Device not supported" not in done.output:
        return Outcome("failed", why=done.output.splitlines()[:40] + summary)
    return Outcome("skipped" if done.status else "cut short", why=done.tail())


def races(name: str) -> Callable[[Session, float], Outcome]:
    """The step that runs the benchmarks of a family."""

    def step(session: Session, limit: float) -> Outcome:
        return benchmark(session, f"bench/bench_{name}.py", limit, *only_one_race(session, name))

    return step


def overhead(session: Session, limit: float) -> Outcome:
    return benchmark(session, "bench/bench_overhead.py", limit, *(["-k", "no-grad-mul"] if session.brief else []))


def only_one_race(session: Session, name: str) -> list[str]:
    return ["-k", RACES[name]] if session.brief else []


def benchmark(session: Session, path: str, limit: float, *more: str) -> Outcome:
    name = Path(path).stem
    arguments = [path, "--benchmark-only", f"--benchmark-json={session.scratch / name}.json", *more]
    arguments += ["--until", str(time.time() + 0.75 * limit), *(["--rounds", "1"] if session.rehearse else [])]
    with ThreadPoolExecutor(1) as pool:
        return session.tests(name, arguments, limit, 1, pool)


# Step -> (what it does, its share of the time, whether the run fails with it).
STEPS: dict[str, tuple[Callable[[Session, float], Outcome], int, bool]] = {
    "build": (build, 120, False),
    "parity": (parity, 140, True),
    "tests": (gpu_tests, 100, True),
    "memcheck": (memory_checker, 80, True),
    "benchmarks": (races("topk_attention"), 140, False),
    "scale_fusion": (races("scale_fusion"), 60, False),
    "token_pool": (races("token_pool"), 20, False),
    "bank_retrieval": (races("bank_retrieval"), 60, False),
    "contrastive_loss": (races("contrastive_loss"), 40, False),
    "overhead": (overhead, 35, False),
}


def walk(session: Session, steps: list[str], seconds: float) -> dict[str, Outcome]:
    """Runs the steps; whatever one leaves of its time is the others'."""
    deadline, outcomes = time.time() + seconds, {}
    for at, name in enumerate(steps):
        step, share, _ = STEPS[name]
        limit = (deadline - time.time()) * share / sum(STEPS[later][1] for later in steps[at:])
        print(f"gpu: {name}, at most {limit:.0f} s", flush=True)
        start = time.time()
        try:
            outcomes[name] = step(session, limit)
        except Exception as error:  # a mistake in this file must not cost the steps that follow
            outcomes[name] = Outcome("failed", why=[f"{type(error).__name__}: {error}"])
        outcomes[name].seconds = time.time() - start
        print(f"gpu: {name} {outcomes[name].outcome} after {outcomes[name].seconds:.0f} s", flush=True)
    return outcomes


def describe(session: Session) -> dict:
    """The machine as bench/machine.py sees it; asked in a process of its own, which gives the GPU back."""
    done = session.call([sys.executable, str(ROOT / "bench" / "machine.py")], 60)
    try:
        return json.loads(done.output.splitlines()[-1])
    except (IndexError, ValueError):
        return {"gpu": None, "rehearsal": session.rehearse, "problem": done.tail()}


def collect(session: Session, outcomes: dict[str, Outcome]) -> dict:
    """What pytest-benchmark wrote, as one file, and what it knows nothing of."""
    files = [session.scratch / f"bench_{name}.json" for name in (*RACES, "overhead")]
    written = [json.loads(file.read_text()) for file in files if file.exists() and file.stat().st_size]
    first = written[0] if written else {
        "machine_info": {"hivilt": session.machine}, "commit_info": {}, "benchmarks": [],
        "datetime": time.strftime("%Y-%m-%dT%H:%M:%S"), "version": "none",
    }  # fmt: skip
    first["benchmarks"] = [bench for data in written for bench in data["benchmarks"]]
    first["gpu"] = {
        "machine": session.machine,
        "machine_afterwards": session.machine if session.brief else describe(session),  # a hot GPU has lower clocks
        "steps": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    return first


def steps_table(outcomes: dict[str, Outcome]) -> str:
    rows = []
    for name, done in outcomes.items():
        c = done.counts
        numbers = [c.passed, c.failed, c.skipped, c.unfinished, c.not_reached]
        rows.append([name, done.outcome, *(str(n) if c.ran else "-" for n in numbers), f"{done.seconds:.0f}"])
    head = ["step", "outcome", "passed", "failed", "skipped", "unfinished", "not reached", "seconds"]
    return report.table(head, rows)


def trouble(outcomes: dict[str, Outcome]) -> str:
    """The first failures of every step, or the last lines it printed."""
    said = []
    for name, done in outcomes.items():
        for failure in done.counts.failures[:4]:
            lines = [line for line in failure["why"].splitlines() if line.strip()]
            said += [f"{name}: {failure['test']}", *(f"    {line[:200]}" for line in lines[-5:])]
        if done.why and not done.counts.failures and done.outcome != "passed":
            said += [f"{name} {done.outcome}:", *(f"    {line[:200]}" for line in done.why)]
    return "\n".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in Triton's interpreter")
    parser.add_argument("--brief", action="store_true", help="of a rehearsal, the least of every step")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all steps together (default {SECONDS})")
    parser.add_argument("--without", action="append", default=[], choices=STEPS, help="leave out a step")
    parser.add_argument("--out", type=Path, help="the JSON file (default bench/results/<gpu>.json)")
    asked = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="hivilt-gpu-"))
    session = Session(asked.rehearse, asked.rehearse and asked.brief, scratch)
    outcomes = walk(session, [name for name in STEPS if name not in asked.without], asked.seconds)
    session.machine = describe(session)
    name = (session.machine.get("gpu_name") or "no-gpu").lower().replace(" ", "-")
    folder = scratch if asked.rehearse else ROOT / "bench" / "results"
    path = asked.out or folder / f"{'rehearsal' if asked.rehearse else name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(collect(session, outcomes), indent=1) + "\n", encoding="utf-8")
    results = report.Results(path)
    path.with_suffix(".md").write_text(report.compose(results, None), encoding="utf-8")
    parts = [steps_table(outcomes), trouble(outcomes), report.summary(results), report.times(results)]
    print("\n\n".join(["", *filter(None, parts), f"written: {path}, {path.with_suffix('.md')}; logs: {scratch}"]))
    wrong = [name for name, done in outcomes.items() if STEPS[name][2] and done.outcome == "failed"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
