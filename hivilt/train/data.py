"""Rendered scenes of coloured shapes and questions about them, made in code from a seed.

A scene is a 4 x 4 grid of cells of 16 pixels with two to four objects, all of different shape and colour; size, place
within the cell, shade and pixel noise vary.  Questions have three to nine words and are padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRID, CELL = 4, 16  # cells a side, pixels of a cell
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLORS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.15, 0.32, 0.85),
    "yellow": (0.95, 0.82, 0.15),
    "purple": (0.58, 0.20, 0.70),
    "orange": (0.96, 0.52, 0.10),
}
LEAST, MOST = 2, 4  # objects of a scene
ANSWERS = (*COLORS, *SHAPES, "yes", "no", *map(str, range(LEAST, MOST + 1)))
# Words in capitals stand for the colour or the shape of the first (1) or the second (2) object asked about.
TEMPLATES = {
    "color of shape": ("what color is the SHAPE1",),
    "shape of color": ("what shape is the COLOR1 thing",),
    "left of": (
        "is the SHAPE1 left of the SHAPE2",
        "is the SHAPE1 left of the COLOR2 thing",
        "is the COLOR1 thing left of the SHAPE2",
        "is the COLOR1 thing left of the COLOR2 one",
    ),
    "exists": ("is there a SHAPE1", "is there a COLOR1 thing"),
    "count": ("how many things", "how many things are there"),
}
KINDS = tuple(TEMPLATES)
SLOTS = ("SHAPE1", "COLOR1", "SHAPE2", "COLOR2")
SENTENCES = [(kind, text.split()) for kind, texts in TEMPLATES.items() for text in texts]
WORDS = ("<pad>", *sorted({w for _, s in SENTENCES for w in s if w not in SLOTS} | {*SHAPES, *COLORS}))
LONGEST = max(len(s) for _, s in SENTENCES)


@dataclass(frozen=True)
class Scenes:
    """``cells``, ``shapes``, ``colors`` integers [B, 5]: object j is there if j < ``count`` [B]; the rest names
    shapes and colours that the scene does not hold."""

    cells: Tensor
    shapes: Tensor
    colors: Tensor
    count: Tensor

    def __getitem__(self, index) -> Scenes:
        return Scenes(self.cells[index], self.shapes[index], self.colors[index], self.count[index])

    def __len__(self) -> int:
        return len(self.count)


@dataclass(frozen=True)
class Questions:
    """``words`` [B, 9] numbers of WORDS, ``mask`` bool [B, 9] True for words, ``answers`` [B] numbers of ANSWERS,
    ``kinds`` [B] numbers of KINDS, ``objects`` [B, 2] which objects of the scene are asked about."""

    words: Tensor
    mask: Tensor
    answers: Tensor
    kinds: Tensor
    objects: Tensor


def generator(*numbers: int) -> torch.Generator:
    """A generator for these numbers, such as (seed, step): other numbers, an unrelated stream."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:  # splitmix64
        state = (state + int(number) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)


def make_scenes(count: int, g: torch.Generator) -> Scenes:
    def shuffled(n: int) -> Tensor:
        return torch.rand(count, n, generator=g).argsort(1)[:, : len(SHAPES)]

    objects = torch.randint(LEAST, MOST + 1, (count,), generator=g)
    return Scenes(shuffled(GRID**2), shuffled(len(SHAPES)), shuffled(len(COLORS)), objects)


def render(scenes: Scenes, g: torch.Generator) -> Tensor:
    """Images float [B, 3, 64, 64] from 0 to 1."""
    B, side = len(scenes), GRID * CELL
    ground = _uniform(g, 0.80, 0.96, B, 1, 1, 1)
    cells = ground[:, None].expand(B, GRID**2, 3, CELL, CELL).clone()
    for j in range(MOST):
        there = (j < scenes.count).nonzero()[:, 0]
        drawn = draw_cells(scenes.shapes[there, j], scenes.colors[there, j], ground[there], g)
        cells[there, scenes.cells[there, j]] = drawn
    images = cells.view(B, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, side, side)
    return add_noise(images, g)


def draw_cells(shapes: Tensor, colors: Tensor, ground: Tensor | float, g: torch.Generator) -> Tensor:
    """One object each [B, 3, 16, 16], of numbers of SHAPES and COLORS [B], on a ground of this brightness."""
    B = len(shapes)
    size, shade = _uniform(g, 0.62, 0.85, B, 1, 1), _uniform(g, 0.80, 1.15, B, 1)
    line = (torch.arange(CELL) + 0.5) / CELL * 2 - 1
    y = (line[:, None] - _uniform(g, -0.15, 0.15, B, 1, 1)) / size
    x = (line - _uniform(g, -0.15, 0.15, B, 1, 1)) / size
    radius = _radius(x, y)[torch.arange(B), shapes]
    cover = ((1 - radius) * 8 + 0.5).clamp(0, 1)[:, None]  # a soft edge
    color = (torch.tensor(list(COLORS.values()))[colors] * shade).clamp(0, 1)[..., None, None]
    return ground + cover * (color - ground)


def add_noise(pixels: Tensor, g: torch.Generator) -> Tensor:
    return (pixels + 0.03 * torch.randn(pixels.shape, generator=g)).clamp(0, 1)


def _uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=g)


def _radius(x: Tensor, y: Tensor) -> Tensor:
    """How far points [B, 16, 16] are out, in units of the distance to the edge, for every shape [B, 5, 16, 16];
    1 is the edge."""
    a, b = x.abs(), y.abs()
    circle, square, diamond = (x * x + y * y).sqrt(), torch.maximum(a, b) / 0.85, (a + b) / 1.1
    triangle = torch.maximum(y / 0.8, (2 * a - y) / 1.0)
    cross = torch.maximum(torch.maximum(a, b), torch.minimum(a, b) / 0.32)
    return torch.stack(torch.broadcast_tensors(circle, square, triangle, diamond, cross), 1)


def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """Words of every sentence with slots as -1 .. -4 [S, 9], its length [S] and its kind [S]."""
    rows = torch.zeros(len(SENTENCES), LONGEST, dtype=torch.long)
    for row, (_, words) in zip(rows, SENTENCES, strict=True):
        row[: len(words)] = torch.tensor([-1 - SLOTS.index(w) if w in SLOTS else WORDS.index(w) for w in words])
    lengths = torch.tensor([len(words) for _, words in SENTENCES])
    return rows, lengths, torch.tensor([KINDS.index(kind) for kind, _ in SENTENCES])


SENTENCE_WORDS, SENTENCE_LENGTHS, SENTENCE_KINDS = _tables()


def make_questions(scenes: Scenes, g: torch.Generator, kind: str | Tensor | None = None) -> Questions:
    """One question for each scene, of a random kind, of this one, or of these [B], numbers of KINDS.

    Yes and no are as likely; "left of" asks about objects of different columns, and a scene that has none gets "count"
    instead.
    """
    B = len(scenes)
    rows = torch.arange(B)
    if isinstance(kind, Tensor):
        kinds = kind
    else:
        kinds = torch.randint(len(KINDS), (B,), generator=g) if kind is None else torch.full((B,), KINDS.index(kind))
    present = torch.arange(MOST) < scenes.count[:, None]
    column = scenes.cells[:, :MOST] % GRID
    apart = (column[:, :, None] != column[:, None]) & present[:, :, None] & present[:, None]
    apart = apart.flatten(1)
    kinds = torch.where((kinds == KINDS.index("left of")) & ~apart.any(1), KINDS.index("count"), kinds)
    pair = (torch.rand(B, MOST**2, generator=g) * apart).argmax(1)
    any_one = (torch.rand(B, generator=g) * scenes.count).long()
    absent = torch.rand(B, generator=g) < 0.5
    first = torch.where(kinds == KINDS.index("left of"), pair // MOST, any_one)
    first = torch.where(
        (kinds == KINDS.index("exists")) & absent, scenes.count, first
    )  # names something that is not there
    second = pair % MOST

    fits = SENTENCE_KINDS == kinds[:, None]
    sentence = (torch.rand(B, len(SENTENCES), generator=g) * fits).argmax(1)
    tables = _numbers(SHAPES)[scenes.shapes], _numbers(COLORS)[scenes.colors]
    names = torch.stack([table[rows, which] for which in (first, second) for table in tables], 1)
    words = SENTENCE_WORDS[sentence]
    words = torch.where(words < 0, names.gather(1, (-1 - words).clamp(min=0)), words)

    def code(values: Tensor, base: str) -> Tensor:
        return values + ANSWERS.index(base)

    left = column[rows, first.clamp(max=MOST - 1)] < column[rows, second]
    answers = torch.stack([
        code(scenes.colors[rows, first], next(iter(COLORS))),
        code(scenes.shapes[rows, first], SHAPES[0]),
        code((~left).long(), "yes"),
        code(absent.long(), "yes"),
        code(scenes.count - LEAST, str(LEAST)),
    ])[kinds, rows]  # fmt: skip
    mask = torch.arange(LONGEST) < SENTENCE_LENGTHS[sentence][:, None]
    return Questions(words, mask, answers, kinds, torch.stack([first, second], 1))


def _numbers(words) -> Tensor:
    return torch.tensor([WORDS.index(word) for word in words])


def read(words: Tensor) -> str:
    """A row of Questions.words as text."""
    return " ".join(WORDS[i] for i in words.tolist() if i)


def write(question: str) -> tuple[Tensor, Tensor]:
    """Text to words [1, N] and mask [1, N]. Raises ValueError for a word that no question holds."""
    found = question.lower().replace("?", " ").split()
    for word in found:
        if word not in WORDS[1:]:
            raise ValueError(f"question: expected words out of {', '.join(WORDS[1:])}; got {word!r}")
    if not 1 <= len(found) <= LONGEST:
        raise ValueError(f"question: expected 1 to {LONGEST} words; got {len(found)}")
    words = torch.tensor([[WORDS.index(word) for word in found]])
    return words, torch.ones_like(words, dtype=torch.bool)
