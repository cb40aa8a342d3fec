"""A memory of earlier frames: when does retrieval from a feature bank help to recognise what is half hidden, and when
does it hurt?

    python examples/moving_bank.py [--quick] [--out DIR]

400 textured squares move behind a wall with a window: in every frame about two thirds of each square are hidden.  A
tracker is taken for granted: the feature of a frame is the 8 x 8 texture with gray where it is hidden.  The bank is
pushed frame by frame, so a small one holds only the last squares of the last frame.  Later frames are recognised by a
linear classifier (ridge regression), alone or after adding what the bank returns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from results import SEEDS, options, table
from torch import Tensor
from tqdm import tqdm

import hivilt
from hivilt.train.data import generator

SIDE, IDENTITIES, EARLIER, LATER = 8, 400, 20, 4  # frames for the bank, and frames to recognise
SIZES, TOPKS = (100, 400, 1000, 2000, 4000, 8000), (1, 4, 16, 64, None)
TEMPERATURE = 0.05


def frames(textures: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Crops [count, I, 64]: what the window shows of the moving squares, another part in each frame."""
    squares = len(textures)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    start = torch.rand(count, squares, 2, 1, 1, generator=g) * 3.3  # the open window is about 4.7 of 8 pixels a side
    open_y = (y >= start[:, :, 0]) & (y < start[:, :, 0] + 4.7)
    open_x = (x >= start[:, :, 1]) & (x < start[:, :, 1] + 4.7)
    seen = textures.view(-1, SIDE, SIDE) + 0.25 * torch.randn(count, squares, SIDE, SIDE, generator=g)
    return torch.where(open_y & open_x, seen, 0.0).flatten(2)


def ridge_accuracy(train: Tensor, test: Tensor) -> float:
    """Percent right of a linear classifier; both [frames, identities, 64], where the identity is the second axis."""
    repeats, identities, width = train.shape
    x = train.flatten(0, 1)
    weights = torch.linalg.solve(x.T @ x + 1e-1 * torch.eye(width), x.T @ torch.eye(identities).repeat(repeats, 1))
    return 100 * float(((test @ weights).argmax(-1) == torch.arange(identities)).float().mean())


def run(seed: int, identities: int, bar: tqdm) -> dict[str, dict[str, float]]:
    g = generator(seed, 20)
    textures = F.normalize(torch.randn(identities, SIDE**2, generator=g)) * SIDE
    past, train, test = (frames(textures, n, g) for n in (EARLIER, 2 * LATER, LATER))
    alone = ridge_accuracy(F.normalize(train, dim=-1), F.normalize(test, dim=-1))
    found = {"no bank": dict.fromkeys(map(str, SIZES), alone)}
    for size in SIZES:
        for topk in TOPKS:
            bank = hivilt.nn.FeatureBank(size, SIDE**2, topk=topk, scale=1 / TEMPERATURE, normalize=True)
            for frame in past:
                bank.update(frame)
            with torch.no_grad():
                both = [F.normalize(x, dim=-1) + bank(x.flatten(0, 1)).view_as(x) for x in (train, test)]
            found.setdefault(f"topk={topk}" if topk else "all rows (dense)", {})[str(size)] = ridge_accuracy(*both)
            bar.update()
    return found


def draw(rows: dict[str, list[dict[str, float]]], path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    mean = {name: [sum(s[str(m)] for s in seeds) / len(seeds) for m in SIZES] for name, seeds in rows.items()}
    alone = mean.pop("no bank")
    axes.plot(SIZES, alone, color="black", linestyle="--", label="no bank")
    for name, values in mean.items():
        axes.plot(SIZES, values, marker="o", label=name)
    low = min(min(values) for values in mean.values())
    axes.fill_between(SIZES, low - 1, alone, color="#e03131", alpha=0.08)
    axes.text(SIZES[0] * 1.1, low, "here the bank hurts", color="#c92a2a", fontsize=9)
    axes.set(xscale="log", xlabel="rows of the bank", ylabel="recognised, percent", xticks=SIZES, xticklabels=SIZES)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    seeds, identities = (SEEDS[:1], 40) if arguments.quick else (SEEDS, IDENTITIES)
    rows: dict[str, list] = {}
    with tqdm(total=len(seeds) * len(SIZES) * len(TOPKS), desc="reading banks") as bar:
        for seed in seeds:
            for name, found in run(seed, identities, bar).items():
                rows.setdefault(name, []).append(found)
    print(f"\nrecognised in percent, {identities} identities, by rows of the bank, seeds {seeds}")
    print(table(rows))
    path = arguments.out / "moving_bank.png"
    draw(rows, path)
    print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
