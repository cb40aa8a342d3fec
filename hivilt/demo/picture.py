"""The picture of the patches that words keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from .model import PATCH, CrossModalModel

SHOWN = {"china.jpg": ["sky", "tiles", "pillars", "trees"], "flower.jpg": ["petals", "heart", "leaves", "shadow"]}


def draw(model: CrossModalModel, photos, patches: Tensor, words: Tensor, vocabulary, grid, path: Path) -> None:
    """Each row a photograph and what four of its words keep in the first layer; brightness: by how many heads."""
    model.eval()
    attention = model.layers[0].words_to_patches
    with torch.no_grad():
        w, p, _ = model.embed(patches, words)
        norms = model.layers[0].norms
        weights = attention(norms[0](w), norms[1](p), norms[1](p), need_weights=True, average_attn_weights=False)[1]
    heads = weights.shape[1]
    share = (weights > 0).float().mean(1)  # of the heads that keep a patch, [B, Q, N]

    figure = Figure(figsize=(17, 5.4), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    rows = figure.subplots(2, 5)
    for row, (b, (name, photo)) in zip(rows, enumerate(photos.items()), strict=True):
        row[0].imshow(photo)
        row[0].set_title(f"{name}: {len(patches[b])} patches", fontsize=12, loc="left")
        gray = 95 + 0.35 * photo.mean(-1, keepdims=True)  # neither pale nor dark, so that both stand out
        for axes, word in zip(row[1:], SHOWN[name], strict=True):
            at = (words[b] == vocabulary[word]).nonzero()[0, 0]
            amount = share[b, at].view(grid).numpy()
            blend = np.kron((0.25 + 0.75 * amount) * (amount > 0), np.ones((PATCH, PATCH)))[..., None]
            axes.imshow((blend * photo + (1 - blend) * gray).astype(np.uint8))
            axes.add_collection(LineCollection(outline(amount >= 0.5), colors="#ffe066", linewidths=1.3))
            axes.set_title(f"“{word}”", fontsize=14, loc="left", color="#a61e4d")
            axes.set_title(f"{int((amount > 0).sum())} patches", fontsize=10, loc="right", color="0.35")
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    figure.suptitle(
        f"The patches a word keeps: top {attention.topk} for each of {heads} heads. The more heads keep a patch, the "
        "more of its colour is shown; outlined where half of them do.",
        fontsize=12, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def outline(inside: np.ndarray) -> list:
    """Line segments, in pixels, around a region of patches."""
    padded = np.pad(inside, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # the edge above patch (y, x)
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # the edge left of it
    ends = [((x, y), (x + 1, y)) for y, x in across] + [((x, y), (x, y + 1)) for y, x in down]
    return [np.array(points) * PATCH - 0.5 for points in ends]
