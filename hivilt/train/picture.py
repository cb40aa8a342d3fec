"""The picture of a question about shapes: for each word the patches it keeps, drawn on the image."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from .data import ANSWERS, CELL, GRID, KINDS, LONGEST, generator, make_questions, make_scenes, read, render
from .model import ATTENTION, attention_shares

SHOWN = ("color of shape", "shape of color", "left of", "exists")


def draw_words(model: nn.Module, encoder: nn.Module, path: Path, seed: int = 1) -> None:
    """A row for each of four questions: the image, then each word with its patches; a frame's width is their share."""
    figure = Figure(figsize=(15, 1.75 * len(SHOWN)), facecolor="white")
    space = {"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.91, "wspace": 0.06, "hspace": 0.22}
    rows = figure.subplots(len(SHOWN), LONGEST + 1, gridspec_kw=space)
    for i, (kind, row) in enumerate(zip(SHOWN, rows, strict=True)):
        g = generator(seed, 10, i)
        scenes = make_scenes(16, g)
        asked = make_questions(scenes, g, kind)
        chosen = int((asked.kinds == KINDS.index(kind)).nonzero()[0])
        images = render(scenes, g)[chosen : chosen + 1]
        words, mask = asked.words[chosen : chosen + 1], asked.mask[chosen : chosen + 1]
        seen, logits = attention_shares(model.eval(), encoder(images), words, mask)
        answer, truth = ANSWERS[int(logits.argmax())], ANSWERS[int(asked.answers[chosen])]
        image = images[0].permute(1, 2, 0).numpy()
        row[0].imshow(image)
        row[0].set_title(f"{answer}" + ("" if answer == truth else f" (not {truth})"), fontsize=11, color="#1864ab")
        for j, axes in enumerate(row[1:]):
            said = read(asked.words[chosen]).split()
            if j >= len(said):
                axes.set_visible(False)
                continue
            share = seen[0, :, j].mean(0)  # over the heads
            dim = 0.3 + 0.7 * (share > 0).float().view(GRID, GRID).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
            axes.imshow((image * dim[..., None].numpy()).clip(0, 1))
            axes.set_title(said[j], fontsize=11, color="#a61e4d")
            for cell in (share > 0.02).nonzero()[:, 0].tolist():
                y, x = divmod(cell, GRID)
                axes.add_patch(
                    Rectangle((x * CELL, y * CELL), CELL - 1, CELL - 1, fill=False, edgecolor="#ffe066",
                              linewidth=0.5 + 4 * float(share[cell]))
                )  # fmt: skip
    for axes in rows.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    topk = getattr(model.get_submodule(ATTENTION), "topk", None)
    said = "all patches" if topk is None else f"the best {topk} patches for each head"
    figure.suptitle(
        f"What each word of a question looks at, {said}: others are dark, a thicker frame is a larger share. "
        "On the left the model's answer.",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=75)
