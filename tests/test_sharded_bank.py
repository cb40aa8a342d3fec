"""The sharded bank on 1, 2 and 4 gloo processes, held to one float64 bank in plain torch: results, gradients, pushes,
refusals, dead and stalled ranks, checkpoints for another number of ranks, bytes on the wire."""

import pytest
import shard_ranks
import torch
from torch import Tensor
from torch.nn.functional import normalize

import hivilt
from hivilt.distributed import ShardedFeatureBank, reshard

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")
SEEDS = list(range(70))
LIVES = {1: 70, 2: 35, 4: 20}  # a life takes some 25 collectives, each of them slow where processes outnumber cores
INF, NAN = float("inf"), float("nan")
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"{size}-ranks")
def ranks(request, tmp_path_factory):
    started = shard_ranks.Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


class OneBank:
    """All rows in one place: a ring that is written row by row, scores in float64, sorted as the contract says."""

    def __init__(self, x: dict):
        self.x, self.rows = x, torch.zeros(x["M"], x["C"], dtype=torch.float64)
        self.ptr = self.filled = self.skipped = 0
        for push in x["pushes"]:
            for row in torch.cat(push):
                self.push(row)

    def push(self, row: Tensor) -> None:
        if self.x["on_nonfinite"] == "skip" and not row.isfinite().all():
            self.skipped += 1
            return
        self.rows[self.ptr] = self.unit(row[None])[0]
        self.ptr, self.filled = (self.ptr + 1) % self.x["M"], min(self.filled + 1, self.x["M"])

    def unit(self, x: Tensor, least: torch.dtype | None = None) -> Tensor:
        """As it is held: in its own dtype; a query at least in float32."""
        dtype = x.dtype if least is None else torch.promote_types(x.dtype, least)
        return normalize(x.double(), dim=1).to(dtype).double() if self.x["normalize"] else x.double()

    def order(self, query: Tensor, exclude: int) -> tuple[list[int], Tensor, bool]:
        """Valid slots, best first; their scores; whether a NaN is among them."""
        scores = (self.rows[: self.filled] * query).sum(1)
        valid = [j for j in range(self.filled) if scores[j] != -INF and j != exclude]
        valid.sort(key=lambda j: (bool(scores[j].isnan()), -float(scores[j]) if scores[j] == scores[j] else 0.0, j))
        return valid, scores, bool(scores[valid].isnan().any())


def close(got: Tensor, true: Tensor, bound: Tensor, what: str) -> None:
    """Within the bound; NaN where the truth is NaN."""
    assert got.shape == true.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(true.shape)}"
    assert torch.equal(got.isnan(), true.isnan()), f"{what}: NaN in other places"
    over = (got.double() - true).abs() > bound
    assert not over.any(), f"{what}: {int(over.sum())} over budget: {got[over][:3]}, expected {true[over][:3]}"


def judge(x: dict, got: dict, rank: int, size: int, what: str) -> None:
    """One rank's results of one drawn life against one bank."""
    one, topk, scale = OneBank(x), x["topk"], x["scale"]
    u = UNIT[torch.float64 if x["query"][0].dtype == torch.float64 else torch.float32]
    round_result = UNIT[x["query"][0].dtype]
    assert got["local_rows"] == (x["M"] - rank + size - 1) // size
    assert (int(got["full_ptr"]), int(got["full_filled"])) == (one.ptr, one.filled), what
    assert int(got["full_skipped"]) == one.skipped, what
    stored = got["full_bank"].double()
    slack = 4 * UNIT[x["dtype"]] if x["normalize"] else 0.0
    torch.testing.assert_close(stored, one.rows, rtol=0, atol=slack, equal_nan=True)
    one.rows = stored  # from here on the rows as they are held
    scale_grad = scale_bound = 0.0
    excludes = x["exclude"][rank].tolist() if x["exclude"] else [-1] * x["query"][rank].shape[0]
    for i, (raw, exclude) in enumerate(zip(x["query"][rank], excludes, strict=True)):
        name = f"{what}: query {i}"
        leaf = raw.double().requires_grad_()
        query = leaf
        if x["normalize"]:  # the rounded one is looked up, and the gradient passes through the division
            query = normalize(leaf[None], dim=1)[0]
            query = query + (one.unit(raw[None], torch.float32)[0] - query).detach()
        order, scores, lost = one.order(query.detach(), exclude)
        scores = scores.detach()
        found = got["indices"][i]
        listed = found[found >= 0].tolist()
        assert len(listed) == min(topk, len(order)) and (found[len(listed) :] == -1).all(), f"{name}: number listed"
        reach = one.rows[: one.filled].nan_to_num(0.0, 0.0, 0.0).abs() @ query.detach().nan_to_num(0.0, 0.0, 0.0).abs()
        noise = u * (x["C"] + 8) * float(reach.max()) if one.filled and not x["exact"] else 0.0
        if x["exact"] or lost:
            assert listed == order[:topk], f"{name}: {listed}, expected {order[:topk]}"
        else:  # the same but for scores closer than rounding, then in any order
            assert len(set(listed)) == len(listed) and set(listed) <= set(order), name
            one_score, other = scores[listed], scores[order[: len(listed)]]
            assert ((one_score == other) | ((one_score - other).abs() <= 2 * noise)).all(), (
                f"{name}: {listed}, expected {order[:topk]}"
            )
        kept = scores[listed]
        true_scores = torch.cat([kept + (NAN if lost else 0.0), torch.full((topk - len(listed),), -INF).double()])
        if x["exact"]:
            assert torch.equal(got["scores"][i].double().nan_to_num(7.5), true_scores.nan_to_num(7.5)), name
        else:
            close(got["scores"][i], true_scores, torch.full((topk,), noise), f"{name}: scores")
        g = x["grad_retrieved"][rank][i].double()
        ds = x["grad_scores"][rank][i].double()[: len(listed)] if x["grad_scores"] else torch.zeros(len(listed))
        factor = torch.tensor(float(scale), dtype=torch.float64, requires_grad=True)
        rows = one.rows[listed]
        dots = (rows * query).sum(1) + (NAN if lost else 0.0)
        shares = (factor * dots).softmax(0)
        out = (shares[:, None] * rows).sum(0) if listed else torch.zeros(x["C"]).double()
        if listed:
            of_query, of_scale = torch.autograd.grad(
                (out * g).sum() + (dots * ds).sum(), (leaf, factor), allow_unused=True
            )
        else:
            of_query, of_scale = torch.zeros(x["C"]).double(), torch.zeros(()).double()
        # Budgets: rounding of what is added up, and of the scores where they are not exact.
        steps, p, size_of = (16 + x["C"]) * u + 4 * abs(scale) * noise, shares.detach(), rows.abs()
        out = out.detach()
        close(
            got["retrieved"][i], out, steps * (p @ size_of) + 2 * round_result * out.abs() + 1e-30, f"{name}: retrieved"
        )
        pull = size_of @ g.abs()
        spread = p * (pull + p @ pull)
        bound = ((abs(scale) * spread + ds.abs())[:, None] * size_of).sum(0)
        if x["normalize"] and listed:  # through the division by the length every channel meets every other
            bound = (bound + bound.norm()) / leaf.detach().norm().clamp(min=1e-12)
        close(got["query_grad"][i], of_query, steps * bound + 2 * round_result * of_query.abs() + 1e-30, f"{name}: dq")
        scale_grad = scale_grad + of_scale
        scale_bound = scale_bound + steps * (spread @ kept.abs()) if listed else scale_bound
    if x["scale_is_parameter"]:
        true = torch.as_tensor(scale_grad, dtype=torch.float64)
        limit = torch.as_tensor(scale_bound, dtype=torch.float64) + 2 * UNIT[torch.float32] * true.abs() + 1e-30
        close(got["scale_grad"], true, limit, f"{what}: dscale")


def test_random_lives_equal_one_bank(ranks):
    """Results, selection, every gradient and every counter, over uneven, empty and wrapping pushes, ties across shards,
    shards smaller than topk, banks smaller than the number of ranks, NaN, exclusions, and a push before backward."""
    seeds = SEEDS[: LIVES[ranks.size]]
    for rank, results in enumerate(ranks.run("cases", seeds=seeds)):
        for seed, got in zip(seeds, results, strict=True):
            judge(
                shard_ranks.draw(seed, ranks.size), got, rank, ranks.size, f"case {seed}, rank {rank} of {ranks.size}"
            )


def test_cases_reach_what_they_are_for():
    """The drawn lives hold the situations that the test above names."""
    lives = [shard_ranks.draw(seed, 4) for seed in SEEDS]
    banks = [OneBank(x) for x in lives]
    assert sum(x["M"] < 4 for x in lives) >= 1 and sum(x["M"] // 4 < x["topk"] < x["M"] for x in lives) >= 10
    assert sum(b.filled == 0 for b in banks) >= 5 and sum(0 < b.filled < x["M"] for b, x in zip(banks, lives)) >= 10  # noqa: B905
    assert sum(b.filled == x["M"] and b.ptr > 0 for b, x in zip(banks, lives)) >= 10  # noqa: B905
    assert sum(bool(b.rows.isnan().any()) for b in banks) >= 2 and sum(b.skipped > 0 for b in banks) >= 2
    assert sum(any(q.isnan().any() for q in x["query"]) for x in lives) >= 2


@pytest.mark.parametrize("wrong", ["retrieved", "query_grad", "scale_grad", "indices", "full_skipped"])
def test_judge_refuses_a_wrong_result(wrong):
    """One number off by a ten-thousandth, two slots swapped, one row uncounted."""
    lives = (shard_ranks.draw(seed, 1) for seed in SEEDS)
    x = next(x for x in lives if x["scale_is_parameter"] and x["scale"] and x["exact"] and x["topk"] > 2
             and x["on_nonfinite"] == "skip" and x["query"][0].shape[0] and x["query"][0].dtype == torch.float32
             and x["query"][0].isfinite().all() and OneBank(x).filled > 2)  # fmt: skip
    got = shard_ranks.live(x, 0)
    judge(x, got, 0, 1, "right")
    value = got[wrong].clone()
    if wrong == "indices":
        value[0, :2] = value[0, :2].flip(0)
    elif wrong == "full_skipped":
        value += 1
    else:
        at = value.abs().flatten().argmax()
        value.view(-1)[at] *= 1.0001
    with pytest.raises(AssertionError):
        judge(x, got | {wrong: value}, 0, 1, "planted")


def test_bits_repeat(ranks):
    assert ranks.run("repeats", seeds=[3, 11, 24], times=3) == [True] * ranks.size


def test_selection_has_the_bits_of_one_bank(ranks):
    """Also where scores are not exact: indices and scores equal those of the operator on all rows, bit for bit."""
    seeds = [s for s in SEEDS if not (x := shard_ranks.draw(s, ranks.size))["exact"] and x["on_nonfinite"] == "skip"
             and x["dtype"] != torch.float64 and not x["normalize"]][:8]  # fmt: skip
    for rank, results in enumerate(ranks.run("cases", seeds=seeds)):
        for seed, got in zip(seeds, results, strict=True):
            x = shard_ranks.draw(seed, ranks.size)
            query = x["query"][rank]
            _, scores, indices = hivilt.ops.bank_retrieval(
                query,
                got["full_bank"],
                x["topk"],
                count=got["full_filled"],
                exclude=x["exclude"] and x["exclude"][rank],
            )
            torch.testing.assert_close(got["scores"], scores, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got["indices"], indices), f"case {seed}"


def test_malformed_constructions_name_the_argument(ranks):
    for found in ranks.run("constructions"):
        for name, kind, text in found:
            assert kind in ("ValueError", "TypeError") and name in text and "expected" in text, (name, kind, text)


def test_misuse_raises_the_same_error_on_every_rank(ranks):
    """And changes nothing, and the next call works."""
    every = ranks.run("misuse")
    alone = ranks.size == 1  # then there is nobody to differ from
    differ = ("topk", "bank_size", "feature_dim", "bank_dtype", "dtype", "scale", "scale_is_tensor", "normalize",
              "on_nonfinite", "records", "exclude", "operation", "of_call", "module", "filled")  # fmt: skip
    for name, (kind, text, unchanged) in every[0].items():
        if alone and name in differ:
            continue
        assert all(other[name] == [kind, text, unchanged] for other in every), [other[name] for other in every]
        expected = "TypeError" if name in ("a tensor (B, C)", "float64 exactly") else "ValueError"
        assert kind == expected and name in text, (name, kind, text)
        assert unchanged, name
        if name in differ:
            assert "expected the same on every rank" in text and f"rank {ranks.size - 1}" in text, text


def test_a_shard_that_fails_is_told_to_all(ranks):
    every = ranks.run("broken_shard")
    assert every[0][0] == "MemoryError"
    for kind, text, _ in every[1:]:
        assert kind == "ShardError" and "another rank" in text
    assert all(indices == every[0][2] for *_, indices in every)


@pytest.mark.parametrize("phase", ["forward", "update", "backward", "middle"])
@pytest.mark.parametrize("ranks", [2], indirect=True, scope="module", ids=["2-ranks"])
def test_stalled_rank(ranks, phase):
    """The others raise ShardError in time, and again at once; the late one raises too; no shard has changed."""
    late = ranks.size - 1
    for rank, got in enumerate(ranks.run("stalled", timeout=0.8, phase=phase)):
        kind, text = got["said"]
        assert kind == "ShardError" and f"rank {rank} of" in text, got
        assert got["took"] < 1.8 or rank == late, got
        assert got["again"][0] == "ShardError" and "failed before" in got["again"][1] and got["again_took"] < 0.5, got
        assert got["untouched"]


def test_checkpoint_moves_to_any_number_of_ranks(ranks):
    states = [dict(found["state"]) for found in ranks.run("checkpoint")]
    found = ranks.run("checkpoint")
    assert all(each["same"] for each in found)
    g = torch.Generator().manual_seed(5)
    rows = torch.cat([torch.randn(8, 3, generator=g) for _ in range(2)])
    ring = torch.zeros(11, 3)
    for i, row in enumerate(rows):
        ring[i % 11] = row
    for each in found:
        assert torch.equal(each["full"]["bank"], ring) and int(each["full"]["ptr"]) == 16 % 11
    for size in (1, 2, 3, 4, 13):  # there and back again, 13: more ranks than slots
        for name, value in reshard(reshard(states, size), ranks.size)[ranks.size - 1].items():
            assert torch.equal(value, states[-1][name]), name
    # The shards of another number of ranks, in these processes.
    query = torch.arange(6.0).view(2, 3)
    order = (query.double() @ ring.double().T).argsort(dim=1, descending=True, stable=True)[:, :4]
    for got in ranks.run("checkpoint", states=reshard(reshard(states, 3), ranks.size)):
        assert torch.equal(got["full"]["bank"], ring) and torch.equal(got["indices"], order)
        assert got["other"][0] == "RuntimeError" and "shard" in got["other"][1]
        assert got["cursor"][0] == "RuntimeError" and "ptr: expected from 0 to 10; got 11" in got["cursor"][1]
        assert got["missing"][0] == "RuntimeError" and "ptr" in got["missing"][1] and got["untouched"]


def test_reshard_refuses_what_does_not_belong_together():
    bank = ShardedFeatureBank(6, 2, topk=2)
    bank.update(torch.ones(4, 2))
    whole = dict(bank.state_dict())
    two = reshard([whole], 2)
    for states, size, kind in (
        ([], 1, ValueError),
        ([two[0]], 1, ValueError),
        ([two[1], two[0]], 1, ValueError),
        ([two[0], two[1] | {"filled": torch.tensor(3)}], 1, ValueError),
        ([two[0], two[1] | {"bank": two[1]["bank"][:1]}], 1, ValueError),
        ([{"bank": whole["bank"]}], 1, ValueError),
        ([whole | {"ptr": torch.tensor([6])}], 1, ValueError),
        ([whole | {"filled": torch.tensor(-1)}], 1, ValueError),
        ([whole | {"ptr": torch.tensor([1], dtype=torch.int32)}], 1, ValueError),
        ([whole], 0, ValueError),
        ([whole], 2.0, TypeError),
    ):
        with pytest.raises(kind, match=r"reshard: .*expected .*; got"):
            reshard(states, size)


def test_load_full_state_refuses_before_it_writes():
    bank = ShardedFeatureBank(6, 2, topk=2)
    bank.update(torch.ones(4, 2))
    full = bank.full_state()
    for wrong in ({"bank": torch.ones(5, 2)}, {"ptr": torch.tensor([-1])}, {"filled": None}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            bank.load_full_state(
                {"bank": torch.zeros(6, 2), **{k: full[k] for k in ("ptr", "filled", "skipped")}, **wrong}
            )
        assert torch.equal(bank.full_state()["bank"], full["bank"])


def test_payload_shrinks_with_the_cut(ranks):
    """Candidates: about topk a query instead of topk from every rank; sums only from shards with a winner; each push
    travels once."""
    W, B, M, C, topk = ranks.size, 32, 4096, 16, 32
    every = ranks.run("payload", batch=B, M=M, C=C, topk=topk, skewed=False)
    skewed = ranks.run("payload", batch=B, M=M, C=C, topk=topk, skewed=True)
    if W == 1:
        assert all(sum(phases.values()) == 0 for got in every for phases in got.values())
        return
    uncut = (W - 1) * B * topk * 8  # score and row from every other rank
    for rank, got in enumerate(every):
        forward, backward = got["forward"], got["backward"]
        assert forward["header"] == backward["header"] == (W - 1) * 512
        assert forward["queries"] == (W - 1) * B * C * 4
        assert forward["counts"] == (W - 1) * B * 4 and forward["merged"] == (W - 1) * B * 24
        assert (W - 1) / W * 0.9 * B * topk * 8 < forward["candidates"] < (0.8 if W == 2 else 0.55) * uncut
        assert forward["sums"] <= (W - 1) * B * C * 4 and backward["sums"] <= (W - 1) * B * (C + 1) * 4
        assert sum(forward.values()) < uncut + (W - 1) * B * (2 * C * 4 + 64) + 10_000
        assert got["update"]["features"] <= M // W * C * 4  # of 2 M rows pushed the first M are never sent
        # All winners on rank 0: the others get theirs from it alone, and send it nothing.
        alone = skewed[rank]["forward"]
        assert alone["sums"] == (0 if rank == 0 else B * C * 4)
        assert alone["candidates"] <= B * topk * 8 and (rank > 0 or alone["candidates"] == 0)


def test_what_overflows_in_the_bank_is_not_finite():
    """Judged as it would be held: 1e6 is no float16."""
    features = torch.tensor([[1e6, 0.0], [1.0, 2.0]])
    bank = ShardedFeatureBank(4, 2, topk=1, dtype=torch.float16)
    bank.update(features)
    assert (int(bank.filled), int(bank.skipped)) == (1, 1) and bank.bank[0].tolist() == [1.0, 2.0]
    bank = ShardedFeatureBank(4, 2, topk=1, dtype=torch.float16, on_nonfinite="raise")
    with pytest.raises(ValueError, match="features: expected rows that are finite in float16"):
        bank.update(features)
    assert int(bank.filled) == 0


def test_data_parallel_leaves_shards_alone(ranks):
    """With DistributedDataParallel's defaults, which copy every buffer of rank 0 to the others."""
    every = ranks.run("data_parallel")
    assert all(got["same"] for got in every)
    assert all(torch.equal(got["weight"], every[0]["weight"]) for got in every)


@pytest.mark.parametrize("ranks", [2, 4], indirect=True, scope="module", ids=["2-ranks", "4-ranks"])
def test_dead_rank(ranks):
    """The last rank leaves without a word, in the middle of a run."""
    for rank, got in enumerate(ranks.run("dies", gone=1, timeout=3.0)):
        kind, text = got["said"]
        assert kind == "ShardError" and f"rank {rank} of {ranks.size}" in text and got["took"] < 4.0, got


def test_alone_without_a_process_group():
    """One process that never initialised torch.distributed: the same module, copied and moved as any other."""
    import copy

    bank = ShardedFeatureBank(5, 3, topk=2, scale=torch.tensor(2.0, dtype=torch.float64), dtype=torch.float64)
    bank.update(torch.eye(3).double())
    twin = copy.deepcopy(bank)
    bank.update(torch.ones(1, 3).double())
    assert int(twin.filled) == 3 and int(bank.filled) == 4
    query = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with hivilt.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda q: bank(q)[:2], (query,))
        once = torch.autograd.grad(bank(query)[0].square().sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()
    half = twin.bfloat16()
    assert half.bank.dtype == torch.bfloat16 and half.ptr.dtype == torch.int64
    retrieved, scores, indices = half(torch.ones(2, 3).bfloat16())
    assert retrieved.dtype == torch.bfloat16 and scores.dtype == torch.float32 and indices.tolist() == [[0, 1]] * 2
