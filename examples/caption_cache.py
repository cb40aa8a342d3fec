"""Decoding a caption word by word over fixed patches: the projected keys and values of the image kept, or made anew.

    python examples/caption_cache.py [--quick] [--out DIR]

Each step has one query per image and 1024 patches.  Without a cache every step projects all patches again, in each
layer; CachedCrossAttention projects them once.  The captions must be the same to the last bit.  The weights are random:
this is about time, not about captions.
"""

from __future__ import annotations

import time

import torch
from results import SEEDS, options, table
from torch import Tensor, nn
from tqdm import tqdm

import hivilt

WIDTH, HEADS, LAYERS, VOCABULARY = 256, 8, 2, 1000


class Decoder(nn.Module):
    """A recurrent state reads the image in each layer and names the next word."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, WIDTH)
        self.state = nn.GRUCell(WIDTH, WIDTH)
        self.look = nn.ModuleList(hivilt.nn.CachedCrossAttention(WIDTH, HEADS) for _ in range(LAYERS))
        self.next = nn.Linear(WIDTH, VOCABULARY)

    @torch.no_grad()
    def caption(self, patches: Tensor, length: int, use_cache: bool, bar: tqdm) -> Tensor:
        """Word numbers [B, length], each the most probable."""
        B = len(patches)
        state, word, words = patches.new_zeros(B, WIDTH), torch.zeros(B, dtype=torch.long), []
        for _ in range(length):
            state = self.state(self.word(word), state)
            x = state[:, None]
            for layer in self.look:
                x = x + layer(x, patches, patches, cache_key="image", use_cache=use_cache)
            word = self.next(x[:, 0]).argmax(-1)
            words.append(word)
            bar.update()
        return torch.stack(words, 1)


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    batch, patches, length, rounds = (2, 64, 4, 1) if arguments.quick else (4, 1024, 24, 3)
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    rows: dict[str, list] = {"projected again every step": [], "projected once, then cached": []}
    with tqdm(total=len(seeds) * (2 * rounds + 2) * length, desc="decoding") as bar:
        for seed in seeds:
            torch.manual_seed(seed)
            model, image = Decoder().eval(), torch.randn(batch, patches, WIDTH)
            plain, cached = (model.caption(image, length, use_cache, bar) for use_cache in (False, True))
            if not torch.equal(plain, cached):
                raise SystemExit("the captions differ: no speed is shown")
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):  # in turn, so that both see the same machine
                for use_cache, times in seconds.items():
                    for layer in model.look:
                        layer.clear_cache()
                    start = time.perf_counter()
                    model.caption(image, length, use_cache, bar)
                    times.append(time.perf_counter() - start)
            ratio = sorted(a / b for a, b in zip(seconds[False], seconds[True], strict=True))[rounds // 2]
            for row, times, faster in zip(rows.values(), seconds.values(), (1.0, ratio), strict=True):
                row.append({"tokens/s": batch * length / sorted(times)[rounds // 2], "times faster": faster})
    print(f"\nsame captions; {batch} images of {patches} patches, {LAYERS} layers, {length} words, seeds {seeds}")
    print(table(rows))
    print("  median of interleaved rounds; the first step, which fills the cache, counts")


if __name__ == "__main__":
    main()
