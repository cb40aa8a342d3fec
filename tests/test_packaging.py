"""What installs: one top-level name, the reference without any compiler, an import that changes nothing."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import hivilt

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "hivilt", "triton_kernels", "csrc")

pytest.importorskip("setuptools", minversion="77", reason="builds a wheel; setuptools>=77 is a build dependency only")


def copy_tree(target: Path) -> Path:
    """The sources as a fresh checkout holds them, without anything that was built."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    for name in SHIPPED:
        source = ROOT / name
        shutil.copytree(source, target / name, ignore=ignore) if source.is_dir() else shutil.copy(source, target / name)
    return target


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HIVILT_", "PYTHON"))}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **more}


def run_python(code: str, path: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that imports hivilt from `path`, started in an empty folder."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=clean_environment(PYTHONPATH=str(path), **environment),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """(wheel, output of the build) of a build that finds no compiler."""
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    out = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=clean_environment(CXX="/nonexistent/c++"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl")), done.stderr


@pytest.fixture(scope="module")
def site(pure_wheel, tmp_path_factory):
    """The pure-Python wheel, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(pure_wheel[0]).extractall(folder)
    return folder


def test_wheel_holds_one_top_level_name(pure_wheel):
    names = zipfile.ZipFile(pure_wheel[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hivilt"}
    assert "hivilt/triton_kernels/__init__.py" in names
    for room in ("ops", "reference", "nn"):
        assert any(name.startswith(f"hivilt/{room}/") for name in names), room
    assert not [name for name in names if name.endswith((".cpp", ".h", ".inc", ".so"))]


def test_build_without_compiler_says_what_it_skipped(pure_wheel):
    wheel, said = pure_wheel
    assert "skipped _cpu: no C++ compiler: CXX=/nonexistent/c++ does not exist" in said
    record = json.loads(zipfile.ZipFile(wheel).read("hivilt/_build_info.json"))
    assert record["built"] == [] and record["isas"] == []
    assert set(record["skipped"]) == {"_cpu", "_C", "cuda"}


def test_strict_build_without_compiler_fails(tmp_path):
    tree = copy_tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=clean_environment(CXX="/nonexistent/c++", HIVILT_STRICT="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "_cpu was not built and HIVILT_STRICT=1 is set" in done.stderr


def test_pure_wheel_runs_on_the_reference(site, tmp_path):
    done = run_python(
        """
        import torch, hivilt
        query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
        out = hivilt.ops.topk_attention(query.requires_grad_(), key, key, topk=3, backend="reference")
        out.sum().backward()
        assert out.isfinite().all() and query.grad.isfinite().all()
        assert hivilt.last_backend() == "reference", hivilt.last_backend()
        try:
            hivilt.ops.topk_attention(query, key, key, topk=3, backend="cpu")
        except hivilt.BackendError as error:
            print(error)
        print(hivilt.__file__)
        """,
        site,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    reason, where = done.stdout.strip().rsplit("\n", 1)
    assert "cpu" in reason
    assert Path(where).is_relative_to(site)


def test_pure_wheel_falls_back_and_says_so(site, tmp_path):
    code = """
        import torch, hivilt
        x = torch.randn(1, 1, 4, 8)
        first = hivilt.ops.topk_attention(x, x, x, topk=2)
        again = hivilt.ops.topk_attention(x, x, x, topk=2)
        assert hivilt.last_backend() == "reference" and torch.equal(first, again)
        """
    done = run_python(code, site, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning") == 1, done.stderr
    strict = run_python(code, site, tmp_path, HIVILT_STRICT="1")
    assert strict.returncode != 0 and "BackendError" in strict.stderr


def test_triton_kernels_has_one_name(site, tmp_path):
    done = run_python("import hivilt.triton_kernels as t; print(t.__name__)", site, tmp_path)
    assert done.stdout.strip() == "hivilt.triton_kernels", done.stderr
    bare = run_python("import triton_kernels", ROOT, tmp_path)
    assert bare.returncode != 0 and "it was imported as `triton_kernels`" in bare.stderr


def test_import_changes_nothing(site, tmp_path):
    """No file is written, no process started, no connection opened; generator, threads, defaults and modes stay."""
    done = run_python(
        """
        import os, random, sys
        import numpy, torch

        def state():
            return (
                torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
                torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
                torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision(), dict(os.environ), os.getcwd(), list(sys.path),
                torch.cuda.is_initialized(),
            )

        done = []
        banned = {"subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "socket.connect", "os.mkdir"}
        def watch(event, arguments):
            if event in banned or event == "open" and (arguments[1] or "r")[0] in "wax+":
                done.append((event, arguments))

        before, loaded = state(), set(sys.modules)
        sys.addaudithook(watch)
        import hivilt
        effects = list(done)
        assert not effects, effects
        assert state() == before
        heavy = {"triton", "sklearn", "matplotlib", "PIL", "transformers", "torch._dynamo", "torch._inductor", "tqdm"}
        assert not heavy & (set(sys.modules) - loaded), heavy & (set(sys.modules) - loaded)
        """,
        site,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_version_is_the_same_everywhere(pure_wheel):
    """In the wheel's name, its record of the build, the package and the changelog."""
    record = json.loads(zipfile.ZipFile(pure_wheel[0]).read("hivilt/_build_info.json"))
    assert record["version"] == hivilt.__version__
    assert pure_wheel[0].name.startswith(f"hivilt-{hivilt.__version__}-")
    assert f"[{hivilt.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_sdist_holds_the_headers(tmp_path):
    tree = copy_tree(tmp_path)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted |= {"setup.py", "hivilt/_settings.py", "triton_kernels/__init__.py"}
    assert wanted <= names, wanted - names
