"""The README tells the truth: its Python runs, its commands exist, its settings and benchmark figures are real."""

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from hivilt import _settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_order(capsys):
    assert len(BLOCKS) >= 4
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nothing in them may fall back to the reference unnoticed
        if not list((ROOT / "hivilt").glob("_cpu*.so")):
            warnings.simplefilter("ignore", RuntimeWarning)
        for number, block in enumerate(BLOCKS, 1):
            exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert names["out"].isfinite().all()
    printed = capsys.readouterr().out
    assert "replaced" in printed and "can run it" in printed


def test_make_targets_exist():
    targets = re.findall(r"\bmake ([a-z-]+)\b", README)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defined = {name for line in re.findall(r"^([a-z -]+):", makefile, flags=re.MULTILINE) for name in line.split()}
    assert targets and set(targets) <= defined


def test_files_named_exist():
    named = set(re.findall(r"`((?:docs|bench|hivilt|csrc)/[\w./-]+|[A-Z]+(?:\.md)?)`", README))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    files = {name for name in named if "/" in name or name.endswith(".md") or name == "LICENSE"}
    assert files and [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", _settings.ALLOWED)
def test_table_of_variables_has_every_value(name):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    assert [value for value in _settings.ALLOWED[name][0] if f"`{value}`" not in row] == []


def test_benchmark_tables_are_those_of_their_files(monkeypatch):
    """The figures are those of the committed files that the marks name, word for word."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "bench")])
    report = runpy.run_path(str(ROOT / "bench" / "report.py"))
    pairs = report["marked"](README)
    assert pairs, "the marks that bench/report.py fills are gone"
    for form, name, text in (pair.groups() for pair in pairs):
        if name == "none":
            assert text == "Not measured yet."
        else:
            results = report["Results"](ROOT / "bench" / "results" / name)
            assert text == report["FORMS"][form](results, name), name
