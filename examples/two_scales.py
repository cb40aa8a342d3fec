"""What a coarse scale is for: the label of a patch is its fine texture XOR the brightness of the 64-pixel block around.

    python examples/two_scales.py [--quick] [--out DIR]

Images of 256 x 256 pixels: stripes that lie or stand in every patch of 16 pixels, 4 x 4 blocks that are bright or
dark.  The brightness of a block shows in a single one of its 16 patches, the others are as bright as ever: whoever sees
fine patches alone can only guess.  The coarse tokens, one for each block, know it, and CrossScaleFusion brings them to
the fine grid.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from results import SEEDS, options, table
from torch import Tensor, nn
from tqdm import tqdm

from hivilt.nn import CrossScaleFusion, HierarchicalPatchEmbedding
from hivilt.train.data import generator

FINE, COARSE, SIDE, WIDTH = 16, 64, 256, 48
GRIDS = ((SIDE // FINE,) * 2, (SIDE // COARSE,) * 2)
INSIDE = COARSE // FINE  # fine patches along a block
KINDS = {"fine patches only": 1, "fine and coarse": 2}


def make_images(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 256, 256] and the labels of their patches [B, 256]."""
    (fine, _), (coarse, _) = GRIDS
    stand = torch.randint(2, (count, fine, fine), generator=g)
    bright = torch.randint(2, (count, coarse, coarse), generator=g)
    line = torch.arange(FINE) // 4 % 2 * 2.0 - 1
    stripes = torch.stack([line[:, None].expand(FINE, FINE), line.expand(FINE, FINE)])[stand]
    lamp = F.one_hot(torch.randint(INSIDE**2, bright.shape, generator=g), INSIDE**2) * (2 * bright - 1)[..., None]
    lamp = lamp.unflatten(3, (INSIDE, INSIDE)).transpose(2, 3).reshape(count, fine, fine)
    images = 0.5 * stripes + 2.0 * lamp[..., None, None]
    images = images.transpose(2, 3).reshape(count, 1, SIDE, SIDE)
    images = images + 0.3 * torch.randn(images.shape, generator=g)
    around = bright.repeat_interleave(INSIDE, 1).repeat_interleave(INSIDE, 2)
    return images, (stand ^ around).flatten(1)


class Labels(nn.Module):
    """A label for each fine patch, of tokens of one scale or of two."""

    def __init__(self, scales: int):
        super().__init__()
        sizes, self.grids = (FINE, COARSE)[:scales], GRIDS[:scales]
        self.embed = nn.ModuleList(
            HierarchicalPatchEmbedding(1, WIDTH, size, pos_grid=grid)
            for size, grid in zip(sizes, self.grids, strict=True)
        )
        self.fusion = CrossScaleFusion(2 * WIDTH, scales, dropout=0.0, dims=[WIDTH] * scales)
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.fusion([embed(images) for embed in self.embed], self.grids))


def learn(scales: int, seed: int, steps: int, batch: int, bar: tqdm) -> tuple[dict[str, float], Tensor]:
    """Columns in percent, and how often each place [16, 16] was right."""
    torch.manual_seed(seed)
    model, start = Labels(scales), time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 10, 3 * (steps - step) / steps)
        images, labels = make_images(batch, generator(seed, 40, step))
        loss = F.cross_entropy(model(images).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
    seconds = time.process_time() - start
    with torch.no_grad():
        images, labels = make_images(4 * batch, generator(seed, 41))
        right = (model.eval()(images).argmax(-1) == labels).float().unflatten(1, GRIDS[0])
    place = torch.arange(GRIDS[0][0]) % INSIDE
    middle = (place > 0) & (place < INSIDE - 1)
    found = {
        "all patches": right.mean(),
        "in the middle": right[:, middle][:, :, middle].mean(),
        "in the corners": right[:, ~middle][:, :, ~middle].mean(),
    }
    return {**{name: 100 * float(x) for name, x in found.items()}, "CPU s": seconds}, 100 * right.mean(0)


def draw(maps: dict[str, list[Tensor]], path) -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 3)
    image = make_images(1, generator(1, 42))[0][0, 0]
    axes[0].imshow(image, cmap="gray")
    axes[0].set_title("an image; blocks framed", fontsize=10)
    for place in range(0, SIDE + 1, COARSE):
        axes[0].axhline(place - 0.5, color="#ffe066"), axes[0].axvline(place - 0.5, color="#ffe066")
    for axis, (name, seeds) in zip(axes[1:], maps.items(), strict=True):
        drawn = axis.imshow(torch.stack(seeds).mean(0), cmap="viridis", vmin=50, vmax=100)
        axis.set_title(f"{name}: right, percent", fontsize=10)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes[1:])
    figure.savefig(path, dpi=80)


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    seeds, steps, batch = (SEEDS[:1], 3, 2) if arguments.quick else (SEEDS, 120, 16)
    rows: dict[str, list] = {name: [] for name in KINDS}
    maps: dict[str, list] = {name: [] for name in KINDS}
    with tqdm(total=len(seeds) * len(KINDS) * steps, desc="training") as bar:
        for seed in seeds:
            for name, scales in KINDS.items():
                found, right = learn(scales, seed, steps, batch, bar)
                rows[name].append(found)
                maps[name].append(right)
    print(f"\nright labels in percent, {4 * batch} new images of 256 patches, {steps} steps, seeds {seeds}")
    print(table(rows))
    path = arguments.out / "two_scales.png"
    draw(maps, path)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main()
