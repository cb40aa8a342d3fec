"""The processes of test_sharded_bank.py: what one rank does, and the cases, drawn alike everywhere from a seed.

Ranks are started once and then told, by name, which check to run; they answer with tensors or with the error they got.
"""

import io
import os
import random
import sys
import time
from datetime import timedelta

import fresh
import torch
import torch.distributed as dist
from torch import Tensor, nn

INF, NAN = float("inf"), float("nan")


def draw(seed: int, size: int) -> dict:
    """One random life of a bank for ``size`` ranks: pushes, queries, upstream gradients; the same on every rank."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    M, C, topk = r.randint(1, 60), r.randint(1, 24), r.choice([1, 2, 3, 5, 8, 13, 80])
    exact = r.random() < 0.7  # small integers: scores are exact, and tied across the shards
    query_dtype, bank_dtype = r.choice(
        [(torch.float32, torch.float32)] * 4
        + [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
        + [(torch.float64, torch.float64)]
    )
    special = r.random() < 0.25

    def rows(n: int, dtype: torch.dtype, wild: bool) -> Tensor:
        x = torch.randint(-2, 3, (n, C), generator=g).float() if exact else torch.randn(n, C, generator=g)
        if wild and n:
            for value in r.choices([NAN, INF, -INF], k=1 + n // 4):
                x[r.randrange(n), r.randrange(C)] = value
        return x.to(dtype)

    queries = [r.choice([0, 1, 3, 6]) for _ in range(size)]
    return {
        "M": M,
        "C": C,
        "topk": topk,
        "exact": exact,
        "dtype": bank_dtype,
        "scale": r.choice([1.0, 0.25, -0.5, 0.0]),
        "scale_is_parameter": r.random() < 0.5,
        "normalize": not exact and not special and r.random() < 0.6,
        "on_nonfinite": r.choice(["skip", "keep"]) if special else "skip",
        "pushes": [
            [rows(r.choice([0, 1, r.randint(0, M // size + 3)]), bank_dtype, special) for _ in range(size)]
            for _ in range(r.choice([0, 1, 2, 3]))
        ],
        "query": [rows(n, query_dtype, special and r.random() < 0.3) for n in queries],
        "exclude": [torch.randint(-1, M, (n,), generator=g) for n in queries] if r.random() < 0.3 else None,
        "grad_retrieved": [rows(n, query_dtype, False) for n in queries],
        "grad_scores": [torch.randn(n, topk, generator=g) for n in queries] if r.random() < 0.6 else None,
        "push_between": [rows(r.randint(0, 3), bank_dtype, False) for _ in range(size)],
    }


def make(x: dict, **changes):
    """A bank for a drawn case."""
    from hivilt.distributed import ShardedFeatureBank

    scale = nn.Parameter(torch.tensor(x["scale"])) if x["scale_is_parameter"] else x["scale"]
    names = ("topk", "normalize", "on_nonfinite", "dtype")
    return ShardedFeatureBank(
        x["M"], x["C"], scale=scale, **{name: x[name] for name in names} | {"timeout": 30.0} | changes
    )


def live(x: dict, rank: int) -> dict:
    """Pushes, forward, a push in between, backward: everything that comes out."""
    bank = make(x)
    for push in x["pushes"]:
        bank.update(push[rank])
    full = bank.full_state()
    query = x["query"][rank].clone().requires_grad_()
    retrieved, scores, indices = bank(query, None if x["exclude"] is None else x["exclude"][rank])
    bank.update(x["push_between"][rank])
    outputs, gradients = [retrieved], [x["grad_retrieved"][rank]]
    if x["grad_scores"] is not None:
        outputs.append(scores)
        gradients.append(x["grad_scores"][rank].to(scores.dtype))
    torch.autograd.backward(outputs, gradients)
    result = {"retrieved": retrieved, "scores": scores, "indices": indices, "query_grad": query.grad}
    if x["scale_is_parameter"]:
        result["scale_grad"] = bank.scale.grad
    result = {name: value.detach() for name, value in result.items()}
    return result | {f"full_{name}": value for name, value in full.items()} | {"local_rows": bank.bank.shape[0]}


def cases(rank: int, size: int, seeds: list) -> list:
    return [live(draw(seed, size), rank) for seed in seeds]


def repeats(rank: int, size: int, seeds: list, times: int) -> bool:
    """Whether every repetition gave the same bits."""
    same = True
    for seed in seeds:
        first = live(draw(seed, size), rank)
        for _ in range(times):
            for name, value in live(draw(seed, size), rank).items():
                if isinstance(value, Tensor):
                    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (first[name], value))
                    same &= torch.equal(a, b)
    return same


def refused(call) -> list:
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def misuse(rank: int, size: int) -> dict:
    """Calls that do not fit, on the last rank only; after each of them, whether the bank changed and still works."""
    from hivilt.distributed import ShardedFeatureBank

    odd = rank == size - 1

    def bank(**changes):
        return ShardedFeatureBank(10, 4, **{"topk": 3, "timeout": 30.0} | changes)

    good, x = bank(), torch.ones(2, 4)
    good.update(x)
    before = good.full_state()
    parameter = nn.Parameter(torch.tensor(2.0))
    bad = torch.tensor([[1.0, NAN, 0, 0]])
    graph = good(torch.ones(2, 4, requires_grad=True))[0], good(torch.ones(2, 4, requires_grad=True))[0]
    twins = bank(), bank()
    calls = {
        "topk": lambda: bank(topk=4 if odd else 3)(x),
        "bank_size": lambda: bank_of(11 if odd else 10, 4)(x),
        "feature_dim": lambda: bank_of(10, 5 if odd else 4)(torch.ones(2, 5 if odd else 4)),
        "bank_dtype": lambda: bank(dtype=torch.bfloat16 if odd else torch.float32)(x),
        "dtype": lambda: good(x.to(torch.bfloat16 if odd else torch.float32)),
        "scale": lambda: bank(scale=2.0 if odd else 1.0)(x),
        "scale_is_tensor": lambda: bank(scale=parameter if odd else 2.0)(x),
        "normalize": lambda: bank(normalize=odd)(x),
        "on_nonfinite": lambda: bank(on_nonfinite="keep" if odd else "skip").update(x),
        "records": lambda: good(x.clone().requires_grad_(odd)),
        "exclude": lambda: good(x, torch.zeros(2, dtype=torch.int64) if odd else None),
        "operation": lambda: good.update(x) if odd and size > 1 else good(x),
        "of_call": lambda: graph[1 if odd else 0].sum().backward(),
        "module": lambda: twins[odd](x),
        "query": lambda: good(x[0] if odd else x),
        "shape (B, 4)": lambda: good(torch.ones(2, 5) if odd else x),
        "a tensor (B, C)": lambda: good.update(None if odd else x),
        "float64 exactly": lambda: good(x.double()),
        "values from -1 to 9": lambda: good(x, torch.full((2,), 10 if odd else 1)),
        "finite in float32": lambda: bank(on_nonfinite="raise").update(bad if odd else x),
    }

    def bank_of(M, C):
        return ShardedFeatureBank(M, C, topk=3, timeout=30.0)

    def state_differs():
        other = bank()
        other.filled.fill_(3 if odd else 2)
        other(x)

    calls["filled"] = state_differs
    found = {}
    for name, call in calls.items():
        said = refused(call)
        now = good.full_state()
        good(x)
        found[name] = said + [all(torch.equal(now[key], before[key]) for key in before)]
    return found


def constructions(rank: int, size: int) -> list:
    """Every malformed argument of the constructor, refused without a word to the other ranks."""
    from hivilt.distributed import ShardedFeatureBank

    good = {"bank_size": 8, "feature_dim": 4, "topk": 2}
    wrong = [
        ("bank_size", 0), ("bank_size", 2.5), ("bank_size", True), ("feature_dim", -1), ("feature_dim", "4"),
        ("topk", 0), ("topk", None), ("topk", 1.5), ("topk", 2**70), ("scale", NAN), ("scale", "1"),
        ("scale", torch.ones(2)), ("scale", torch.ones(1, dtype=torch.int64)), ("timeout", 0), ("timeout", -1.0),
        ("timeout", "1"), ("normalize", 1), ("on_nonfinite", "drop"), ("on_nonfinite", None), ("dtype", torch.int32),
        ("bank_size", size * 2**31 + 1),
    ]  # fmt: skip
    return [[name, *refused(lambda y=good | {name: value}: ShardedFeatureBank(**y))] for name, value in wrong]


def checkpoint(rank: int, size: int, states: list | None = None) -> dict:
    """Without states: this rank's state of a bank that has wrapped round.  With: the bank that loads its own of them,
    what it retrieves, and what happens to the state of another rank and of another size."""
    from hivilt.distributed import ShardedFeatureBank

    bank = ShardedFeatureBank(11, 3, topk=4, timeout=30.0)
    if states is None:
        g = torch.Generator().manual_seed(5)
        for _ in range(2):
            rows = torch.randn(8, 3, generator=g)
            bank.update(rows[rank * 8 // size : (rank + 1) * 8 // size])
        full = bank.full_state()
        again = ShardedFeatureBank(11, 3, topk=4, timeout=30.0)
        again.load_full_state(full)
        same = all(torch.equal(value, bank.state_dict()[name]) for name, value in again.state_dict().items())
        return {"state": bank.state_dict(), "full": full, "same": same}
    bank.load_state_dict(states[rank])
    query = torch.arange(6.0).view(2, 3)
    retrieved, scores, indices = bank(query)
    kept = bank.bank.clone()
    other = refused(lambda: bank.load_state_dict(states[(rank + 1) % size])) if size > 1 else ["RuntimeError", "shard"]
    lame = dict(states[rank], ptr=torch.tensor([11]))
    return {
        "indices": indices, "scores": scores, "retrieved": retrieved, "full": bank.full_state(), "other": other,
        "cursor": refused(lambda: bank.load_state_dict(lame)),
        "missing": refused(lambda: bank.load_state_dict({"bank": states[rank]["bank"]})),
        "untouched": torch.equal(kept, bank.bank),
    }  # fmt: skip


def payload(rank: int, size: int, batch: int, M: int, C: int, topk: int, skewed: bool) -> dict:
    """Bytes of a forward and a backward, after a push of 2 M rows of which the last M stay; skewed: all that queries
    look for lies on rank 0."""
    from hivilt.distributed import ShardedFeatureBank

    bank = ShardedFeatureBank(M, C, topk=topk, timeout=60.0)
    g = torch.Generator().manual_seed(1)
    features = torch.randn(M, C, generator=g)
    if skewed:
        features[torch.arange(M) % size != 0] *= 1e-3
    query = torch.randn(size, batch, C, generator=g)[rank].requires_grad_()
    features = torch.cat([torch.full_like(features, 9.0), features])
    bank.update(features[rank * 2 * M // size : (rank + 1) * 2 * M // size])
    bank(query)[0].sum().backward()
    return bank.payload_bytes()


def data_parallel(rank: int, size: int) -> dict:
    """A model with a bank under DistributedDataParallel with its defaults, five steps."""
    from hivilt.distributed import ShardedFeatureBank

    torch.manual_seed(rank)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)
            self.bank = ShardedFeatureBank(8, 4, topk=2, scale=nn.Parameter(torch.tensor(1.0)), timeout=30.0)

        def forward(self, x):
            x = self.project(x)
            self.bank.update(x)
            return self.bank(x)[0]

    model = Model()
    expected = model.bank.bank.clone()
    wrapped = nn.parallel.DistributedDataParallel(model)
    same = True
    for step in range(5):
        x = torch.randn(1, 4, generator=torch.Generator().manual_seed(100 * step + rank))
        every = [
            model.project(torch.randn(1, 4, generator=torch.Generator().manual_seed(100 * step + other))).detach()
            for other in range(size)
        ]
        for other, row in enumerate(every):
            slot = (step * size + other) % 8
            if slot % size == rank:
                expected[slot // size] = row[0]
        wrapped(x).square().sum().backward()
        same &= torch.equal(expected, model.bank.bank)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    return {"same": same, "weight": model.project.weight.detach(), "bank": model.bank.bank}


def broken_shard(rank: int, size: int) -> list:
    """The retrieval of one shard fails: all ranks raise, together, and go on."""
    from hivilt.distributed import ShardedFeatureBank, candidates

    bank, x = ShardedFeatureBank(8, 4, topk=2, timeout=30.0), torch.ones(1, 4)
    bank.update(x)
    whole = candidates.bank_retrieval

    def fails(*args, **options):
        raise MemoryError("planted")

    if rank == 0:
        candidates.bank_retrieval = fails
    try:
        said = refused(lambda: bank(x))
    finally:
        candidates.bank_retrieval = whole
    return said + [bank(x)[2].tolist()]


def stalled(rank: int, size: int, timeout: float, phase: str) -> dict:
    """The last rank sleeps through a call, before it or in the middle of it; only a group made for this is lost."""
    from hivilt.distributed import ShardedFeatureBank, exchange

    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=60))
    bank = ShardedFeatureBank(8, 4, topk=2, timeout=timeout, process_group=group)
    x = torch.full((1, 4), float(rank))
    bank.update(x)
    query = torch.ones(1, 4, requires_grad=True)
    out = bank(query)[0]
    kept = bank.bank.clone()
    calls = {"update": lambda: bank.update(x), "backward": lambda: out.sum().backward()}
    call = calls.get(phase, lambda: bank(query))
    whole = exchange.Exchange.all_max

    def slow(self, *args):
        time.sleep(timeout + 1.2)
        return whole(self, *args)

    if rank == size - 1:
        if phase == "middle":
            exchange.Exchange.all_max = slow
        else:
            time.sleep(timeout + 1.2)
    start = time.monotonic()
    said = refused(call)
    took = time.monotonic() - start
    exchange.Exchange.all_max = whole
    start = time.monotonic()
    again = refused(lambda: bank.update(x))
    result = {"said": said, "took": took, "again": again, "again_took": time.monotonic() - start}
    result["untouched"] = torch.equal(kept, bank.bank)
    dist.barrier()  # the default group lives on
    return result


def dies(rank: int, size: int, timeout: float) -> dict:
    """The last rank is gone; what the others get, and when."""
    from hivilt.distributed import ShardedFeatureBank

    bank = ShardedFeatureBank(8, 4, topk=2, timeout=timeout)
    bank.update(torch.ones(1, 4))
    dist.barrier()
    if rank == size - 1:
        os._exit(0)
    start = time.monotonic()
    return {"said": refused(lambda: bank(torch.ones(1, 4))), "took": time.monotonic() - start}


CHECKS = {
    check.__name__: check
    for check in (
        cases, repeats, misuse, constructions, checkpoint, payload, data_parallel, broken_shard, stalled, dies,
    )
}  # fmt: skip


def pack(x) -> bytes:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def unpack(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=True)


def serve(rank: int, size: int, store: str, orders) -> None:
    """One rank's process: does what it is told until told nothing."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while name := (order := unpack(orders.recv_bytes()))["check"]:
        try:
            answer = {"result": CHECKS[name](rank, size, **order["arguments"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        orders.send_bytes(pack(answer))
    sys.stdout.flush()
    os._exit(0)  # whatever state a group was left in, the process ends


class Ranks:
    """``size`` processes with a gloo group; ``run`` makes all of them do one check.  After one that killed some of them
    new ones are started."""

    serve = staticmethod(serve)

    def __init__(self, size: int, folder):
        self.size, self.folder, self.starts = size, folder, 0
        self.start()

    def start(self) -> None:
        self.pipes, self.processes = [], []
        self.starts += 1
        store = str(self.folder / f"store{self.starts}")
        for rank in range(self.size):
            here, there = fresh.context.Pipe()
            process = fresh.context.Process(target=self.serve, args=(rank, self.size, store, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, check: str, gone: int = 0, wait: float = 90.0, **arguments) -> list:
        """Every rank's result, without those of the last ``gone`` ranks, of which none is expected."""
        if not all(process.is_alive() for process in self.processes):
            self.stop()
            self.start()
        for pipe in self.pipes:
            pipe.send_bytes(pack({"check": check, "arguments": arguments}))
        end, answers = time.monotonic() + wait, []
        for rank, pipe in enumerate(self.pipes[: self.size - gone]):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                self.kill()
                raise AssertionError(f"{check}: rank {rank} of {self.size} did not answer within {wait} s")
            answers.append(unpack(pipe.recv_bytes()))
        errors = [f"rank {rank}: {a['error']}" for rank, a in enumerate(answers) if "error" in a]
        assert not errors, f"{check}: " + "\n".join(errors)
        return [answer["result"] for answer in answers]

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send_bytes(pack({"check": "", "arguments": {}}))
        for process in self.processes:
            process.join(10)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
