"""Inputs of the demo: two photographs in patches, sentences about them, and a lesson in what some words look like."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm import tqdm

from .model import PATCH, CrossModalModel

SENTENCES = {
    "china.jpg": [
        "An old pagoda stands on a hill above a wide lake and its orange tiles shine under a pale sky. Dark red "
        "pillars carry three storeys of green eaves, little boats rest on the water far below, an island with a bridge "
        "lies in the haze, and thick trees grow along the slope around the walls.",
        "The tower rises over the trees. Its tiles glow orange, its pillars are red, and behind it the lake and the "
        "sky meet in a white haze, so that one can hardly tell the far shore from the clouds.",
    ],
    "flower.jpg": [
        "A single dahlia opens in the garden, round as a ball, with hundreds of peach petals that curl into small "
        "cups. Towards the heart they turn a deep red orange. Behind the flower large leaves of dark green and blue "
        "fade into soft shadow, and a second bloom waits at the lower edge.",
        "The petals of this flower are folded in rings around a glowing heart. Cool green leaves lie behind it out of "
        "focus, and the corners sink into shadow.",
    ],
}
# What a person would say these words look like: red, green, blue, and how far down the picture (None: anywhere).
FACTS = {
    "sky": ((222, 230, 241), 0.15),
    "lake": ((176, 186, 190), 0.60),
    "tiles": ((196, 112, 66), None),
    "pillars": ((112, 44, 44), None),
    "trees": ((98, 100, 66), 0.90),
    "petals": ((246, 186, 128), None),
    "heart": ((232, 96, 58), None),
    "leaves": ((8, 84, 84), None),
    "shadow": ((8, 22, 34), None),
}


def load(grid: tuple[int, int]) -> tuple[dict[str, np.ndarray], Tensor, Tensor, dict[str, int]]:
    """Photographs by name, patches [4, N, 768], word numbers [4, Q] and the vocabulary."""
    sample = load_sample_images()
    photos = {
        Path(name).name: np.asarray(Image.fromarray(image).resize((grid[1] * PATCH, grid[0] * PATCH)))
        for name, image in zip(sample.filenames, sample.images, strict=True)
    }
    photos = {name: photos[name] for name in SENTENCES}
    tokens = {name: [re.findall(r"[a-z]+", s.lower()) for s in SENTENCES[name]] for name in SENTENCES}
    vocabulary = {w: i for i, w in enumerate(sorted({w for s in tokens.values() for t in s for w in t}))}
    length = max(len(t) for s in tokens.values() for t in s)
    pictures, words = [], []
    for which in (0, 1):  # the second sentence goes with the mirrored picture
        for name, image in photos.items():
            pixels = torch.tensor(image[:, :: 1 - 2 * which].copy()).permute(2, 0, 1) / 255
            pictures.append(F.unfold(pixels[None], PATCH, stride=PATCH)[0].mT)
            numbers = [vocabulary[w] for w in tokens[name][which]]
            words.append(numbers + [-1] * (length - len(numbers)))
    return photos, torch.stack(pictures), torch.tensor(words), vocabulary


def teach(model: CrossModalModel, patches: Tensor, words: Tensor, vocabulary: dict[str, int], grid, steps: int) -> None:
    """Lets the first word-to-patch attention find patches of the colour and height that FACTS names; plain PyTorch."""
    attention = model.layers[0].words_to_patches
    color = patches.unflatten(-1, (3, -1)).mean(-1)  # [B, N, 3]
    height = torch.linspace(0, 1, grid[0])[:, None].expand(grid).flatten()
    aims = [(b, i, FACTS[w]) for w, n in vocabulary.items() if w in FACTS for b, i in (words == n).nonzero().tolist()]
    target = torch.stack([
        8 * (color[b] - torch.tensor(rgb) / 255).square().sum(-1) + (0 if y is None else 2 * (height - y).square())
        for b, _, (rgb, y) in aims
    ]).div(-0.05).softmax(-1)  # fmt: skip
    at = [b for b, *_ in aims], [i for _, i, _ in aims]
    optimizer = torch.optim.Adam([*model.word.parameters(), *model.patch.parameters(), *attention.parameters()], 2e-3)
    for _ in tqdm(range(steps), "teaching", leave=False):
        w, p, _ = model.embed(patches, words)
        w, p = model.layers[0].norms[0](w), model.layers[0].norms[1](p)
        weights = attention(w, p, p, need_weights=True, average_attn_weights=False)[1]
        loss = -(target[:, None] * weights.transpose(1, 2)[at].clamp_min(1e-12).log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
