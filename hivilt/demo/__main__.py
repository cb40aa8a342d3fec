"""Runs the main job from photographs to table and picture; see hivilt.demo."""

from __future__ import annotations

import argparse
import copy
import platform
import re
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import hivilt

from .equality import BUDGET, FLOOR, judge, tell
from .inputs import load, teach
from .measure import measure, table
from .model import CrossModalModel, PlainTopkAttention
from .picture import draw
from .shapes import learn_shapes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hivilt.demo", description=hivilt.demo.__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="smaller pictures and model, fewer rounds: a few seconds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    probe = torch.ones(1, 1, 2, 2)
    hivilt.topk_attention(probe, probe, probe, 1)
    kernels = hivilt.last_backend() != "reference"
    small = options.quick or not kernels
    grid, width, heads, layers = ((13, 20), 128, 4, 1) if small else ((26, 40), 256, 8, 2)
    topk, rounds, steps = (16, 3, 60) if small else (32, 7, 80)

    torch.manual_seed(0)
    photos, patches, words, vocabulary = load(grid)
    plain = CrossModalModel(len(vocabulary), grid, width, heads, layers)
    teach(plain, patches, words, vocabulary, grid, steps)
    longest = words.shape[1]
    print(
        f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"hivilt {hivilt.__version__}\n"
        f"{len(patches)} pictures of {patches.shape[1]} patches, {len(patches)} texts of up to {longest} words; "
        f"width {width}, {heads} heads, {layers} layer{'s' * (layers > 1)}, float32\n"
        f"Weights are random, except that {steps} steps of plain PyTorch taught the first word-to-patch attention the "
        "colours of nine words.\n"
    )

    dense, fast, slow = (copy.deepcopy(plain) for _ in range(3))
    hivilt.accelerate(dense)
    report = hivilt.accelerate(fast, topk=topk)
    for module in slow.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__, module.topk = PlainTopkAttention, topk
    print(f"model = CrossModalModel(...); report = hivilt.accelerate(model, topk={topk})\n{report}")

    two = patches[:2], words[:2]  # float64 top-k as written in PyTorch is large: two pictures are enough to judge
    with tqdm(total=3, desc="comparing with float64", leave=False) as bar:
        same = {"dense": judge(plain, dense, *two)}
        bar.update()
        tell(slow, fast, *two)
        bar.update()
        same["top-k"] = judge(slow, fast, *two)
        bar.update()
    print(f"backend that ran: {hivilt.last_backend()}\n")
    print(f"largest difference, hivilt and PyTorch   outputs  gradients   (from float64: hivilt {'/ PyTorch':<12})")
    for name, found in same.items():
        (a, b), (c, d), (e, f) = (found[key] for key in ("apart", "hivilt", "plain"))
        print(f"  {name:<38}{a:>9.1e}{b:>11.1e}   ({c:.1e}, {d:.1e} / {e:.1e}, {f:.1e})")
    rows, differ = same["top-k"]["rows"], same["top-k"]["differ"]
    print(
        f"  gradients in units of each parameter's largest; allowed from float64: {BUDGET:g}x PyTorch's + {FLOOR:g}\n"
        f"  top-k is compared on the same kept keys; rounding makes float64 keep others in {differ} of {rows} rows\n"
    )

    for module in slow.modules():
        if isinstance(module, PlainTopkAttention):
            module.told = None
    names = ["torch dense", "hivilt dense", f"PyTorch top-{topk}, eager", f"hivilt top-{topk}"]
    models = dict(zip(names, (plain, dense, slow, fast), strict=True))
    # Measuring trains, so the picture comes first.
    path = options.out / "kept_patches.png"
    draw(fast, photos, patches, words, vocabulary, grid, path)
    found = measure(models, patches, words, rounds)
    print(table(found, [tuple(names[:2]), tuple(names[2:])]))
    rounds = len(found[names[0], "inference"]["ms"])
    print(
        f"  whole model, batch {len(patches)}; median of {rounds} interleaved rounds ± half the quartile distance; "
        "faster than the line above\n  memory: growth of the process at its peak, beyond model and inputs"
    )
    if not kernels:
        print("  all of it ran on the PyTorch reference, there for correctness: python -m hivilt.info says why")
    print(f"\npicture of the patches each word keeps: {path}\n")

    path = options.out / "shapes_vqa.png"
    print(learn_shapes(path, steps=2 if options.quick else 500))
    print(f"picture of the patches each word of a question keeps: {path}")


def machine() -> str:
    """The processor's name where Linux tells it."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
