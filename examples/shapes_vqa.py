"""Questions about rendered shapes: does it pay to let words look at patches, and may each word keep only a few?

    python examples/shapes_vqa.py [--all] [--quick] [--out DIR]

A frozen patch encoder, fitted beforehand to single cells, turns a rendered image into 16 tokens; frozen word vectors
turn a question into up to 9.  (From raw pixels nothing is learned in seconds.)  What is compared is what joins them:
everything pooled before it meets, or words that attend to patches, all 16 of them or only the best 4.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from results import SEEDS, options, table
from torch import nn
from tqdm import tqdm

import hivilt
from hivilt.nn import GlobalFusionModule, LocalFusionModule, MaskedMeanPool, MultimodalFusion
from hivilt.train.data import ANSWERS, KINDS, generator
from hivilt.train.loop import accuracy, learned, make_pool, rate_at, train_step
from hivilt.train.model import ATTENTION, FEATURES, PLACE, PatchEncoder, WordVectors
from hivilt.train.picture import draw_words

WIDTH, HEADS, CHANNELS = 64, 2, FEATURES + PLACE
BATCH, STEPS = 128, 1100


class Pooled(nn.Module):
    """The baseline: the mean of the patches beside the mean of the words, then an MLP."""

    def __init__(self, text: nn.Module, hidden: int):
        super().__init__()
        self.text, self.pool = text, MaskedMeanPool()
        self.mlp = nn.Sequential(
            nn.Linear(CHANNELS + WIDTH, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, len(ANSWERS)),
        )  # fmt: skip

    def forward(self, patches, words, mask):
        both = torch.cat([patches.mean(1), self.pool(self.text(words), mask)], 1)
        return {"logits": self.mlp(both)}


class Hierarchy(nn.Module):
    """HiViLT's two levels as a fusion: the words after local fusion, and the global vector as one word more."""

    def __init__(self):
        super().__init__()
        self.text_embed_dim = WIDTH
        self.vision_proj = nn.Linear(CHANNELS, WIDTH)
        self.local = LocalFusionModule(WIDTH, HEADS, dropout=0.0)
        self.whole = GlobalFusionModule(hidden_dim=WIDTH, num_heads=HEADS, dropout=0.0)

    def forward(self, text, patches, mask):
        vision = self.vision_proj(patches)
        local = self.local(vision, text, attention_mask=mask)
        whole = self.whole(local, vision, text, attention_mask=mask)["fused_features"]
        fused = torch.cat([local[:, vision.shape[1] :], whole[:, None]], 1)
        return fused, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def make(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    text = WordVectors(WIDTH, generator(seed, 3))
    if kind == "pooled":
        return Pooled(text, 128)
    if kind == "pooled, large":
        return Pooled(text, 384)
    fusion = Hierarchy() if kind == "hierarchical" else MultimodalFusion(WIDTH, CHANNELS, HEADS, 128, residual=True)
    model = hivilt.models.VQAFusionModel(None, text, fusion, len(ANSWERS))  # None: patches come encoded
    if kind == "words keep 4":
        model.get_submodule(ATTENTION).topk = 4
    return model


# Steps are chosen so that the large baseline gets at least the processor time of the fusions.
KINDS_OF_MODEL = {
    "pooled": 2,
    "pooled, large": 4,
    "words see 16": 1,
    "words keep 4": 1,
    "keep 4 from half-time": 1,
    "hierarchical": 1,
}
MORE = ("hierarchical",)  # with --all


def learn(job) -> tuple[str, dict, nn.Module]:
    """Trains one model with one seed; returns its accuracies in percent and processor seconds."""
    kind, seed, steps, train, test = job
    torch.set_num_threads(1)
    model, start, steps = make(kind, seed), time.process_time(), steps * KINDS_OF_MODEL[kind]
    rate = 2e-3 if kind.startswith("pooled") else 4e-3
    optimizer = torch.optim.AdamW(learned(model), rate, weight_decay=0.01)
    for step in range(steps):
        if kind == "keep 4 from half-time" and step == steps // 2:
            model.get_submodule(ATTENTION).topk = 4
        batch = train.batch(BATCH, generator(seed, 8, step))
        train_step(model, optimizer, [batch], rate_at(step, steps, rate, 50), clip=1.0)
    seconds = time.process_time() - start
    found = {name: 100 * x for name, x in accuracy(model, test, seed).items()}
    return kind, {**found, "mean": sum(found.values()) / len(found), "CPU s": seconds}, model.eval()


def main() -> None:
    arguments = options(__doc__.splitlines()[0], all="one model more, the slowest")
    scenes, steps, seeds = (256, 5, SEEDS[:1]) if arguments.quick else (4096, STEPS, SEEDS)
    torch.manual_seed(0)
    encoder = PatchEncoder()
    read = encoder.fit(0, 5 if arguments.quick else 200)
    print(f"the patch encoder, fitted beforehand and frozen, reads {read:.1%} of single objects")
    train, test = make_pool(encoder, scenes, 0, 6), make_pool(encoder, 1024 if scenes > 1024 else 64, 0, 7)

    kinds = [kind for kind in KINDS_OF_MODEL if arguments.all or kind not in MORE]
    jobs = [(kind, seed, steps, train, test) for seed in seeds for kind in kinds]
    rows, models = {kind: [] for kind in kinds}, {}
    with ProcessPoolExecutor(2, get_context("spawn")) as two:  # two cores, one training on each
        done = map(learn, jobs) if arguments.quick else two.map(learn, jobs)
        for kind, found, model in tqdm(done, "training", total=len(jobs)):
            rows[kind].append(found)
            models.setdefault(kind, []).append(model)
    print(f"\nright answers in percent, {len(test.scenes)} new scenes, seeds {seeds}")
    print(table(rows))

    print("\nthe models that saw all patches while they learned, words now keep only some of them")
    kept = {}
    for topk in (16, 8, 4, 2, 1):
        for seed, model in zip(seeds, models["words see 16"], strict=True):
            model.get_submodule(ATTENTION).topk = topk
            found = {name: 100 * x for name, x in accuracy(model, test, seed).items()}
            kept.setdefault(f"keep {topk} of 16", []).append({**found, "mean": sum(found.values()) / len(KINDS)})
    print(table(kept))

    path = arguments.out / "shapes_vqa.png"
    draw_words(models["words keep 4"][0], encoder, path)
    print(f"\npicture of the patches each word keeps: {path}")


if __name__ == "__main__":
    main()
