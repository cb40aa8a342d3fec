"""Strong scaling of ShardedFeatureBank: the same bank and the same queries in all, on 1, 2 and 4 processes of gloo.

    .venv/bin/python bench/sharded_bank.py [--bank-size 65536] [--queries 256] [--rounds 9]

Prints a Markdown table: median milliseconds of the slowest rank for forward, forward+backward and update, and the bytes
that rank 0 received from others.  Every process has one thread; with fewer cores than processes they take turns.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PARTS = ("forward", "forward+backward", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("bank-size", 65536), ("channels", 256), ("topk", 32), ("queries", 256), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=number)
    asked = parser.parse_args()
    sizes = f"{asked.queries} queries, {asked.bank_size} rows of {asked.channels}, topk {asked.topk}"
    print(f"{sizes}; {os.cpu_count()} cores\n")
    print("| processes |" + "".join(f" {part}, ms |" for part in PARTS) + " bytes forward | backward | update |")
    print("|---|---|---|---|---|---|---|")
    for size in (1, 2, 4):
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(rank_main, (size, free_port(), asked, results), nprocs=size)
        times, received = results.get()
        shown = [f"{statistics.median(times[part]) * 1e3:.1f}" for part in PARTS]
        moved = [f"{sum(received.get(name, {}).values()):,}" for name in ("forward", "backward", "update")]
        print("|", " | ".join([str(size), *shown, *moved]), "|", flush=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_main(rank: int, size: int, port: int, asked: argparse.Namespace, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    from hivilt.distributed import ShardedFeatureBank

    M, C = asked.bank_size, asked.channels
    g = torch.Generator().manual_seed(0)
    bank = ShardedFeatureBank(M, C, topk=asked.topk, scale=C**-0.5)
    bank.update(torch.randn(M, C, generator=g)[rank * M // size : (rank + 1) * M // size])
    mine = slice(rank * asked.queries // size, (rank + 1) * asked.queries // size)
    query = torch.randn(asked.queries, C, generator=g)[mine].requires_grad_()
    rows = torch.randn(asked.queries, C, generator=g)[mine]

    def forward() -> None:
        with torch.no_grad():
            bank(query)

    def both() -> None:
        torch.autograd.grad(bank(query)[0].sum(), query)

    calls = dict(zip(PARTS, (forward, both, lambda: bank.update(rows)), strict=True))
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    for turn in range(asked.rounds + 1):
        for part, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn:  # the first warms up
                times[part].append(float(took))
    if rank == 0:
        results.put((times, bank.payload_bytes()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
