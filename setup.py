"""Builds hivilt: the CPU kernels (one object per instruction set, one shared library) and a small host module.

    hivilt/_cpu.so            csrc/cpu: kernels and torch operators, torch stable ABI; loaded by torch.ops.load_library
    hivilt/_C.<abi>.so        csrc/module.cpp: build information and CPU features (pybind11); optional
    hivilt/_build_info.json   what was built, what was skipped and why; shown by `python -m hivilt.info`

A missing compiler, torch or pybind11 skips its part and says so; the package then runs on the reference.
HIVILT_STRICT=1 makes missing kernels, and a source that does not compile, an error. Metadata lives in pyproject.toml.
"""

import hashlib
import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "objects"  # kept between builds: only what changed is compiled again
SETTINGS = runpy.run_path(str(ROOT / "hivilt" / "_settings.py"))  # raises on an unknown HIVILT_* variable

TORCH_MIN = (2, 10)
TORCH_TARGET = "0x020a000000000000"

COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
# A kernel must give the same bits on every machine: fused multiply-adds are written out, never contracted by the
# compiler, and there is no -ffast-math.
KERNEL = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# GCC 12 takes the deliberately undefined operands in its own AVX-512 header for mistakes of ours. Not known to Clang.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# From the oldest to the newest. The objects are linked in this order, after the generic ones, so that an inline
# function that several of them hold is taken from the oldest and runs on every machine.
ISA_FLAGS = {"scalar": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]}


class Skip(Exception):
    """A part cannot be built here; the text is the reason shown to the user."""


class Failed(Skip):
    """Everything needed is there, and yet a source did not compile or link."""


def find_compiler() -> list[str]:
    asked = os.environ.get("CXX")
    for candidate in [asked] if asked else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            if not accepts(command, ["-std=c++20"]):
                raise Skip(f"{candidate} does not compile C++20 (GCC 11 or newer, or Clang 14 or newer, does)")
            return command
    if asked:
        raise Skip(f"no C++ compiler: CXX={asked} does not exist")
    raise Skip("no C++ compiler: neither c++, g++ nor clang++ is on PATH (Debian: apt install g++)")


def find_torch() -> tuple[Path, str]:
    """Folder and version of the installed torch, without the seconds that importing it takes."""
    spec = find_spec("torch")
    try:
        found = version("torch")
    except PackageNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise Skip(
            "torch cannot be seen by this build (is it installed? build isolation hides it): "
            'pip install "torch>=2.10", then pip install . --no-build-isolation'
        )
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < TORCH_MIN:
        raise Skip(f"torch {found} is older than {TORCH_MIN[0]}.{TORCH_MIN[1]}")
    return Path(next(iter(spec.submodule_search_locations))), found


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """True when the compiler takes these flags."""
    command = [*compiler, "-x", "c++", "-c", os.devnull, "-o", os.devnull, *flags]
    return subprocess.run(command, capture_output=True).returncode == 0


def run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        print(shlex.join(command), file=sys.stderr)
    if done.stdout or done.stderr:
        print(done.stdout + done.stderr, file=sys.stderr, flush=True)
    if done.returncode != 0:
        raise Failed(f"{what} failed with exit status {done.returncode}")


def is_current(output: Path, stamp: str) -> bool:
    """True when the output was made by this very command from files that have not changed since."""
    depfile, stampfile = output.with_suffix(".d"), output.with_suffix(".stamp")
    if not (output.exists() and depfile.exists() and stampfile.exists()) or stampfile.read_text() != stamp:
        return False
    made = output.stat().st_mtime_ns
    # A make rule, "target: file file \\<newline> file".
    for name in shlex.split(depfile.read_text().replace("\\\n", " ").split(":", 1)[1]):
        path = ROOT / name
        if not path.exists() or path.stat().st_mtime_ns >= made:
            return False
    return True


def compile_one(compiler: list[str], source: str, flags: list[str], key: str) -> Path:
    """Compiles csrc/<source> unless its object is current; several builds may do so at once."""
    output = OBJECTS / key / (source.replace("/", "-").removesuffix(".cpp") + ".o")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [*compiler, *flags, f"-ffile-prefix-map={ROOT}=.", "-Icsrc", "-c", f"csrc/{source}"]
    stamp = shlex.join(command)
    if is_current(output, stamp):
        return output
    part, depfile = output.with_suffix(f".{os.getpid()}.o"), output.with_suffix(f".{os.getpid()}.d")
    started = time.time_ns()
    try:
        run([*command, "-MMD", "-MF", str(depfile), "-o", str(part)], f"compiling csrc/{source}")
        os.utime(part, ns=(started, started))  # a file saved while the compiler ran counts as newer
        depfile.replace(output.with_suffix(".d"))
        part.replace(output)
        output.with_suffix(".stamp").write_text(stamp)
    finally:
        part.unlink(missing_ok=True)
        depfile.unlink(missing_ok=True)
    return output


def compile_all(compiler: list[str], units: list[tuple[str, list[str]]], key: str) -> list[Path]:
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, min(jobs, len(units)))) as pool:
        futures = [pool.submit(compile_one, compiler, source, flags, key) for source, flags in units]
        failures = [error for error in (future.exception() for future in futures) if error]
    if failures:
        raise failures[0]
    return [future.result() for future in futures]


def link(compiler: list[str], objects: list[Path], extra: list[str], output: Path) -> None:
    """Links into a new file and moves it into place: a process that has the old library mapped keeps it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        run([*compiler, "-shared", *map(str, objects), *extra, "-o", str(part)], f"linking {output.name}")
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def git_hash() -> str | None:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if (ROOT / ".git").exists() else None


class BuildKernels(build_ext):
    """Builds both parts, or says why not; writes _build_info.json either way."""

    def run(self) -> None:
        self.info = {
            "version": self.distribution.get_version(),
            "git": git_hash(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": None,
            "torch_target": f"{TORCH_MIN[0]}.{TORCH_MIN[1]}",
            "compiler": None,
            "flags": [],
            "isas": [],
            "cuda_archs": [],
            "built": [],
            "skipped": {},
        }
        folder = (ROOT if self.inplace else Path(self.build_lib)) / "hivilt"
        self.made = []
        for ext, build in ((self.extensions[0], self.build_cpu), (self.extensions[1], self.build_host)):
            output = folder / Path(self.get_ext_filename(ext.name)).name
            try:
                build(output)
            except Skip as why:
                # The host module is optional: strictness asks for the kernels, and for no source of ours that fails.
                needed = SETTINGS["strict"]() and (ext.name.endswith("_cpu") or isinstance(why, Failed))
                self.skip(output.name.split(".")[0], str(why), "HIVILT_STRICT=1" if needed else None)
                output.unlink(missing_ok=True)  # one left by an earlier build would contradict _build_info.json
            else:
                self.info["built"].append(output.name)
                self.made.append(output)
        insisted = "HIVILT_CUDA=1" if SETTINGS["cuda"]() == "1" else None
        self.skip("cuda", "this version has no CUDA C++ part", insisted)
        folder.mkdir(parents=True, exist_ok=True)
        self.made.append(folder / "_build_info.json")
        self.made[-1].write_text(json.dumps(self.info, indent=2) + "\n")
        self.announce_result()

    def skip(self, part: str, why: str, insisted: str | None = None) -> None:
        """Records a part that was left out; an error when a variable insists on it."""
        self.info["skipped"][part] = why
        if insisted:
            raise SystemExit(f"hivilt: {part} was not built and {insisted} is set: {why}")

    def build_cpu(self, output: Path) -> None:
        compiler = find_compiler()
        torch_folder, self.info["torch"] = find_torch()
        answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        self.info["compiler"] = answer.split("\n")[0]
        self.info["flags"] = [*COMMON, *KERNEL]
        names = ["scalar"]
        if platform.machine().lower() in ("x86_64", "amd64"):
            for isa in ("avx2", "avx512", "avx512_bf16"):
                if accepts(compiler, ISA_FLAGS[isa]):
                    names.append(isa)
                else:
                    self.skip(isa, f"the compiler does not know {ISA_FLAGS[isa][-1]}")
        have = [f"-DHIVILT_HAVE_{name.upper()}" for name in names]
        include = torch_folder / "include"
        torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem{include}"]
        torch_flags.append(f"-ffile-prefix-map={include}=torch")  # error texts name no path of the build machine
        generic = sorted(path.relative_to(ROOT / "csrc").as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
        units = [(source, [*COMMON, *KERNEL, *torch_flags, *have]) for source in generic]
        quiet = [flag for flag in QUIET if accepts(compiler, ["-Werror", flag])]
        units += [(f"cpu/isa/{name}.cpp", [*COMMON, *KERNEL, *ISA_FLAGS[name], *quiet]) for name in names]
        # Objects made against another torch are kept apart, so that two environments do not undo each other's work.
        key = hashlib.sha256(f"{torch_folder} {compiler}".encode()).hexdigest()[:12]
        objects = compile_all(compiler, units, key)
        # Never linked to torch_python; the libraries are found by name in the process that has imported torch.
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        if sys.platform == "linux":
            libraries.append("-Wl,-z,defs")  # a symbol that nobody defines is an error here, not at the first call
        link(compiler, objects, libraries, output)
        self.info["isas"] = names

    def build_host(self, output: Path) -> None:
        compiler = find_compiler()
        if find_spec("pybind11") is None:
            raise Skip("pybind11 is not installed (optional)")
        import pybind11

        python_include = sysconfig.get_path("include")
        if not (Path(python_include) / "Python.h").exists():
            raise Skip("Python.h was not found (Debian: apt install python3-dev)")
        facts = {
            "VERSION": self.info["version"],
            "TORCH_TARGET": self.info["torch_target"],
            "ISAS": ",".join(self.info["isas"]),
            "FLAGS": " ".join(self.info["flags"]),
        }
        # -O1: this module answers two questions at import, and its templates take long to optimise.
        flags = [*COMMON, "-O1", f"-isystem{pybind11.get_include()}", f"-isystem{python_include}"]
        flags += [f"-DHIVILT_{name}={json.dumps(value)}" for name, value in facts.items()]
        key = hashlib.sha256(f"{python_include} {compiler}".encode()).hexdigest()[:12]
        link(compiler, compile_all(compiler, [("module.cpp", flags)], key), [], output)

    def announce_result(self) -> None:
        built = ", ".join(self.info["built"]) or "nothing: pure Python, every operator runs on the reference"
        isas = f"; instruction sets: {', '.join(self.info['isas'])}" if self.info["isas"] else ""
        print(f"hivilt: built {built}{isas}", file=sys.stderr)
        for part, why in self.info["skipped"].items():
            print(f"hivilt: skipped {part}: {why}", file=sys.stderr)
        sys.stderr.flush()
        if "_cpu" in self.info["skipped"]:  # pip hides what a build prints, but newer ones pass warnings on
            warnings.warn(f"hivilt has no CPU kernels and runs on the reference: {self.info['skipped']['_cpu']}")

    def get_ext_filename(self, fullname: str) -> str:
        # The kernel library is no Python module and serves every Python: it carries no interpreter tag.
        return str(Path("hivilt", "_cpu.so")) if fullname.endswith("_cpu") else super().get_ext_filename(fullname)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in getattr(self, "made", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in an editable install everything is built where it lies


packages = find_packages(include=["hivilt", "hivilt.*"])
packages += ["hivilt.triton_kernels", *(f"hivilt.triton_kernels.{name}" for name in find_packages("triton_kernels"))]

setup(
    packages=packages,
    package_dir={"hivilt.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("hivilt._cpu", []), Extension("hivilt._C", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildKernels},
)
