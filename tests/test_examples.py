"""The demos in examples/ run from start to end, with so few steps that their figures mean nothing."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package, reason="pip install 'hivilt[demo]'")

FOLDER = Path(__file__).resolve().parent.parent / "examples"
DEMOS = {
    "shapes_vqa": (
        "words keep 4",
        "keep 4 from half-time",
        "keep 1 of 16",
        "hierarchical",
        "hierarchical, plain f",
        "mask in training only",
        "never a mask",
    ),
    "two_scales": ("fine patches only", "fine and coarse"),
    "distillation": ("teacher", "student, none", "student, soft", "student, hard"),
    "moving_bank": ("no bank", "topk=64", "all rows (dense)"),
    "caption_retrieval": ("batches of 16",),
    "caption_cache": ("projected again every step", "projected once, then cached"),
}
FLAGS = {"shapes_vqa": ("--all",)}
PICTURES = ("shapes_vqa", "two_scales", "moving_bank")


def test_every_demo_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*DEMOS, "results"}


@pytest.mark.parametrize("name", DEMOS)
def test_demo_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--out", str(tmp_path), *FLAGS.get(name, ())])
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert torch.get_num_threads() == 1
    for row in DEMOS[name]:
        line = next(line for line in printed.splitlines() if line.startswith(f"  {row} "))
        assert all(float(word) >= 0 for word in line[len(row) + 2 :].split())
    assert (tmp_path / f"{name}.png").exists() == (name in PICTURES)


def test_a_table_has_mean_and_deviation_of_the_seeds(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    table = runpy.run_path(str(FOLDER / "results.py"))["table"]
    head, row = table({"a": [{"x": 1.0}, {"x": 2.0}, {"x": 6.0}]}).splitlines()
    assert head.split() == ["x"] and row.split() == ["a", "3.0", "±2.6"]
