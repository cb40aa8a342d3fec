"""python -m hivilt.demo: a whole run, and that its gates and its measurements can fail."""

import copy
import os
import re
import subprocess
import sys

import fresh
import pytest
import torch

import hivilt

for package in ("matplotlib", "PIL", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="pip install 'hivilt[demo]'")

from hivilt.demo.equality import judge, tell  # noqa: E402
from hivilt.demo.measure import extra_memory, table  # noqa: E402
from hivilt.demo.model import CrossModalModel, PlainTopkAttention  # noqa: E402
from hivilt.demo.picture import outline  # noqa: E402

GRID = (4, 6)


def small():
    """A plain model, its inputs, the last two words of one sentence being padding."""
    model = CrossModalModel(9, GRID, 32, 4, 1)
    words = torch.randint(9, (2, 7))
    words[1, 5:] = -1
    return model, torch.rand(2, 24, 768), words


def with_topk(model, topk):
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    for module in plain.modules():
        if type(module) is torch.nn.MultiheadAttention:
            module.__class__, module.topk = PlainTopkAttention, topk
    hivilt.accelerate(ours, topk=topk)
    return plain, ours


def test_a_whole_run(tmp_path):
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    run = subprocess.run(
        [sys.executable, "-m", "hivilt.demo", "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    text = run.stdout
    assert "hivilt.accelerate: 3 replaced, 0 skipped" in text and "patches_to_words    replaced" in text
    assert re.search(r"backend that ran: (cpu|triton|cuda|reference)\n", text)
    for name in ("dense", "top-k"):
        numbers = re.search(rf"^  {name} +(\S+) +(\S+)   \(", text, re.M)
        assert all(float(x) < 1e-4 for x in numbers.groups()), text
    for name in ("torch dense", "hivilt dense", "PyTorch top-16, eager", "hivilt top-16"):
        assert re.search(rf"^  {name} .* ms .*MiB .* ms .*(MiB|n/a)$", text, re.M) or "n/a" in text, text
    picture = tmp_path / "kept_patches.png"
    assert str(picture) in text
    from PIL import Image

    image = Image.open(picture)
    assert image.width > 1000 and image.convert("L").resize((60, 20)).entropy() > 5
    picture = tmp_path / "shapes_vqa.png"
    assert str(picture) in text and re.search(r"^  left of +\d+\.\d%$", text, re.M)
    image = Image.open(picture)
    assert image.width > 1000 and image.convert("L").resize((60, 20)).entropy() > 3


def test_equal_models_pass_and_others_are_refused():
    model, patches, words = small()
    dense = copy.deepcopy(model)
    hivilt.accelerate(dense)
    found = judge(model, dense, patches, words)
    assert 0 < found["plain"][0] < 1e-4 and found["rows"] == 0
    with torch.no_grad():
        dense.layers[0].words_to_patches.out_proj.bias[0] += 1e-4
    with pytest.raises(SystemExit, match="no speed is shown"):
        judge(model, dense, patches, words)


def test_a_wrong_gradient_is_refused():
    model, patches, words = small()
    dense = copy.deepcopy(model)
    hivilt.accelerate(dense)
    dense.layers[0].patches_to_patches.in_proj_weight.register_hook(lambda grad: grad * 1.001)
    with pytest.raises(SystemExit, match="gradients differ"):
        judge(model, dense, patches, words)


def test_topk_models_agree_on_the_same_choice():
    model, patches, words = small()
    plain, ours = with_topk(model, 4)
    tell(plain, ours, patches, words)
    found = judge(plain, ours, patches, words)
    assert found["rows"] == 4 * 2 * (7 + 24 + 24) and found["differ"] <= 2
    told = plain.layers[0].patches_to_patches.told
    best, worst = told[0, 0, 0].tolist(), [j for j in range(24) if j not in told[0, 0, 0]]
    told[0, 0, 0] = torch.tensor(worst[:4])
    assert best != worst[:4]
    with pytest.raises(SystemExit, match="no speed is shown"):
        judge(plain, ours, patches, words)


def test_a_selection_that_is_not_the_best_is_refused():
    """Both models may agree with each other and still keep the wrong keys."""
    model, patches, words = small()
    plain, ours = with_topk(model, 4)
    for layer in ours.layers:
        layer.patches_to_patches.select = "raw"
    tell(plain, ours, patches, words)
    attention = plain.layers[0].patches_to_patches
    attention.told = attention.told.expand(-1, 4, -1, -1)  # one choice for all heads
    with pytest.raises(SystemExit, match="a kept score falls short of the best"):
        judge(plain, ours, patches, words)


def test_extra_memory_sees_what_is_freed_again():
    def work():
        torch.ones(10 * 2**20)  # 40 MiB, gone when the call returns

    work()
    size = extra_memory(work)
    if size is None:
        pytest.skip("this system keeps no high-water mark of memory that can be reset")
    assert 36 * 2**20 < size < 60 * 2**20


def test_the_table_compares_within_a_pair():
    cells = {}
    for name, ms in (("slow", [10.0, 20.0, 30.0]), ("fast", [5.0, 10.0, 10.0])):
        cells[name, "inference"] = {"ms": ms, "bytes": 2**21}
        cells[name, "training step"] = {"ms": ms, "bytes": None}
    head, slow, fast = table(cells, [("slow", "fast")]).splitlines()
    assert slow.split()[:2] == ["slow", "20"] and "x" not in slow
    assert fast.count("2.00x") == 2 and "2 MiB" in fast and "n/a" in fast and "memory" in head


def test_outline_runs_around_a_region():
    import numpy as np

    inside = np.zeros((4, 5), dtype=bool)
    inside[1, 1:3] = True
    segments = outline(inside)
    assert len(segments) == 6  # two patches side by side have a perimeter of six edges
    points = np.array(segments)
    assert points[..., 0].min() == 15.5 and points[..., 0].max() == 47.5
    assert points[..., 1].min() == 15.5 and points[..., 1].max() == 31.5


def test_without_its_packages_the_error_says_what_to_install():
    code = "import sys; sys.modules['tqdm'] = None; import hivilt.demo"
    run = fresh.run(code)
    assert run.returncode == 1 and "ImportError" in run.stderr and "pip install 'hivilt[demo]'" in run.stderr
