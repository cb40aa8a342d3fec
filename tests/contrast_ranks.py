"""The processes of test_contrastive_loss_group.py: what one rank does; see shard_ranks.py."""

import plain_contrastive_loss as plain
import shard_ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hivilt

CASES = {
    "clip": {"B": 11, "C": 6, "bias": True},
    "one way": {"B": 11, "C": 6, "symmetric": False},
    "queries": {"B": 11, "C": 6, "R": 3},
    "siglip": {"B": 11, "C": 6, "kind": "siglip", "bias": True},
    "bf16": {"B": 11, "C": 6, "dtype": torch.bfloat16},
    "float64": {"B": 11, "C": 6, "dtype": torch.float64},
}
SPLITS = [5, 6]  # rows of each of two ranks


def part(x: Tensor, rank: int) -> Tensor:
    return x.split(SPLITS)[rank]


def losses(rank: int, size: int) -> dict:
    """Loss and gradients of this rank's rows, of every case; and that of another number of threads."""
    found = {}
    for name, settings in CASES.items():
        x = plain.call(seed=3, **settings)
        mine = x | {side: part(x[side], rank) for side in "xy"}

        def loss(**named):
            return hivilt.losses.contrastive_loss(**named, group=dist.group.WORLD)

        found[name] = plain.gradients(loss, mine)
        torch.set_num_threads(2)
        again = plain.gradients(loss, mine)
        torch.set_num_threads(1)
        assert all(torch.equal(again[n], v) for n, v in found[name].items()), name
        with torch.no_grad():
            assert torch.equal(loss(**mine), found[name]["loss"])
    queries = plain.call(11, 6, 3, seed=3)
    itc = hivilt.losses.itc_loss(part(queries["x"], rank), part(queries["y"], rank), 10.0, group=dist.group.WORLD)
    assert torch.equal(itc, found["queries"]["loss"])
    x = plain.call(11, 6, seed=3)
    frozen = part(x["y"], rank)  # a tower that is not trained: no gradient travels
    leaf = part(x["x"], rank).clone().requires_grad_()
    hivilt.losses.contrastive_loss(leaf, frozen, 10.0, group=dist.group.WORLD).backward()
    found["frozen"] = {"x": leaf.grad}
    return found


def refusals(rank: int, size: int) -> dict:
    """What each rank is told when rank 1 differs; between them a good call, which must still work."""
    x, y = torch.ones(4, 6), torch.eye(4, 6)
    changes = {
        "channels": {"x": torch.ones(4, 5), "y": torch.ones(4, 5)},
        "dtype": {"x": x.double(), "y": y.double()},
        "shape": {"y": torch.ones(3, 6)},
        "rank": {"x": torch.ones(4)},
        "kind": {"kind": "siglip"},
        "unknown kind": {"kind": "nope"},
        "symmetric": {"symmetric": False},
        "scale": {"logit_scale": 3.0},
        "gradient": {"x": x.clone().requires_grad_()},
        "labels": {"labels": torch.arange(4), "symmetric": False},
        "empty": {"x": x[:0], "y": y[:0]},
        "no tensor": {"x": None},
    }
    told = {}
    for name, change in changes.items():
        call = {"x": x, "y": y, "logit_scale": 2.0} | (change if rank == 1 else {})
        try:
            hivilt.losses.contrastive_loss(**call, group=dist.group.WORLD)
            told[name] = ("nothing", "")
        except (TypeError, ValueError) as error:
            told[name] = (type(error).__name__, str(error))
        assert hivilt.losses.contrastive_loss(x, y, 2.0, group=dist.group.WORLD).isfinite()
    return told


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(5, 4), nn.Linear(7, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, texts):
        return self.image(images), self.text(texts), self.logit_scale.exp()


def batch() -> tuple[Tensor, Tensor]:
    return plain.numbers(1, 11, 5), plain.numbers(2, 11, 7)


def data_parallel(rank: int, size: int) -> dict:
    """Gradients that DistributedDataParallel averages."""
    model = nn.parallel.DistributedDataParallel(Towers())
    x, y, scale = model(*(part(t, rank) for t in batch()))
    loss = hivilt.losses.contrastive_loss(x, y, scale, group=dist.group.WORLD)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.module.named_parameters()}


CHECKS = {check.__name__: check for check in (losses, refusals, data_parallel)}


def serve(rank: int, size: int, store: str, orders) -> None:
    shard_ranks.CHECKS.update(CHECKS)
    shard_ranks.serve(rank, size, store, orders)


class LossRanks(shard_ranks.Ranks):
    serve = staticmethod(serve)
