"""Training: AdamW, a rate that rises and then falls along half a cosine, and steps in parts of a batch.

Every batch follows from seed and step alone, so a run that was cut off goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import KINDS, Scenes, generator, make_questions, make_scenes, render

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # patches or images, words, mask, answers


def learned(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def rate_at(step: int, steps: int, rate: float, warmup: int = 0) -> float:
    """Learning rate of step 0 .. steps - 1: a line over ``warmup`` steps, then half a cosine that ends near 0."""
    if step < warmup:
        return rate * (step + 1) / warmup
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def accumulate_gradient(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Adds to .grad the gradient of the mean loss over all rows of all parts, as one batch of them would; returns that
    loss.  Memory is that of the largest part."""
    rows, total = sum(len(batch[3]) for batch in batches), 0.0
    for patches, words, mask, answers in batches:
        loss = F.cross_entropy(model(patches, words, mask)["logits"], answers, reduction="sum") / rows
        loss.backward()
        total += float(loss.detach())
    return total


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], rate: float, clip: float | None = None
) -> float:
    """One step of the optimizer on the parts of a batch; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradient(model, batches)
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return loss


@dataclass(frozen=True)
class Pool:
    """Scenes and what the frozen encoder makes of their images [M, 16, 40]: images are encoded once, not every step."""

    scenes: Scenes
    patches: Tensor

    def batch(self, size: int, g: torch.Generator) -> Batch:
        """Scenes drawn at random and a new question about each."""
        index = torch.randint(len(self.scenes), (size,), generator=g)
        q = make_questions(self.scenes[index], g)
        return self.patches[index], q.words, q.mask, q.answers


def make_pool(encoder: nn.Module, count: int, *numbers: int, part: int = 256) -> Pool:
    """Renders and encodes ``count`` scenes that follow from the numbers."""
    scenes, patches = make_scenes(count, generator(*numbers)), []
    with torch.no_grad():
        for start in range(0, count, part):
            patches.append(encoder(render(scenes[start : start + part], generator(*numbers, start))))
    return Pool(scenes, torch.cat(patches))


def split(batch: Batch, parts: int) -> list[Batch]:
    return list(zip(*(x.chunk(parts) for x in batch), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, pool: Pool, seed: int, kinds: Iterable[str] = KINDS) -> dict[str, float]:
    """Share of right answers for each kind of question, one question about every scene that allows it."""
    training, found = model.training, {}
    model.eval()
    for kind in kinds:
        q = make_questions(pool.scenes, generator(seed, 5, KINDS.index(kind)), kind)
        right = model(pool.patches, q.words, q.mask)["logits"].argmax(1) == q.answers
        found[kind] = float(right[q.kinds == KINDS.index(kind)].float().mean())
    model.train(training)
    return found
