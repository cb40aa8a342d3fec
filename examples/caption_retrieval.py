"""Finding the caption of an image and the image of a caption: two encoders taught by the contrastive loss.

    python examples/caption_retrieval.py [--quick] [--out DIR]

600 captions such as "red square left of blue circle"; images of each are rendered anew all the time.  100 captions are
never trained on.  Right is the one caption of all 600 (the one image of 600), so chance is 0.2 percent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from results import SEEDS, options, table
from torch import Tensor, nn
from tqdm import tqdm

from hivilt.losses import contrastive_loss
from hivilt.train.data import COLORS, GRID, SHAPES, Scenes, generator, render
from hivilt.train.loop import learned, rate_at
from hivilt.train.model import FEATURES, PLACE, PatchEncoder

# (shape, colour, shape, colour) of every caption; the two objects share neither shape nor colour
CAPTIONS = torch.tensor([
    (s, c, t, d)
    for s in range(len(SHAPES)) for t in range(len(SHAPES)) if s != t
    for c in range(len(COLORS)) for d in range(len(COLORS)) if c != d
])  # fmt: skip
HELD_OUT = 100


def scenes_of(captions: Tensor, g: torch.Generator) -> Scenes:
    """Scenes that the captions describe: the first object stands in a column left of the second's."""
    B, most = len(captions), len(SHAPES)
    rows = torch.randint(GRID, (2, B), generator=g)
    columns = torch.rand(B, GRID, generator=g).argsort(1)[:, :2].sort(1)[0].T
    cells, shapes, colors = (torch.zeros(B, most, dtype=torch.long) for _ in range(3))
    for j in range(2):
        cells[:, j] = rows[j] * GRID + columns[j]
        shapes[:, j], colors[:, j] = captions[:, 2 * j], captions[:, 2 * j + 1]
    return Scenes(cells, shapes, colors, torch.full((B,), 2))


class TwoEncoders(nn.Module):
    """Patches through an MLP each, then their sum; the words of a caption, side by side, through another MLP."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.Linear(FEATURES + PLACE, width), nn.ReLU(), nn.Linear(width, width))
        self.image = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))
        self.word = nn.ModuleList(nn.Embedding(n, 32) for n in (len(SHAPES), len(COLORS)) * 2)
        self.text = nn.Sequential(nn.Linear(128, width), nn.ReLU(), nn.Linear(width, 64))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def images(self, patches: Tensor) -> Tensor:
        return F.normalize(self.image(self.patch(patches).sum(1)), dim=-1)

    def texts(self, captions: Tensor) -> Tensor:
        words = [embed(captions[:, i]) for i, embed in enumerate(self.word)]
        return F.normalize(self.text(torch.cat(words, 1)), dim=-1)


@torch.no_grad()
def recalls(model: TwoEncoders, patches: Tensor, unseen: Tensor) -> dict[str, float]:
    """R@1 in percent among all captions and images, of those trained on and of those never seen."""
    likeness = model.images(patches) @ model.texts(CAPTIONS).T
    right = {"image to text": likeness.argmax(1), "text to image": likeness.argmax(0)}
    found = {}
    for name, best in right.items():
        hit = (best == torch.arange(len(CAPTIONS))).float()
        found |= {
            name: 100 * float(hit[~unseen].mean()),
            "(unseen)" + " " * len(found): 100 * float(hit[unseen].mean()),
        }
    return found


def learn(seed: int, encoder: PatchEncoder, steps: int, batch: int, bar: tqdm) -> dict[str, float]:
    torch.manual_seed(seed)
    g = generator(seed, 30)
    order = torch.randperm(len(CAPTIONS), generator=g)
    trained, unseen = order[HELD_OUT:], torch.zeros(len(CAPTIONS), dtype=torch.bool)
    unseen[order[:HELD_OUT]] = True

    def encoded(captions: Tensor) -> Tensor:
        with torch.no_grad():
            return encoder(render(scenes_of(captions, g), g))

    pictures = torch.stack([encoded(CAPTIONS) for _ in range(6)])  # six images of each caption
    model = TwoEncoders()
    optimizer = torch.optim.AdamW(learned(model), 3e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate_at(step, steps, 3e-3, 20)
        index = trained[torch.randperm(len(trained), generator=g)[:batch]]  # all different: no false negatives
        which = torch.randint(len(pictures), (len(index),), generator=g)
        scale = model.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(model.images(pictures[which, index]), model.texts(CAPTIONS[index]), scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
    return recalls(model, encoded(CAPTIONS), unseen)


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    seeds, batches, steps = (SEEDS[:1], (16,), 3) if arguments.quick else (SEEDS, (32, 256), 400)
    torch.manual_seed(0)
    encoder = PatchEncoder()
    encoder.fit(0, 3 if arguments.quick else 200)
    rows: dict[str, list] = {}
    with tqdm(total=len(seeds) * len(batches) * steps, desc="training") as bar:
        for batch in batches:
            rows[f"batches of {batch}"] = [learn(seed, encoder, steps, batch, bar) for seed in seeds]
    print(f"\nR@1 in percent among {len(CAPTIONS)} captions, {HELD_OUT} never trained on; {steps} steps, seeds {seeds}")
    print(table(rows))


if __name__ == "__main__":
    main()
