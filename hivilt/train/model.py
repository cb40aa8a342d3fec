"""The model of the shapes: a small patch encoder that is fitted to single cells beforehand and then frozen, word
vectors that are drawn once and frozen, and what learns, fusion and head of VQAFusionModel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.models import VQAFusionModel
from ..reference.modules import MultimodalFusion
from ..swap import accelerate
from .config import Config
from .data import ANSWERS, CELL, COLORS, GRID, LONGEST, SHAPES, WORDS, add_noise, draw_cells, generator

FEATURES, PLACE = 32, 8  # channels of a patch: what it shows, where it is
ATTENTION = "fusion.text_to_image_attention"  # whose topk says how many patches a word keeps


class PatchEncoder(nn.Module):
    """Images [B, 3, 64, 64] to a token for each cell [B, 16, 40]: 32 features of its pixels, 8 of its place.

    ``fit`` teaches the features colour and shape of single cells in a few seconds.  After that nothing learns here: the
    part that a pretrained backbone has in a larger model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * (CELL // 4) ** 2, FEATURES), nn.Tanh(),
        )  # fmt: skip
        self.color, self.shape = nn.Linear(FEATURES, len(COLORS) + 1), nn.Linear(FEATURES, len(SHAPES) + 1)
        y, x = (v.flatten() / (GRID - 1) * math.pi for v in torch.meshgrid(*[torch.arange(GRID)] * 2, indexing="ij"))
        place = [f(n * v) for v in (y, x) for n in (1, 2) for f in (torch.cos, torch.sin)]
        self.register_buffer("place", torch.stack(place, 1))

    def forward(self, images: Tensor) -> Tensor:
        cells = images.unflatten(3, (GRID, CELL)).unflatten(2, (GRID, CELL)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        features = self.pixels(cells - 0.5).view(len(images), GRID**2, FEATURES)
        return torch.cat([features, self.place.expand(len(images), -1, -1)], -1)

    def fit(self, seed: int, steps: int = 300, batch: int = 256) -> float:
        """Trains the features. Returns the share of 1024 fresh objects whose colour and shape are both read rightly."""
        optimizer = torch.optim.Adam(self.parameters(), 4e-3)
        self.train().requires_grad_(True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
            cells, shapes, colors = single_cells(batch, generator(seed, 1, step))
            features = self.pixels(cells - 0.5)
            loss = F.cross_entropy(self.color(features), colors) + F.cross_entropy(self.shape(features), shapes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.eval().requires_grad_(False)
        cells, shapes, colors = single_cells(1024, generator(seed, 2))
        features = self.pixels(cells - 0.5)
        return float(
            ((self.color(features).argmax(1) == colors) & (self.shape(features).argmax(1) == shapes)).float().mean()
        )


def single_cells(count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Cells [B, 3, 16, 16], their shapes and colours [B]; one in eight is empty and has the numbers after the last."""
    shapes, colors = (torch.randint(len(names), (count,), generator=g) for names in (SHAPES, COLORS))
    ground = 0.80 + 0.16 * torch.rand(count, 1, 1, 1, generator=g)
    cells = draw_cells(shapes, colors, ground, g)
    empty = torch.arange(count) < count // 8
    cells = torch.where(empty[:, None, None, None], ground, cells)
    return add_noise(cells, g), torch.where(empty, len(SHAPES), shapes), torch.where(empty, len(COLORS), colors)


class WordVectors(nn.Module):
    """input_ids [B, N] to [B, N, C]: a random vector for each word and one for each place in the sentence."""

    def __init__(self, hidden_dim: int, g: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("words", torch.randn(len(WORDS), hidden_dim, generator=g))
        self.register_buffer("places", torch.randn(LONGEST, hidden_dim, generator=g))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.words[input_ids] + self.places[: input_ids.shape[1]]


def build(config: Config, encoder: PatchEncoder | None = None) -> VQAFusionModel:
    """The model of a configuration, on hivilt's modules; the same numbers for the same seed.

    encoder: a fitted one; without it, one that still needs fit() or the weights of a checkpoint.
    """
    m = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, 0).initial_seed())
        vision = PatchEncoder() if encoder is None else encoder
        text = WordVectors(m.hidden_dim, generator(config.seed, 3))
        fusion = MultimodalFusion(
            m.hidden_dim, FEATURES + PLACE, m.num_heads, 2 * m.hidden_dim,
            image_to_text=m.image_to_text, residual=m.residual,
        )  # fmt: skip
        model = VQAFusionModel(vision, text, fusion, len(ANSWERS))
    accelerate(model, topk={ATTENTION: m.topk or None})
    return model


@torch.no_grad()
def attention_shares(model: VQAFusionModel, images: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The attention of every word to every patch [B, heads, words, 16], 0 where it did not keep the patch; and the
    logits [B, answers]."""
    found = []

    def look(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        kwargs = {**kwargs, "need_weights": True, "average_attn_weights": False}
        found.append(type(module).forward(module, *args, **kwargs)[1])

    hook = model.get_submodule(ATTENTION).register_forward_hook(look, with_kwargs=True)
    try:
        logits = model(images, words, mask)["logits"]
    finally:
        hook.remove()
    return found[0], logits
