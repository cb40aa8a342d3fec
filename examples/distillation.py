"""Does a small vision transformer learn more from a convolutional teacher than from the labels alone?

    python examples/distillation.py [--quick] [--out DIR]

The task is the shape, one of five, in noisy pictures of 16 x 16 pixels, of which only few have a label.  The teacher, a
small CNN, learns from the same few.  The student is DeiT with its distillation token; pictures are moved by up to two
pixels at random, and the teacher judges what the student sees.  "hard": the token learns the teacher's answer.  "soft":
its probabilities at temperature 3.  "none": both classifiers learn the labels.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from results import SEEDS, options, table
from torch import Tensor, nn
from tqdm import tqdm

from hivilt.losses import distillation_loss
from hivilt.models import DeiT
from hivilt.train.data import CELL, COLORS, SHAPES, draw_cells, generator

MODES = ("none", "soft", "hard")
NOISE = 0.12


def make_pictures(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, 16, 16] around 0 and their shapes [B]."""
    shapes, colors = (torch.randint(len(names), (count,), generator=g) for names in (SHAPES, COLORS))
    cells = draw_cells(shapes, colors, 0.80 + 0.16 * torch.rand(count, 1, 1, 1, generator=g), g)
    return cells - 0.5 + NOISE * torch.randn(cells.shape, generator=g), shapes


def moved(pictures: Tensor, g: torch.Generator) -> Tensor:
    """The whole batch moved by up to two pixels; edges are repeated."""
    y, x = torch.randint(5, (2,), generator=g).tolist()
    return F.pad(pictures, (2, 2, 2, 2), mode="replicate")[:, :, y : y + CELL, x : x + CELL]


def make_teacher() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (CELL // 4) ** 2, len(SHAPES)),
    )  # fmt: skip


def make_student() -> DeiT:
    return DeiT(
        image_size=CELL, patch_size=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=96, num_labels=len(SHAPES),
    )  # fmt: skip


def teach(model: nn.Module, loss_of, labelled: tuple[Tensor, Tensor], seed: int, steps: int, bar: tqdm) -> float:
    """Trains on random batches of the labelled pictures; returns processor seconds."""
    pictures, labels = labelled
    start, optimizer = time.process_time(), torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 3 * (steps - step) / steps)
        g = generator(seed, 51, step)
        index = torch.randint(len(labels), (64,), generator=g)
        loss = loss_of(moved(pictures[index], g), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
    return time.process_time() - start


def run(seed: int, count: int, steps: int, bar: tqdm) -> dict[str, dict[str, float]]:
    """Percent right of the teacher and of a student for each mode, on new pictures and on the labelled ones."""
    torch.manual_seed(seed)
    labelled, new = make_pictures(count, generator(seed, 50)), make_pictures(2048, generator(seed, 52))
    teacher, found = make_teacher(), {}

    @torch.no_grad()
    def marks(answer, seconds: float) -> dict[str, float]:
        two = {"new pictures": new, "labelled ones": labelled}
        right = {name: 100 * float((answer(x).argmax(1) == y).float().mean()) for name, (x, y) in two.items()}
        return {**right, "CPU s": seconds}

    seconds = teach(teacher, lambda x, y: F.cross_entropy(teacher(x), y), labelled, seed, steps, bar)
    found["teacher"] = marks(teacher.eval(), seconds)
    for mode in MODES:
        torch.manual_seed(seed)
        student = make_student()

        def loss_of(x: Tensor, y: Tensor, student: DeiT = student, mode: str = mode) -> Tensor:
            out = student(x)
            one, other = out["cls_logits"], out["distillation_logits"]
            if mode == "none":
                return (F.cross_entropy(one, y) + F.cross_entropy(other, y)) / 2
            with torch.no_grad():
                judged = teacher(x)
            return distillation_loss(one, other, judged, y, mode=mode, tau=3.0)

        seconds = teach(student, loss_of, labelled, seed, steps, bar)
        found[f"student, {mode}"] = marks(lambda x, student=student: student(x)["logits"], seconds)
    return found


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    seeds, steps, count = (SEEDS[:1], 3, 64) if arguments.quick else (SEEDS, 300, 400)
    rows: dict[str, list] = {}
    with tqdm(total=len(seeds) * (1 + len(MODES)) * steps, desc="training") as bar:
        for seed in seeds:
            for name, found in run(seed, count, steps, bar).items():
                rows.setdefault(name, []).append(found)
    print(f"\nright shapes in percent, {count} labelled pictures, {steps} steps, seeds {seeds}")
    print(table(rows))


if __name__ == "__main__":
    main()
