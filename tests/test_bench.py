"""The benchmarks themselves: a wrong result is refused, samples reach pytest-benchmark as taken, machines never mix."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hivilt

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))  # as bench/conftest.py does
pytest.importorskip("pytest_benchmark")

import bank_rivals
import compare
import device
import fusion_rivals
import gpu_rivals
import gpu_targets
import interleave
import race
import report
import rivals
import roofline
import stopwatch
from gate import Gate

TINY = rivals.Case(2, 2, 21, 19, 8, 5)
VARIANTS = [TINY, replace(TINY, axis="queries"), replace(TINY, shared=7), replace(TINY, topk=None)]
needs_kernel = pytest.mark.skipif(rivals.hivilt_backend("cpu") is None, reason="the C++ library is not built")


@needs_kernel
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_rivals_agree_with_the_oracle(case, backward):
    case = replace(case, backward=backward)
    x = rivals.draw(case)
    gate = Gate(case, x)
    names = ["eager", "sdpa", "hivilt"] + ["sdpa_masked"] * bool(case.shared) + ["floor"] * (not backward)
    for name in names:
        errors = gate.check(name, rivals.runner(name, case, x)())
        assert set(errors) == ({"scores"} if name == "floor" else {"out", *(("query", "key", "value") * backward)})
        assert max(errors.values()) < 1e-5


@needs_kernel
@pytest.mark.parametrize("name", ["eager", "sdpa", "hivilt", "floor"])
def test_gate_refuses_a_wrong_result(name):
    case = replace(TINY, backward=name != "floor")
    x = rivals.draw(case)
    gate, results = Gate(case, x), rivals.runner(name, case, x)()
    for wrong in range(len(results)):
        planted = [t.detach().clone() for t in results]
        planted[wrong][-1, -1, 3, 2] *= 1.5
        with pytest.raises(AssertionError):
            gate.check(name, planted)


@needs_kernel
def test_gate_refuses_a_wrong_selection(monkeypatch):
    x = rivals.draw(TINY)
    right = hivilt.ops.topk_attention

    def second_best(query, key, value, topk, **options):
        return right(query, -key, value, topk, **options)

    monkeypatch.setattr(hivilt.ops, "topk_attention", second_best)
    with pytest.raises(AssertionError):
        Gate(TINY, x).check("hivilt", rivals.runner("hivilt", TINY, x)())


@needs_kernel
def test_race_does_not_time_a_wrong_rival(monkeypatch):
    monkeypatch.setitem(rivals.RIVALS, "eager", lambda case, x: lambda q, k, v: torch.zeros_like(q))
    settings = race.Settings(2, 2, roofline.Peak(1e9, 1e9), {"cpu": "test"}, weigh=False)
    outcome = race.run_race("tiny", {name: (name, TINY) for name in ("eager", "sdpa", "hivilt")}, 0, settings)
    assert list(outcome.failed) == ["eager"] and list(outcome.samples) == ["sdpa", "hivilt"]
    assert outcome.facts["hivilt"]["ratio_vs_sdpa"]["median"] > 0
    with pytest.raises(AssertionError, match="eager"):
        outcome.hand_over(None, "eager")


@needs_kernel
@pytest.mark.parametrize("name", ["flash", "math", "math_masked", "flex"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rivals_of_the_gpu_agree_with_the_oracle(monkeypatch, name, dtype):
    monkeypatch.setattr(gpu_rivals, "REHEARSED", True)  # FlexAttention as it is: compiling it takes a minute
    case = replace(TINY, dtype=dtype, backward=name != "flex")
    monkeypatch.setattr(rivals, "LIKE_GPU", True)  # selections are clear in half types too
    x = rivals.draw(case)
    errors = Gate(case, x).check(name, race.first_call(name, case, x)[1])
    assert max(errors.values()) < (1e-5 if dtype == "fp32" else 0.1)


@needs_kernel
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_thresholds_keep_what_we_keep(axis):
    case = replace(TINY, axis=axis)
    x = rivals.draw(case)
    bars = gpu_rivals.thresholds(case, x)
    scores = x["query"] @ x["key"].mT / case.D**0.5
    kept = scores >= (bars[..., None] if axis == "keys" else bars[..., None, :])
    assert torch.equal(kept.sum(-1 if axis == "keys" else -2), torch.full_like(bars, case.topk, dtype=torch.int64))
    indices = hivilt.ops.topk_select(x["query"], x["key"], case.topk, axis=axis, backend="cpu")
    assert torch.equal(kept, hivilt.testing.pairs_from_indices(indices, case.Q, case.N, case.H, axis))


@needs_kernel
def test_half_types_are_judged_through_what_plain_torch_keeps(monkeypatch):
    case = replace(TINY, dtype="bf16", N=400, topk=40)  # so many scores that some are equal in bfloat16
    x = rivals.draw(case)
    gate, results = Gate(case, x), rivals.runner("eager", case, x)()
    assert gate.check("eager", results)["out"] < 0.05
    with pytest.raises(AssertionError):
        gate.check("eager", [t.flip(-2) for t in results])
    monkeypatch.setattr(rivals, "selecting", lambda case, x, scores: -scores)
    with pytest.raises(AssertionError, match="far below the best"):
        Gate(case, x).check("eager", results)


@pytest.mark.parametrize("name", ["efficient", "cudnn_masked"])
def test_a_refusal_carries_its_reason(name):
    """The CPU has no such kernel of scaled_dot_product_attention."""
    with pytest.raises(race.Refusal, match=r"viable backend|[Nn]o available kernel"):
        race.first_call(name, TINY, rivals.draw(TINY))


@needs_kernel
def test_race_on_a_gpu_leaves_out_what_is_wrong_or_refuses(monkeypatch):
    for module in (race, rivals):
        monkeypatch.setattr(module, "LIKE_GPU", True)
    monkeypatch.setattr(race, "stopwatch", lambda: stopwatch.Events(gpu=device.StandIn(), device="cpu"))
    monkeypatch.setattr(device, "LIKE_GPU", True)
    monkeypatch.setitem(rivals.RIVALS, "math", lambda case, x: lambda q, k, v: torch.full_like(q, torch.nan))
    settings = race.Settings(2, 2, roofline.Peak(1e9, 1e9), {"cpu": "test"})
    names = ("eager", "flash", "efficient", "math", "hivilt")
    outcome = race.run_race("tiny", {name: (name, TINY) for name in names}, 0, settings)
    assert list(outcome.samples) == ["eager", "flash", "hivilt"] and not outcome.failed
    assert "wrong result, not timed" in outcome.skipped["math"] and "efficient" in outcome.skipped
    facts = outcome.facts["hivilt"]
    assert facts["left_out"] == outcome.skipped and facts["ratio_vs_flash"]["median"] > 0 and facts["peak_bytes"] == 0
    assert outcome.facts["flash"]["ran"].endswith("FLASH_ATTENTION alone") and facts["ran"] == "hivilt backend cpu"
    late = race.run_race("late", {"eager": ("eager", TINY)}, 0, replace(settings, until=0.0))
    assert not late.samples and "no time" in late.skipped["eager"]


@pytest.mark.parametrize("case", VARIANTS[:3], ids=str)
def test_judged_selections_are_clear(case):
    head = rivals.judged(rivals.draw(case))
    a, b = ("select_query", "select_key") if case.shared else ("query", "key")
    scores = (head[a].double() @ head[b].double().mT).flatten(0, -3)
    scores = scores.mT if case.axis == "queries" else scores
    best = scores.sort(-1, descending=True).values
    assert (best[..., case.topk - 1] - best[..., case.topk]).min() > 1e-6


FUSIONS = [
    *(fusion_rivals.Fusion(B=2, side=6, channels=24, direction=d, dtype=dtype)
      for d in fusion_rivals.DIRECTIONS for dtype in ("fp32", "bf16")),
    *(kind(direction=d, **sizes)
      for d in ("inference", "forward+backward")
      for kind, sizes in ((fusion_rivals.Add, {"B": 2, "n": 9, "N": 20, "C": 7}),
                          (fusion_rivals.Pool, {"B": 2, "N": 30, "C": 24}))),
]  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("case", FUSIONS, ids=lambda case: f"{case.operation}-{case.direction}-{case}")
def test_rivals_of_fusions_agree_with_float64(case):
    x = fusion_rivals.draw(case)
    gate = fusion_rivals.Gate(case, x)
    for name in ["eager", "deterministic", "hivilt", "copy"] + ["permute"] * isinstance(case, fusion_rivals.Fusion):
        errors = gate.check(name, fusion_rivals.runner(name, case, x)())
        assert len(errors) == (0 if name == "copy" else 1 + case.backward * len(fusion_rivals.leaves_of(x)))
        assert max(errors.values(), default=0.0) < (1e-4 if case.dtype == "fp32" else 0.5)


@needs_kernel
@pytest.mark.parametrize("case", FUSIONS, ids=lambda case: f"{case.operation}-{case.direction}-{case}")
def test_gate_of_fusions_refuses_a_wrong_result(case):
    x = fusion_rivals.draw(case)
    gate, results = fusion_rivals.Gate(case, x), fusion_rivals.runner("hivilt", case, x)()
    for wrong, good in enumerate(results):
        planted = [t.detach().clone() for t in results]
        worst = good.detach().abs().flatten().argmax()
        planted[wrong].view(-1)[worst] += 0.5 * good.detach().abs().max() + 0.01  # one gradient is 0
        with pytest.raises(AssertionError, match="out" if wrong == 0 else f"grad{wrong - 1}"):
            gate.check("hivilt", planted)
    if case.drops:  # as if nothing had been dropped, and the wrong half of everything
        for rate in (0.0, 0.5):
            planted = [t.detach().clone() for t in results]
            planted[0] = torch.where(torch.rand_like(planted[0]) < rate, 0.0, planted[0] + 1e-3)
            with pytest.raises(AssertionError, match=r"dropped|error"):
                gate.check("hivilt", planted)


def test_segformer_heads_agree_with_float64():
    pytest.importorskip("transformers")
    case = fusion_rivals.Head(B=1, model="B0", image=64, direction="forward+backward")
    x = fusion_rivals.draw(case)
    gate = fusion_rivals.Gate(case, x)
    for name in ("eager", "hivilt") if fusion_rivals.hivilt_backend("cpu") else ("eager",):
        results = fusion_rivals.runner(name, case, x)()
        assert max(gate.check(name, results).values()) < 1e-4
        planted = [t.detach().clone() for t in results]
        planted[3] *= 1.1
        with pytest.raises(AssertionError, match="grad2"):
            gate.check(name, planted)


@needs_kernel
def test_race_of_a_fusion(monkeypatch):
    """The same race as for attention; a rival that is wrong is not timed."""
    case = fusion_rivals.Fusion(B=1, side=6, channels=8)
    monkeypatch.setitem(fusion_rivals.RIVALS, "permute", lambda case: lambda *x: torch.zeros_like(x[0]))
    settings = race.Settings(2, 2, roofline.Peak(1e9, 1e9), {"cpu": "test"}, weigh=False)
    names = ("eager", "permute", "hivilt", "gemm", "copy")
    outcome = race.run_race("tiny", {name: (name, case) for name in names}, 0, settings)
    assert list(outcome.failed) == ["permute"] and list(outcome.samples) == ["eager", "hivilt", "gemm", "copy"]
    facts = outcome.facts["hivilt"]
    assert facts["ratio_vs_eager"]["median"] > 0 and facts["ratio_vs_gemm"]["median"] > 0
    assert facts["flops"] == outcome.facts["gemm"]["flops"] and outcome.facts["copy"]["flops"] == 0


def test_work_of_fusions_is_counted():
    """By hand, and every leaf is there."""
    case = fusion_rivals.Fusion(B=2, side=4, channels=8)  # 16, 4 and 1 tokens of 8, 4 and 2 channels
    numbers = 2 * (16 * 8 + 4 * 4 + 1 * 2) + 8 * 14 + 3 * 8
    assert case.counts() == (2 * 8 * 2 * (16 * 8 + 4 * 4 + 1 * 2), numbers, 2 * 16 * 8)
    assert fusion_rivals.case_cost("hivilt", case) == (case.counts()[0], 4 * (numbers + 256))
    both = replace(case, direction="forward+backward", dtype="bf16")
    assert fusion_rivals.case_cost("eager", both) == (3 * case.counts()[0], 2 * (3 * numbers + 2 * 256))
    for one in (case, *FUSIONS[-4:]):
        x = fusion_rivals.draw(one)
        out = fusion_rivals.runner("eager", replace(one, direction="inference"), x)()[0]
        assert one.counts()[1:] == (sum(t.numel() for t in fusion_rivals.leaves_of(x)), out.numel())
        source = fusion_rivals.copied(one, x)()[0]
        assert source.numel() == fusion_rivals.case_cost("copy", one).bytes // 2


BANKS = [bank_rivals.Case(B=40, M=700, C=24, topk=9, direction=d) for d in bank_rivals.DIRECTIONS]


@needs_kernel
@pytest.mark.parametrize("case", BANKS, ids=lambda case: case.direction)
def test_rivals_of_retrieval_agree_with_float64(case):
    x = bank_rivals.draw(case)
    gate = bank_rivals.Gate(case, x)
    searches = ["floor", *(["faiss", "faiss_blas"] if bank_rivals.FAISS else [])]
    for name in ["eager", "hivilt"] + searches * (not case.backward):
        found = gate.check(name, bank_rivals.runner(name, case, x)())
        assert found.pop("recall", 1.0) == 1.0 and max(found.values()) < 1e-5
        assert set(found) == ({"scores"} if name in searches else {"out", "scores", *["query"] * case.backward})
    for precision in ("fp32", "bf16"):
        one = replace(case, precision=precision)
        assert bank_rivals.draw(one)["keys"] is x["keys"], "a bank is drawn once for all precisions"
        found = bank_rivals.Gate(one, x).check("hivilt", bank_rivals.runner("hivilt", one, x)())
        assert found["recall"] == 1.0 or precision == "bf16"


@needs_kernel
@pytest.mark.parametrize("name", ["eager", "hivilt", "faiss", "floor"])
def test_gate_of_retrieval_refuses_a_wrong_result(name):
    if name == "faiss" and not bank_rivals.FAISS:
        pytest.skip("faiss-cpu is not installed")
    case = BANKS[name in ("eager", "hivilt")]
    x = bank_rivals.draw(case)
    gate, results = bank_rivals.Gate(case, x), bank_rivals.runner(name, case, x)()
    for wrong, good in enumerate(results):
        planted = [t.detach().clone() for t in results]
        if good.dtype == torch.int64:  # another row in the place of the last one
            planted[wrong][0, -1] = next(j for j in range(case.M) if j not in good[0])
        else:
            planted[wrong][0, 0] += 1e-2
        with pytest.raises(AssertionError):
            gate.check(name, planted)
    if name == "hivilt":
        loose = bank_rivals.Gate(replace(case, precision="bf16"), x)
        planted = [t.detach().clone() for t in results]
        planted[2] = planted[2].flip(0)
        with pytest.raises(AssertionError, match="recall"):
            loose.check(name, planted)


def test_work_of_retrieval_is_counted():
    case, both = BANKS
    product = 2 * 40 * 700 * 24
    search = 4 * (40 * 24 + 700 * 24) + 40 * 9 * 12  # queries, bank; a score of 4 and an index of 8 bytes for each
    assert bank_rivals.case_cost("floor", case) == (product, 4 * (40 * 24 + 700 * 24 + 40 * 700))
    assert bank_rivals.case_cost("faiss", case) == (product, search)
    assert bank_rivals.case_cost("hivilt", case) == (product + 2 * 360 * 24, search + 4 * 40 * 24)
    again = 4 * (2 * 40 * 24 + 360 * 24)  # the upstream gradient, that of the queries, the kept rows
    assert bank_rivals.case_cost("hivilt", both) == (product + 6 * 360 * 24, search + 4 * 40 * 24 + again)


def test_report_of_retrieval(results):
    """Targets against every rival, at most so long against the product alone, and the recall of each precision."""
    found = results()
    bench = copy.deepcopy(found.groups[next(iter(found.groups))]["hivilt"])
    ratios = {"eager": 4.0, "faiss": 2.0, "faiss_blas": 1.7, "floor": 0.8}  # 0.8: 1.25 times as long as the product
    bench["extra_info"] |= {f"ratio_vs_{r}": dict.fromkeys(("q1", "median", "q3"), x) for r, x in ratios.items()}
    bench["extra_info"]["max_error"] = {"out": 2e-7, "scores": 3e-6, "recall": 1.0}
    near, search = copy.deepcopy(bench), copy.deepcopy(bench)
    near["extra_info"]["max_error"]["recall"] = 0.98765
    search["extra_info"]["max_error"] = {"scores": 3e-6, "recall": 1.0}
    title = f"bank_retrieval forward {report.BANK_SHAPES[0]}-fp32-cpu"
    found.groups[title] = {"hivilt": bench, "hivilt_fp32": bench, "hivilt_bf16": near, "faiss": search}
    cells = [[cell.strip() for cell in row.split("|")] for row in report.targets(found).splitlines() if "bank_" in row]
    assert [(row[1].split(": ")[1], row[-3], row[-2]) for row in cells] == [
        ("times faster than eager", "3", "yes"), ("times faster than FAISS", "3", "no"),
        ("times faster than FAISS with BLAS", "1.5", "yes"), ("times the fp32 product alone", "at most 1.35", "yes"),
        ("times the fp32 product alone", "at most 1.12", "no"),
    ]  # fmt: skip
    assert (
        "0.9877" in report.recall(found)
        and "1.0000" in report.recall(found)
        and "0.9877" in report.compose(found, None)
    )
    assert "2.0e-07" in report.errors(found) and "3.0e-06" in report.errors(found)
    assert report.recall(results()) == "Not measured."


def test_turns_are_shuffled_rounds():
    calls = []
    samples = interleave.take_turns(
        {name: lambda name=name: calls.append(name) for name in "abc"}, seconds=0, rounds=20
    )
    assert {len(times) for times in samples.values()} == {20}
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 3


class Device(device.StandIn):
    """A GPU whose clock moves only by what is queued: 2 ms a call."""

    def __init__(self):
        self.said, self.now = [], 0.0

    def Event(self, enable_timing: bool):
        return Event(self)

    def call(self) -> None:
        self.said.append("call")
        self.now += 2.0


class Event:
    def __init__(self, gpu: Device):
        self.gpu, self.at = gpu, None

    def record(self) -> None:
        self.gpu.said.append("event")
        self.at = self.gpu.now

    def synchronize(self) -> None:
        self.gpu.said.append("wait")

    def elapsed_time(self, later) -> float:
        return later.at - self.at


def test_events_enclose_the_calls_and_nothing_else():
    gpu = Device()
    watch = stopwatch.Events(gpu=gpu, device="cpu")
    assert watch.buffer.numel() >= 2 * gpu.get_device_properties(0).L2_cache_size

    class Buffer:
        def zero_(self):
            gpu.said.append("fill")

    watch.buffer, watch.fill_s = Buffer(), 10.0
    watch.warm_up(gpu.call, 3)
    assert watch.fills == 1
    gpu.said.clear()
    assert watch.time(gpu.call, 3) == pytest.approx(2e-3)
    assert gpu.said == ["fill", "event", "call", "call", "call", "event", "wait"]
    watch.fill_s = 1e-9  # a host that is slower than the device writes the buffer more often
    watch.warm_up(gpu.call, 3)
    assert watch.fills == stopwatch.MOST_FILLS


def test_events_feed_the_turns():
    gpu = Device()
    watch = stopwatch.Events(gpu=gpu, device="cpu")
    samples = interleave.take_turns({"a": gpu.call, "b": lambda: None}, seconds=0, rounds=3, calls=4, stopwatch=watch)
    assert samples == {"a": [pytest.approx(2e-3)] * 3, "b": [0.0] * 3}


def test_peak_memory_is_that_of_the_second_call():
    class Allocator(device.StandIn):
        held, peak, calls = 100, 0, 0

        def reset_peak_memory_stats(self):
            self.peak = self.held

        def memory_allocated(self):
            return self.held

        def max_memory_allocated(self):
            return self.peak

    gpu = Allocator()

    def call():
        gpu.calls += 1
        gpu.peak = gpu.held + (5000 if gpu.calls == 1 else 40)  # what the first one compiles is not counted

    assert device.peak_bytes(call, gpu) == 40


def test_clock_replays_samples():
    clock, samples, recorded = interleave.ReplayClock(), [0.25, 0.5, 0.125], []

    class Benchmark:
        def pedantic(self, run, rounds):
            for _ in range(rounds):
                start = clock()
                run()
                recorded.append(clock() - start)

    clock.replay(Benchmark(), samples)
    assert recorded == samples


def test_ratio_is_taken_round_by_round():
    assert interleave.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0]) == {"q1": 2.0, "median": 2.0, "q3": 3.0}


def test_work_is_counted():
    forward = roofline.topk_attention_forward(1, 2, 3, 5, 4, kept=3 * 2, listed=3 * 2)
    assert forward.flops == 2 * 2 * (3 * 5 + 6) * 4
    assert forward.bytes == 4 * (2 * 3 * 4 * 2 + 2 * 5 * 4 * 2) + 4 * (2 * 3 + 2 * 6)
    assert roofline.scores(1, 2, 3, 5, 4) == (2 * 2 * 15 * 4, 4 * 2 * (12 + 20 + 15))
    assert roofline.Peak(10.0, 5.0).torch_s(roofline.Cost(20, 20)) == 4.0


@pytest.fixture
def results(tmp_path):
    """A file as pytest-benchmark writes it, one race of the first shape."""
    shape = next(iter(report.SHAPES))

    def bench(rival: str, median: float, **facts) -> dict:
        facts |= {"busy_others": 0.0, "max_error": {"out": 1e-7}, "output_bytes": 1, "peak_bytes": 2**20}
        group = f"topk_attention forward {shape}-fp32-cpu"
        return {
            "group": group,
            "name": rival,
            "params": {"rival": rival},
            "stats": {"median": median},
            "extra_info": facts,
        }

    facts = {"cpu": "X", "cpus": 2, "isa": "avx2", "threads": 2, "gpu": None, "torch": "2.13.0", "hivilt": "0.1.0"}
    speedups = {f"ratio_vs_{r}": {"q1": x, "median": x, "q3": x} for r, x in (("eager", 8.0), ("sdpa", 1.2))}
    data = {
        "machine_info": {"hivilt": facts}, "commit_info": {"id": "0" * 40, "dirty": False}, "datetime": "2026-01-01",
        "benchmarks": [bench("eager", 8e-3), bench("sdpa", 1.2e-3), bench("hivilt", 1e-3, **speedups)],
    }  # fmt: skip

    def write(name: str = "r.json", **changes) -> report.Results:
        changed = copy.deepcopy(data)
        changed["machine_info"]["hivilt"] |= changes
        (tmp_path / name).write_text(json.dumps(changed))
        return report.Results(tmp_path / name)

    return write


def test_report_holds_figures_against_targets(results):
    rows = report.targets(results()).splitlines()[2:]
    verdicts = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in rows}
    assert verdicts == {"forward: times faster than eager": "yes", "forward: times faster than dense SDPA": "no"}
    text = report.compose(results(), None)
    assert "instruction set in use: avx2" in text and "do not quote" not in text


def test_report_has_a_table_for_each_family(results):
    found = results()
    attention = found.groups[next(iter(found.groups))]
    title = f"scale_fusion inference {report.FUSION_SHAPES[0]}-fp32-cpu"
    fusion = {name: copy.deepcopy(attention["hivilt"]) for name in ("eager", "permute", "hivilt", "gemm", "copy")}
    for name, bench in fusion.items():
        bench["extra_info"]["max_error"] = {} if name in report.FLOORS else {"out": 3e-7, "grad0": 4e-7}
    alone = {part: part(found) for part in (report.times, report.memory, report.errors)}
    found.groups[title] = fusion
    for part, before in alone.items():
        text = part(found)
        assert text.startswith(before) and "scale_fusion, " in text and text.count("| permute") == 1
        assert ("gemm" in text) == (part is report.times)
    rows = [row for row in report.targets(found).splitlines() if report.FUSION_SHAPES[0] in row and "eager" in row]
    assert len(rows) == 1 and rows[0].split("|")[-2].strip() == "yes"
    few = report.shapes_only(found)
    assert title in few.groups and "3.0e-07, 4.0e-07" in report.for_readme(found, "r.json")
    found.groups[title.replace("fp32", "bf16")] = fusion
    assert len(report.shapes_only(found).groups) == len(few.groups)


def test_compare_refuses_another_machine(results):
    before = results("before.json")
    assert "1.00" in compare.compare(before, results("after.json", torch="2.14.0"))
    for fact in ({"isa": "avx512"}, {"threads": 1}, {"cpu": "Y"}, {"gpu": "H200"}):
        with pytest.raises(SystemExit, match="not the same machine"):
            compare.compare(before, results("after.json", **fact))


@pytest.mark.parametrize("ratio, verdict", [(30.0, "yes"), (3.0, "no"), (None, "not measured")])
def test_report_holds_a_gpu_against_its_own_targets(results, ratio, verdict):
    machine = {"gpu": "H200, sm_90, 140 GiB", "matmul": "bfloat16"}
    found = results("gpu.json", **machine)
    group = f"topk_attention forward {gpu_targets.name(gpu_targets.SHAPES['middle'])}-bf16-cuda"
    bench = copy.deepcopy(found.groups.popitem()[1]["hivilt"])
    bench["extra_info"]["ratio_vs_eager"] = ratio and dict.fromkeys(("q1", "median", "q3"), ratio)
    bench["extra_info"]["left_out"] = {"cudnn": "RuntimeError: no kernel"}
    found.groups[group] = {"hivilt": bench}
    rows = [[cell.strip() for cell in row.split("|")] for row in report.targets(found).splitlines()[2:]]
    assert len(rows) == len(gpu_targets.TARGETS) + 1 + len(gpu_targets.BANK_SHAPES)
    assert [row[-2] for row in rows if row[5] == "20"] == [verdict]
    text = report.compose(found, None)
    assert "big bfloat16 matrices" in text and "RuntimeError: no kernel" in text
