"""`python -m hivilt.info`, the settings it shows, and the optional host module behind it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

import hivilt
from hivilt import info

SETTINGS_FILE = Path(info.__file__).with_name("_settings.py")


def run_info(**variables: str) -> subprocess.CompletedProcess:
    kept = {name for name in os.environ if not name.startswith("HIVILT_")}
    return fresh.module("hivilt.info", **dict.fromkeys(os.environ.keys() - kept, None), **variables)


def load_settings(monkeypatch, **variables: str):
    """A private copy of the settings, read from these variables alone."""
    for name in [name for name in os.environ if name.startswith("HIVILT_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("settings_under_test", SETTINGS_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_info_prints_every_part():
    done = run_info()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for heading in ("versions", "processor", "gpu", "backends", "build", "variables"):
        assert heading in lines
    assert any(line.split()[:2] == ["hivilt", hivilt.__version__] for line in lines)
    assert any(line.split()[:4] == ["reference", "on", "cpu", "available"] for line in lines)
    assert any(line.startswith("  cuda on cpu") and "no: " in line for line in lines)
    both = [name for name in info.build_record().get("isas", []) if name in info.isas_supported()]
    assert any(line.startswith(f"  isa in use         {both[-1] if both else 'none'}") for line in lines)


def test_info_takes_no_arguments(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["info", "nonsense"])
    with pytest.raises(SystemExit):
        info.main()
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_info_shows_variables_in_force(isa):
    if isa not in info.build_record().get("isas", []) or isa not in info.isas_supported():
        pytest.skip(f"{isa} was not built or this CPU lacks it")
    done = run_info(HIVILT_ISA=isa, HIVILT_BACKEND="reference", HIVILT_LOG="dispatch")
    assert f"  isa in use         {isa}\n" in done.stdout, done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  HIVILT_"))
    assert shown["HIVILT_BACKEND"] == "reference"
    assert shown["HIVILT_LOG"] == "dispatch"
    assert shown["HIVILT_STRICT"] == "not set"


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("HIVILT_BACKEND", "gpu", "expected one of auto, reference, cpu, triton, cuda; got 'gpu'"),
        ("HIVILT_ISA", "AVX2", "expected one of scalar, avx2, avx512, avx512_bf16; got 'AVX2'"),
        ("HIVILT_STRICT", "yes", "expected one of 0, 1; got 'yes'"),
        ("HIVILT_LOG", "1", "expected one of dispatch; got '1'"),
        ("HIVILT_BACKENDS", "cpu", "did you mean HIVILT_BACKEND?"),
    ],
)
def test_unknown_variable_raises(monkeypatch, name, value, wanted):
    with pytest.raises(ValueError, match="environment variable") as caught:
        load_settings(monkeypatch, **{name: value})
    assert name in str(caught.value) and wanted in str(caught.value)


def test_unknown_variable_stops_the_import():
    done = run_info(HIVILT_BACKEND="gpu")
    assert done.returncode != 0
    assert "ValueError: environment variable HIVILT_BACKEND: expected one of" in done.stderr


def test_settings_defaults(monkeypatch):
    settings = load_settings(monkeypatch)
    assert (settings.backend(), settings.isa(), settings.strict(), settings.log_dispatch()) == (
        "auto",
        None,
        False,
        False,
    )
    assert settings.cuda() == "auto" and settings.in_force() == {}


def test_settings_are_read_again_on_request(monkeypatch):
    settings = load_settings(monkeypatch, HIVILT_BACKEND="reference", HIVILT_STRICT="1", HIVILT_ISA="")
    assert settings.backend() == "reference" and settings.strict() and settings.isa() is None
    monkeypatch.setenv("HIVILT_BACKEND", "cpu")
    assert settings.backend() == "reference"
    settings.refresh()
    assert settings.backend() == "cpu"
    monkeypatch.setenv("HIVILT_BACKEND", "nonsense")
    with pytest.raises(ValueError):
        settings.refresh()
    assert settings.backend() == "cpu", "a refused environment changes nothing"


def test_host_module_agrees_with_the_record():
    host = pytest.importorskip("hivilt._C", reason="the optional host module was not built here")
    record, answer = info.build_record(), host.build_info()
    for name in ("version", "isas", "flags", "torch_target", "cuda_archs"):
        assert answer[name] == record[name], name
    assert answer["compiler"]


def test_features_without_host_module(monkeypatch):
    """/proc/cpuinfo gives the same answer as cpuid."""
    host = pytest.importorskip("hivilt._C", reason="the optional host module was not built here")
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    monkeypatch.setitem(sys.modules, "hivilt._C", None)  # an import of it now raises ImportError
    monkeypatch.delattr(hivilt, "_C", raising=False)
    assert set(info.cpu_features()) == set(host.cpu_features())
