"""Questions about rendered shapes: does it pay to let words look at patches, and may each word keep only a few?

    python examples/shapes_vqa.py [--all] [--quick] [--out DIR]

A frozen patch encoder, fitted beforehand to single cells, turns a rendered image into 16 tokens; frozen word vectors
turn a question into up to 9.  (From raw pixels nothing is learned in seconds.)  What is compared is what joins them:
everything pooled before it meets, words that attend to patches, all 16 of them or only the best 4, or two levels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from results import SEEDS, options, table
from torch import nn
from tqdm import tqdm

import hivilt
from hivilt.nn import GlobalFusionModule, LocalFusionModule, MaskedMeanPool, MultimodalFusion
from hivilt.train.data import ANSWERS, KINDS, generator, make_questions
from hivilt.train.loop import Batch, Pool, learned, make_pool
from hivilt.train.model import ATTENTION, FEATURES, PLACE, PatchEncoder, WordVectors
from hivilt.train.picture import draw_words

WIDTH, HEADS, CHANNELS = 48, 2, FEATURES + PLACE
BATCH, STEPS, RATE = 256, 460, 8e-3


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
    """HiViLT's two levels as a fusion: the words after local fusion, and the global vector as one word more.

    local: options of local fusion.  "left of" asks where a word's object is and whether the word comes first or second:
    a product of what the word saw and of the word, which the module's one layer hardly makes of their sum.
    """

    def __init__(self, **local: object):
        super().__init__()
        self.text_embed_dim = WIDTH
        self.vision_proj = nn.Linear(CHANNELS, WIDTH)
        self.local = LocalFusionModule(WIDTH, HEADS, dropout=0.0, **local)
        self.whole = GlobalFusionModule(hidden_dim=WIDTH, num_heads=HEADS, dropout=0.0)

    def forward(self, text, patches, mask):
        vision = self.vision_proj(patches)
        local = self.local(vision, text, attention_mask=mask)
        whole = self.whole(local, vision, text, attention_mask=mask)["fused_features"]
        fused = torch.cat([local[:, vision.shape[1] :], whole[:, None]], 1)
        return fused, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


# Steps, in units of STEPS, are chosen so that the large baseline gets the processor time of the words' models.
# The slowest stand first: the trainings are handed out in this order.
TIMES = {
    "hierarchical": 0.7,
    "hierarchical, plain f": 0.7,
    "words see 16": 1,
    "words keep 4": 1,
    "never a mask": 1,
    "pooled, large": 2,
    "pooled": 1,
}
MORE = ("hierarchical, plain f", "words keep 4", "never a mask")  # with --all
HALF = "keep 4 from half-time"  # begins as "words see 16", so the two are trained together up to there
ROWS = ("pooled", "pooled, large", "words see 16", "words keep 4", HALF, "never a mask", *list(TIMES)[:2])


def make(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    text = WordVectors(WIDTH, generator(seed, 3))
    if kind.startswith("pooled"):
        return Pooled(text, 384 if kind == "pooled, large" else 128)
    if kind.startswith("hierarchical"):
        more = {"product": True, "input_norm": "layernorm"}
        fusion = Hierarchy(**(more if kind == "hierarchical" else {}))
    else:
        fusion = MultimodalFusion(WIDTH, CHANNELS, HEADS, 2 * WIDTH, residual=True)
    model = hivilt.models.VQAFusionModel(None, text, fusion, len(ANSWERS))  # None: patches come encoded
    if kind == "words keep 4":
        model.get_submodule(ATTENTION).topk = 4
    return model


def lessons(pool: Pool, seed: int, steps: range, all_steps: int, part: int = 50) -> Iterator[Batch]:
    """A batch for each step.  "left of" joins after two fifths: until words find what they name it is only noise."""
    for first in steps[::part]:
        count = min(part, steps.stop - first)
        g = generator(seed, 8, first)
        index = torch.randint(len(pool.scenes), (count * BATCH,), generator=g)
        shares = torch.ones(count, len(KINDS))
        late = torch.arange(first, first + count) >= 0.4 * all_steps
        shares[:, KINDS.index("left of")] = torch.where(late, 2 / 3 * (len(KINDS) - 1), 0.0)  # 40 percent then
        kinds = torch.multinomial(shares, BATCH, replacement=True, generator=g).flatten()
        q = make_questions(pool.scenes[index], g, kinds)
        batches = (x.split(BATCH) for x in (pool.patches[index], q.words, q.mask, q.answers))
        yield from zip(*batches, strict=True)


def train(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, pool: Pool, seed: int, steps: range,
          all_steps: int) -> float:  # fmt: skip
    """These steps of all; the rate rises over 20 and falls in the last third.  Returns processor seconds."""
    start, rate = time.process_time(), optimizer.defaults["lr"]
    for step, (patches, words, mask, answers) in zip(steps, lessons(pool, seed, steps, all_steps), strict=True):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20, 3 * (all_steps - step) / all_steps)
        optimizer.zero_grad()
        logits = model(patches, words, None if kind == "never a mask" else mask)["logits"]
        F.cross_entropy(logits, answers).backward()
        nn.utils.clip_grad_norm_(learned(model), 1.0)
        optimizer.step()
    return time.process_time() - start


@torch.no_grad()
def marks(model: nn.Module, pool: Pool, seed: int, masked: bool = True, padded: bool = True) -> dict[str, float]:
    """Percent right for each kind of question, and their mean.  masked: the model is told what is padding.  padded:
    questions have the padding they have in training; else each is asked without any, together with those of its length.
    """
    found = {}
    for number, kind in enumerate(KINDS):
        q = make_questions(pool.scenes, generator(seed, 5, number), kind)
        lengths, right = q.mask.sum(1), torch.zeros(len(pool.scenes), dtype=torch.bool)
        for length in [None] if padded else lengths.unique().tolist():
            rows = torch.ones_like(right) if padded else lengths == length
            words, mask = q.words[rows, :length], q.mask[rows, :length]
            logits = model(pool.patches[rows], words, mask if masked else None)["logits"]
            right[rows] = logits.argmax(1) == q.answers[rows]
        found[kind] = 100 * float(right[q.kinds == number].float().mean())
    return {**found, "mean": sum(found.values()) / len(found)}


Found = list[tuple[str, str, dict[str, float]]]  # table, row, columns


def learn(kind: str, seed: int, steps: int, pool: Pool, test: Pool) -> tuple[Found, nn.Module]:
    """Trains one model with one seed; "words see 16" also with its second half kept to 4, the model returned then."""
    torch.set_num_threads(1)
    steps, rate = round(steps * TIMES[kind]), 2e-3 if kind.startswith("pooled") else RATE
    model = make(kind, seed)
    optimizer = torch.optim.AdamW(learned(model), rate, weight_decay=0.01, fused=True)
    half = steps // 2
    seconds = train(kind, model, optimizer, pool, seed, range(half), steps)
    begun = {kind: (model, optimizer)}
    if kind == "words see 16":
        begun[HALF] = copy.deepcopy((model, optimizer))
        begun[HALF][0].get_submodule(ATTENTION).topk = 4
    found: Found = []
    for name, (model, optimizer) in begun.items():
        whole = seconds + train(kind, model, optimizer, pool, seed, range(half, steps), steps)
        model.eval()
        masked = name != "never a mask"
        found.append(("learned", name, {**marks(model, test, seed, masked), "CPU s": whole}))
        if name in ("words see 16", "never a mask"):
            for row in ("mask always", "mask in training only") if masked else (name,):
                told = row == "mask always"
                two = (marks(model, test, seed, told, padded)["mean"] for padded in (True, False))
                found.append(("mask", row, dict(zip(("padded", "alone"), two, strict=True))))
        if name == "words see 16":
            attention = model.get_submodule(ATTENTION)
            for attention.topk in (16, 8, 4, 2, 1):
                found.append(("kept", f"keep {attention.topk} of 16", marks(model, test, seed)))
    return found, model


def main() -> None:
    arguments = options(__doc__.splitlines()[0], all="models that show what else was tried")
    scenes, steps, seeds = (256, 6, SEEDS[:1]) if arguments.quick else (4096, STEPS, SEEDS)
    kinds = [kind for kind in TIMES if arguments.all or kind not in MORE]
    halves, tables = [], {"learned": {row: [] for row in ROWS}}
    with ProcessPoolExecutor(2, get_context("spawn")) as two:  # two cores, one training on each
        if not arguments.quick:
            for _ in range(2):
                two.submit(torch.set_num_threads, 1)  # they start while the encoder learns
        torch.manual_seed(0)
        encoder = PatchEncoder()
        read = encoder.fit(0, 5 if arguments.quick else 200)
        print(f"the patch encoder, fitted beforehand and frozen, reads {read:.1%} of single objects")
        data = make_pool(encoder, scenes, 0, 6), make_pool(encoder, 1024 if scenes > 1024 else 64, 0, 7)
        jobs = [(kind, seed, steps, *data) for kind in kinds for seed in seeds]
        run = (lambda job: learn(*job)) if arguments.quick else None
        done = map(run, jobs) if run else (job.result() for job in [two.submit(learn, *job) for job in jobs])
        for found, model in tqdm(done, "training", total=len(jobs)):
            for name, row, columns in found:
                tables.setdefault(name, {}).setdefault(row, []).append(columns)
            if "words see 16" in (row for _, row, _ in found):
                halves.append(model)
    print(f"\nright answers in percent, {len(data[1].scenes)} new scenes, seeds {seeds}")
    print(table({row: seeds for row, seeds in tables["learned"].items() if seeds}))
    print("\nthe models that saw all patches while they learned, words now keep only some of them")
    print(table(tables["kept"]))
    print("\nquestions with the padding they had in training, and each without any: mean of all kinds")
    print(table(tables["mask"]))
    path = arguments.out / "shapes_vqa.png"
    draw_words(halves[0], encoder, path)
    print(f"\npicture of the patches each word keeps: {path}")


if __name__ == "__main__":
    main()
