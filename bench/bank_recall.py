"""Recall against time: how much of the exact top-k each way to search a bank finds, and what it costs.

    .venv/bin/python bench/bank_recall.py [--picture docs/bank_recall.png]

hivilt in its three precisions, plain PyTorch, and FAISS where it is installed: IndexFlatIP as it comes and with BLAS
forced, and the approximate IndexIVFFlat at several numbers of probes (its training is not timed).  Normal data, on
which an index of clusters has nothing to hold on to.  One thread, and the CPU time of this process, so that a busy
machine shows as little as possible; rivals in turn.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hivilt.ops import bank_retrieval

PROBES = (4, 16, 64, 128)
LISTS = 128


def ways(query: Tensor, bank: Tensor, topk: int) -> dict[str, Callable[[], Tensor]]:
    """Label -> call that returns the indices."""
    found: dict[str, Callable[[], Tensor]] = {"PyTorch": lambda: (query @ bank.mT).topk(topk).indices}
    for precision in ("exact", "fp32", "bf16"):
        call = functools.partial(bank_retrieval, query, bank, topk, precision=precision)
        found[f"hivilt {precision}"] = lambda call=call: call()[2]
    if importlib.util.find_spec("faiss") is None:
        return found
    import faiss

    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(bank.shape[1])
    flat.add(bank.numpy())
    default = faiss.cvar.distance_compute_blas_threshold

    def search(index, blas: int = default) -> Tensor:
        faiss.cvar.distance_compute_blas_threshold = blas
        try:
            return torch.from_numpy(index.search(query.numpy(), topk)[1])
        finally:
            faiss.cvar.distance_compute_blas_threshold = default

    found["FAISS flat"] = lambda: search(flat)
    found["FAISS flat, BLAS"] = lambda: search(flat, blas=1)
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(bank.shape[1]), bank.shape[1], LISTS, faiss.METRIC_INNER_PRODUCT)
    inverted.train(bank[:: max(1, bank.shape[0] // (40 * LISTS))].numpy())
    inverted.add(bank.numpy())

    def probe(n: int) -> Tensor:
        inverted.nprobe = n
        return search(inverted)

    return found | {f"FAISS IVF, {n} of {LISTS}": functools.partial(probe, n) for n in PROBES}


def measure(query: Tensor, bank: Tensor, topk: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Label -> (recall against float64, median milliseconds)."""
    true = (query.double() @ bank.double().mT).topk(topk).indices
    calls = ways(query, bank, topk)
    recall = {}
    for label, call in calls.items():
        indices = call()
        recall[label] = statistics.mean(
            len(set(a) & set(b)) / topk for a, b in zip(indices.tolist(), true.tolist(), strict=True)
        )
    times: dict[str, list[float]] = {label: [] for label in calls}
    order = list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for label in order:
            start = time.process_time()
            calls[label]()
            times[label].append(time.process_time() - start)
    return {label: (recall[label], 1e3 * statistics.median(times[label])) for label in calls}


def draw(results: dict[str, tuple[float, float]], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for label, (recall, ms) in results.items():
        colour = "C0" if label.startswith("hivilt") else "C1" if label.startswith("FAISS") else "C2"
        axes.plot(ms, recall, "o", color=colour)
        axes.annotate(
            label, (ms, recall), (3, -10 - 9 * (list(results).index(label) % 3)), textcoords="offset points", size=7
        )
    axes.set(xscale="log", xlabel="ms, one thread", ylabel="recall", title=title, ylim=(None, 1.05))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture")
    for name, number in (("queries", 256), ("bank-size", 50_000), ("channels", 192), ("topk", 100), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=number)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    query, bank = (torch.randn(n, asked.channels, generator=g) for n in (asked.queries, asked.bank_size))
    results = measure(query, bank, asked.topk, asked.rounds)
    print("| | recall | ms |\n|---|---|---|")
    for label, (recall, ms) in results.items():
        print(f"| {label} | {recall:.4f} | {ms:.1f} |")
    if asked.picture:
        title = f"{asked.queries} queries, {asked.bank_size} rows of {asked.channels}, the {asked.topk} best"
        draw(results, title, asked.picture)


if __name__ == "__main__":
    main()
