"""The rules of the house that a machine can check: import direction, torch-free core, one stem in every room, and
that no instruction of a newer CPU lies outside the code that is chosen for it."""

import ast
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

import hivilt
from hivilt import info

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sorted(
    path for folder in ("hivilt", "triton_kernels", "tests", "bench") for path in (ROOT / folder).rglob("*.py")
)
CPP = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".inc"})
STEMS = sorted(path.stem for path in (ROOT / "hivilt" / "ops").glob("*.py") if not path.stem.startswith("_"))

# room -> the rooms it may import. Every direct child of hivilt/ is a room of its own name.
PLUMBING = {"_settings", "_library", "_backends"}
MAY_IMPORT = {
    "reference": {"reference"},
    "testing": {"testing"},
    "triton_kernels": {"triton_kernels", "_settings"},
    "_settings": set(),
    "_backends": {"_settings"},
    "_library": {"_settings", "_backends"},
    "ops": {"ops", "reference", "triton_kernels", "_C", *PLUMBING},
    "nn": {"nn", "ops", "reference", *PLUMBING},
    "distributed": {"distributed", "ops", "reference", "nn", *PLUMBING},
    "swap": {"swap", "nn", "ops", "reference", *PLUMBING},
    "losses": {"losses", "distributed", "ops", "reference", *PLUMBING},
    "models": {"models", "nn", "swap", "losses", "ops", "reference", *PLUMBING},
    "train": {"train", "predict", "models", "nn", "swap", "losses", "ops", "reference", "integrations", *PLUMBING},
    "predict": {"predict", "train", "models", "nn", "swap", "losses", "ops", "reference", "integrations", *PLUMBING},
    "integrations": {"integrations", "swap", "nn", "ops", *PLUMBING},
    "info": {"_C", "ops", *PLUMBING},
    "kernel_report": {"kernel_report", "triton_kernels"},
    "tune": {"ops", "triton_kernels"},
    "demo": {"demo", "train", "swap", "nn", "ops", "_C", "__init__", *PLUMBING},
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package_files() -> list[tuple[str, Path]]:
    """(module name, file) of everything that installs."""
    found = []
    for path in PYTHON:
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[0] == "triton_kernels":
            parts.insert(0, "hivilt")
        if parts[0] == "hivilt":
            found.append((".".join(parts), path))
    return found


def imports_of(name: str, path: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every import in a file, wherever it stands; relative ones are resolved."""
    package = name.split(".")[:-1]  # of hivilt/ops/__init__.py this is hivilt.ops, as the name ends in .__init__
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from hivilt import ops` names a room, `from hivilt.ops import topk_attention` a name inside one.
            found += [(node.lineno, f"{module}.{alias.name}" if module == "hivilt" else module) for alias in node.names]
    return found


def wrong_imports(name: str, path: Path) -> list[str]:
    """Imports of our own modules that point the wrong way."""
    room = name.split(".")[1]
    if room == "__init__":
        return []
    wrong = []
    for line, module in imports_of(name, path):
        parts = module.split(".")
        if parts[0] != "hivilt":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        if target not in MAY_IMPORT:  # a public name such as hivilt.accelerate
            target = "__init__" if not (ROOT / "hivilt" / f"{target}.py").exists() and target != "_C" else target
        if target not in MAY_IMPORT.get(room, set()):
            wrong.append(f"{relative(path)}:{line} imports {module}")
    return wrong


def test_every_room_has_a_rule():
    rooms = {name.split(".")[1] for name, _ in package_files()} - {"__init__"}
    assert rooms <= set(MAY_IMPORT), f"say in MAY_IMPORT what these may import: {sorted(rooms - set(MAY_IMPORT))}"


def test_imports_point_one_way():
    wrong = [text for name, path in package_files() for text in wrong_imports(name, path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "room, text",
    [
        ("reference", "from ..ops import topk_attention"),
        ("reference", "def f():\n    import hivilt.nn"),
        ("ops", "from hivilt import nn"),
        ("ops", "import hivilt"),
        ("nn", "from .. import swap"),
        ("testing", "from hivilt.reference import topk_attention"),
        ("_settings", "from ._backends import choose"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, monkeypatch, room, text):
    path = tmp_path / "planted.py"
    path.write_text(text)
    monkeypatch.setitem(globals(), "relative", str)
    name = f"hivilt.{room}" if room.startswith("_") else f"hivilt.{room}.planted"
    assert wrong_imports(name, path)


COMPILING = ("hivilt.triton_kernels.", "hivilt.kernel_report.", "hivilt.info")


def test_package_imports_triton_nowhere_at_import():
    """Triton is imported by its kernels, when a CUDA tensor asks, and by a command that compiles them."""
    wrong = [
        f"{relative(path)}:{line}"
        for name, path in package_files()
        for line, module in imports_of(name, path)
        if module.split(".")[0] == "triton" and not name.startswith(COMPILING)
    ]
    assert not wrong, wrong


def test_settings_alone_reads_the_environment():
    wrong = []
    for name, path in package_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            word = getattr(node, "attr", getattr(node, "name", None))
            if word in {"environ", "environb", "getenv"} and name != "hivilt._settings":
                wrong.append(f"{relative(path)}:{node.lineno} {word}")
    assert not wrong, wrong


def test_cpp_reads_one_variable_in_one_file():
    reads = {}
    for path in CPP:
        for variable in re.findall(r'getenv\("?(\w+)', path.read_text(encoding="utf-8")):
            reads.setdefault(relative(path), set()).add(variable)
    assert reads in ({}, {"csrc/cpu/isa.cpp": {"HIVILT_ISA"}}), reads


def test_settings_are_few_and_documented():
    allowed = runpy.run_path(str(ROOT / "hivilt" / "_settings.py"))["ALLOWED"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(allowed) <= 5
    assert [name for name in allowed if name not in readme] == []


def test_kernels_know_no_torch():
    """csrc/core and the files compiled per instruction set see raw pointers only."""
    wrong = []
    for path in CPP:
        name = relative(path)
        if name.startswith(("csrc/core/", "csrc/cpu/isa/")) or path.suffix == ".inc":
            for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if re.match(r"\s*#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h|omp\.h)", text):
                    wrong.append(f"{name}:{line} {text.strip()}")
    assert not wrong, wrong


def newer_than_triton_3_6(text: str) -> list[str]:
    """Calls in kernels that the oldest Triton we run on does not compile, though the pinned one does: ``len``, of a
    tuple with a None in it, and a device function for a bound of ``static_range``, which has to be a constant."""
    found = []
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                bounds = call.args if ast.unparse(call.func) == "tl.static_range" else []
                inner = [node for bound in bounds for node in ast.walk(bound) if isinstance(node, ast.Call)]
                if ast.unparse(call.func) == "len" or inner:
                    found.append(f"{function.name}: {ast.unparse(call)}")
    return found


def test_kernels_compile_with_the_oldest_triton():
    kernels = "@triton.jit\ndef kernel(x, n: tl.constexpr):\n    for i in tl.static_range({}):\n        pass\n"
    assert [bool(newer_than_triton_3_6(kernels.format(bound))) for bound in ("len(x)", "tl.cdiv(n, 4)", "n // 4")] == [
        True, True, False
    ]  # fmt: skip
    found = {relative(path): newer_than_triton_3_6(path.read_text()) for path in (ROOT / "triton_kernels").glob("*.py")}
    assert not {path: calls for path, calls in found.items() if calls}


def test_cpp_uses_the_stable_abi_only():
    wrong = []
    for path in CPP:
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if include := re.match(r"\s*#\s*include\s*[<\"]((?:torch|ATen|c10)/[^>\"]+)", text):
                if not include[1].startswith(
                    ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
                ):
                    wrong.append(f"{relative(path)}:{line} {include[1]}")
    assert not wrong, wrong


@pytest.mark.parametrize("stem", STEMS)
def test_stem_stands_in_every_room(stem):
    rooms = ["docs/{}.md", "hivilt/reference/{}.py", "csrc/cpu/{}.cpp", "tests/test_{}.py", "bench/bench_{}.py"]
    missing = [room.format(stem) for room in rooms if not (ROOT / room.format(stem)).exists()]
    assert not missing, missing


def test_stems_are_the_families():
    assert STEMS == ["bank_retrieval", "contrastive_loss", "scale_fusion", "token_pool", "topk_attention"]


def test_names_say_what_a_file_holds():
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [relative(path) for path in PYTHON + CPP if path.stem in vague or path.parent.name in vague] == []


def test_no_init_beside_tests_and_benchmarks():
    """One would put the repository root, and with it the bare name triton_kernels, on the import path."""
    assert [name for name in ("tests", "bench") if (ROOT / name / "__init__.py").exists()] == []


def test_no_banned_comments():
    banner = re.compile(r"^\s*(#|//)\s?[-=*~#/]{6,}")
    open_end = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
    wrong = []
    for path in PYTHON + CPP:
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if banner.search(text) or open_end.search(text):
                wrong.append(f"{relative(path)}:{line} {text.strip()[:60]}")
    assert not wrong, "\n".join(wrong)


def test_rulebook_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_hooks_pin_the_versions_that_make_uses():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE))
    hooks = re.findall(r"\[([\w-]+)==([\w.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and all(pins[name] == version for name, version in hooks)


LIBRARY = Path(hivilt.__file__).parent / "_cpu.so"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="no C++ library was built here")
needs_binutils = pytest.mark.skipif(not shutil.which("objdump"), reason="objdump (binutils) is not installed")


@needs_library
@needs_binutils
def test_wide_registers_stay_where_the_cpu_was_asked():
    """zmm registers only in functions of the AVX-512 namespaces, ymm only there and in the AVX2 one: an inline function
    compiled for a newer CPU and shared by the linker would crash older ones."""
    dump = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", LIBRARY], capture_output=True, text=True).stdout
    function, wrong, seen = "", set(), set()
    for line in dump.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1]
        elif "%zmm" in line or "%ymm" in line:
            width = "zmm" if "%zmm" in line else "ymm"
            owners = ("avx512", "avx512_bf16") if width == "zmm" else ("avx2", "avx512", "avx512_bf16")
            seen.add(width)
            if not any(f"hivilt::{isa}::" in function for isa in owners):
                wrong.add(f"{width} in {function}")
    built = info.build_record()["isas"]
    assert seen == ({"ymm", "zmm"} if "avx512" in built else {"ymm"} if "avx2" in built else set())
    assert not wrong, "\n".join(sorted(wrong))


@needs_library
@needs_binutils
def test_library_calls_torch_through_its_c_interface():
    """No C++ symbol of torch: those change with every release, the C ones of the stable ABI do not."""
    table = subprocess.run(["objdump", "-T", "-C", LIBRARY], capture_output=True, text=True).stdout
    wanted = [line for line in table.splitlines() if "*UND*" in line]
    assert any("aoti_torch_library_init_impl" in line for line in wanted)
    assert [line for line in wanted if re.search(r"\b(c10|at|torch)::", line)] == []


@needs_library
@needs_binutils
def test_library_needs_no_python_and_names_no_machine_path():
    needed = re.findall(
        r"NEEDED\s+(\S+)", subprocess.run(["objdump", "-p", LIBRARY], capture_output=True, text=True).stdout
    )
    assert not [
        name for name in needed if name.startswith(("libtorch_python", "libpython", "libtorch_cuda", "libcuda"))
    ]
    assert str(ROOT).encode() not in LIBRARY.read_bytes()
