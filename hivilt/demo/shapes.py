"""The last part of the demo: questions about rendered shapes, for a model whose words keep four patches each."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from ..train.config import from_dict
from ..train.data import generator
from ..train.loop import accuracy, learned, make_pool, rate_at, train_step
from ..train.model import build
from ..train.picture import draw_words

TOPK = 4


def learn_shapes(path: Path, steps: int) -> str:
    """Trains for so many steps, draws what the words keep, and returns what there is to say about it."""
    config = from_dict({"model": {"topk": TOPK}}, "demo")
    small, threads = steps < 100, torch.get_num_threads()
    torch.set_num_threads(1)  # with tensors this small two threads mostly wait for each other
    try:
        model = build(config)
        model.vision.fit(config.seed, 5 if small else 200)
        train, test = (make_pool(model.vision, 64 if small else n, config.seed, i) for i, n in ((6, 2048), (7, 512)))
        optimizer = torch.optim.AdamW(learned(model), 4e-3, weight_decay=0.01)
        for step in tqdm(range(steps), "learning shapes", leave=False):
            batch = train.batch(128, generator(config.seed, 8, step))
            train_step(model.train(), optimizer, [batch], rate_at(step, steps, 4e-3, 50), clip=1.0)
        found = accuracy(model, test, config.seed)
        draw_words(model, model.vision, path)
    finally:
        torch.set_num_threads(threads)
    lines = [f"questions about rendered shapes, {steps} steps; each word keeps {TOPK} of 16 patches; right answers:"]
    return "\n".join(lines + [f"  {kind:<16}{share:>7.1%}" for kind, share in found.items()])
