"""Every way through the Triton kernels of retrieval from a bank, in the interpreter at small sizes: the limits that
decide between kernels are moved so that small calls take the ways of large ones."""

import inspect

import plain_bank as plain
import pytest
import torch

import hivilt
import hivilt.testing as t

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("the kernels run on the GPU here, at sizes of their own", allow_module_level=True)

launch = pytest.importorskip("hivilt.triton_kernels.launch")
launches = pytest.importorskip("hivilt.triton_kernels.bank_retrieval_launch")
kernels = pytest.importorskip("hivilt.triton_kernels.bank_retrieval")
backward_kernels = pytest.importorskip("hivilt.triton_kernels.bank_retrieval_backward")
interpreter = pytest.importorskip("interpreter")
Tile = pytest.importorskip("hivilt.triton_kernels.configs").Tile

op = hivilt.ops.bank_retrieval
INF, NAN, BF16 = plain.INF, plain.NAN, torch.bfloat16
SMALL, MIDDLE, LARGE = (((INF, *sizes),) for sizes in ((1, 32), (1, 8), (4, 8)))

# way -> limits of the launch file: queries that make the bank a stream, groups, and the memory that makes chunks.
WAYS = {
    "stream": {"FEW": 10**9, "GROUPS": MIDDLE},
    "matrix": {"FEW": 0, "GROUPS": SMALL},
    "matrix, groups over tiles": {"FEW": 0, "GROUPS": LARGE},
    "matrix, in chunks": {"FEW": 0, "GROUPS": MIDDLE, "MAXIMA_BYTES": 1, "LOW_BYTES": 1, "HELD": (0, 0)},
    "every row": {"LEAST_RATIO": 10**9},
}


def take(monkeypatch, way: str) -> None:
    for name, value in ({"LEAST_RATIO": 0} | WAYS[way]).items():
        monkeypatch.setattr(launches, name, value)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    take(monkeypatch, request.param)
    return request.param


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Names of the kernels that calls start, in order."""
    names: list[str] = []
    start = launch.launch

    def noted(kernel, *args, **constants):
        names.append(kernel.__name__)
        return start(kernel, *args, **constants)

    monkeypatch.setattr(launch, "launch", noted)
    return names


def run(**call):
    return op(**call, backend="triton")


def same(a, b) -> bool:
    """Bit for bit, NaN included."""
    return all(p.shape == q.shape and p.numpy().tobytes() == q.numpy().tobytes() for p, q in zip(a, b, strict=True))


def bits(results):
    return [x.view(torch.int16) if x.dtype == BF16 else x for x in results]


def call(B=2, M=300, C=20, topk=7, query=torch.float32, keys=torch.float32, seed=0, **more) -> dict:
    return {"query": plain.numbers(seed, B, C, dtype=query), "keys": plain.numbers(seed + 1, M, C, dtype=keys),
            "topk": topk, "scale": 0.3, **more}  # fmt: skip


CALLS = {
    "plain": call(),
    "wider than a tile": call(C=300, M=130),
    "one of each": call(1, 1, 1, 1),
    "half bank": call(keys=BF16),
    "half queries": call(query=torch.float16, values=plain.numbers(5, 300, 33, dtype=BF16)),
    "half both": call(query=BF16, keys=BF16, C=17),
    "float16 both": call(query=torch.float16, keys=torch.float16),
    "beyond the bank": call(M=9, topk=12),
    "all": call(count=torch.tensor(280), mask=plain.numbers(3, 2, 300) > -0.5, exclude=torch.tensor([-1, 4])),
    "mask of rows": call(mask=plain.numbers(3, 300) > 1.0, count=250, values=plain.numbers(4, 300, 5)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_gives_the_same_bits(monkeypatch, name):
    """Bits within the budget of float64; also in every precision but "bf16", and for a query without its neighbours."""
    x, found = CALLS[name], {}
    for way in WAYS:
        with monkeypatch.context() as limits:
            take(limits, way)
            found[way] = bits(run(**x, precision="fp32" if way == "matrix" else "exact"))
            if way == "stream":
                plain.judge(run(**x), **x, repro=name)
    assert all(same(found[way], found["stream"]) for way in WAYS)
    last = slice(len(x["query"]) - 1, None)
    alone = x | {n: x[n][last] for n in ("query", "exclude") if n in x}
    if x.get("mask") is not None and x["mask"].dim() == 2:
        alone["mask"] = x["mask"][last]
    assert same(bits(run(**alone)), [y[last] for y in found["stream"]])


def test_order_on_exact_scores(way):
    """Integers: the one right list, ties by index, against numpy's lexsort."""
    q, k = plain.integers(0, 3, 6), plain.integers(1, 300, 6, most=2)
    q[2] = 0.0  # all scores equal
    mask = plain.numbers(2, 3, 300) > -1.0
    truth = q.double() @ k.double().mT
    for topk, allowed in ((9, None), (20, mask)):
        got = run(query=q, keys=k, topk=topk, mask=allowed)
        wanted = torch.from_numpy(plain.best_rows(truth, plain.valid_pairs(truth, mask=allowed), topk))
        assert torch.equal(got[2], wanted)
        assert torch.equal(got[1].double(), truth.gather(1, wanted))


def test_zeros_of_both_signs_are_equal(way):
    keys = torch.tensor([[-0.0], [0.0], [-0.0], [-1.0], [0.0]])
    _, scores, indices = run(query=torch.ones(2, 1), keys=keys, topk=4)
    assert torch.equal(indices, torch.tensor([[0, 1, 2, 4]]).expand(2, 4)) and (scores == 0).all()


HARD = plain.hard_banks(2)
NAMES = ["midpoints of keys", "clusters", "all equal", "norms 1e-6 to 1e6", "subnormals",
         "norms 1e-20 to 1e18", "slowly ascending"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_hard_banks(monkeypatch, started, name):
    """Where bfloat16 without a margin is wrong, or where the margin separates nothing."""
    q, k, topk = HARD[name]
    k, topk = k[:1100], min(topk, 20)
    take(monkeypatch, "matrix")
    got = run(query=q, keys=k, topk=topk, scale=1e-3)
    assert "_measure_bank_kernel" in started and "_candidates_kernel" in started
    plain.judge(got, q, k, topk, scale=1e-3, one_sign=True)
    take(monkeypatch, "every row")
    assert same(run(query=q, keys=k, topk=topk, scale=1e-3), got)


def test_without_a_margin_a_hard_bank_is_wrong(monkeypatch):
    """That is "bf16", whose scores are right nevertheless."""
    q, k, topk = HARD["clusters"]
    take(monkeypatch, "matrix")
    exact, rough = (run(query=q, keys=k[:1100], topk=topk, precision=how) for how in ("exact", "bf16"))
    assert not torch.equal(exact[2], rough[2])
    true, _, slack = plain.dots(q, k)
    assert ((rough[1] - true.gather(1, rough[2])).abs() <= slack.gather(1, rough[2])).all()


@pytest.mark.parametrize("way", ["stream", "matrix", "every row"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
def test_wild_rows(monkeypatch, way, bad):
    """A NaN spoils who may read it; numbers come before it; other scores keep their places."""
    take(monkeypatch, way)
    q, k = plain.numbers(0, 4, 6).abs() + 0.1, plain.numbers(1, 300, 6)
    k[[7, 130], 2] = bad
    mask = torch.ones(4, 300, dtype=torch.bool)
    mask[1, [7, 130]] = False
    retrieved, scores, indices = run(query=q, keys=k, topk=5, mask=mask)
    tame = k.clone()
    tame[[7, 130]] = 0.0
    without = mask.clone()
    without[:, [7, 130]] = False
    good = run(query=q, keys=tame, topk=5, mask=without)
    assert same([x[1] for x in (retrieved, scores, indices)], [x[1] for x in good])
    others = [0, 2, 3]
    if bad == -INF:
        assert same([retrieved, scores, indices], good)
    elif bad == 3e38 or bad == INF:
        assert {7, 130} <= set(indices[0].tolist()) and torch.equal(indices[others, 2:], good[2][others, :3])
        if bad == INF:
            assert (scores[others, :2] == INF).all() and retrieved[others].isnan().all()
            assert torch.equal(indices[others, :2], torch.tensor([[7, 130]] * 3))
    else:
        assert torch.equal(indices, good[2]) and scores[others].isnan().all() and retrieved[others].isnan().all()


@pytest.mark.parametrize("way", ["stream", "matrix", "every row"])
@pytest.mark.parametrize("bad", [NAN, INF, 1e30])
def test_wild_queries(monkeypatch, way, bad):
    take(monkeypatch, way)
    q, k = plain.numbers(0, 4, 6), plain.numbers(1, 200, 6)
    want = run(query=q, keys=k, topk=5)
    q[2, 3] = bad
    got = run(query=q, keys=k, topk=5)
    others = [0, 1, 3]
    assert same([x[others] for x in got], [x[others] for x in want])
    if bad != 1e30:
        assert got[0][2].isnan().all()
    if bad != bad:
        assert torch.equal(got[2][2], torch.arange(5)), "the first rows, as all NaN are alike"
    if bad == 1e30:
        plain.judge(got, q, k, 5)


@pytest.mark.parametrize("way", ["stream", "matrix", "every row"])
def test_nothing_valid(monkeypatch, way):
    take(monkeypatch, way)
    q, k = plain.numbers(0, 3, 6), plain.numbers(1, 200, 6)
    mask = torch.ones(3, 200, dtype=torch.bool)
    mask[1] = False
    whole, got = run(query=q, keys=k, topk=4), run(query=q, keys=k, topk=4, mask=mask)
    assert not got[0][1].any() and (got[1][1] == -INF).all() and (got[2][1] == -1).all()
    assert same([x[[0, 2]] for x in got], [x[[0, 2]] for x in whole])
    for count in (0, -3):
        empty = run(query=q, keys=k, topk=4, count=count)
        assert not empty[0].any() and (empty[1] == -INF).all() and (empty[2] == -1).all()
    few = call(B=3, M=200, count=torch.tensor(3))
    plain.judge(run(**few), **few)


@pytest.mark.parametrize("sizes", [(0, 7, 5, 3), (0, 0, 5, 3), (4, 0, 5, 3), (4, 7, 0, 3), (4, 7, 5, 0)], ids=str)
def test_empty_sizes(sizes):
    B, M, C, E = sizes
    q, k, v = (plain.numbers(0, *shape).requires_grad_() for shape in ((B, C), (M, C), (M, E)))
    for values in (None, v):
        got = run(query=q, keys=k, topk=3, values=values)
        plain.judge(got, q.detach(), k.detach(), 3, values=values if values is None else v.detach())
        grads = torch.autograd.grad(got[0].sum() + got[1].nan_to_num(neginf=0).sum(), [q, k], allow_unused=True)
        assert all(g.shape == x.shape and g.isfinite().all() for g, x in zip(grads, (q, k), strict=True))


def test_layouts(monkeypatch):
    """Columns of wider rows, transposed memory and expanded rows of every argument: the bits of contiguous ones."""
    x = call(B=3, M=40, C=9, topk=4, values=plain.numbers(2, 40, 6), mask=plain.numbers(3, 3, 40) > -1,
             exclude=torch.tensor([3, -1, 7]))  # fmt: skip
    names = [n for n, v in x.items() if isinstance(v, torch.Tensor)]
    views = {"wider": {n: torch.stack([x[n]] * 3, -1).flatten(-2)[..., ::3] for n in names},
             "transposed": {n: x[n].mT.contiguous().mT if x[n].dim() == 2 else x[n] for n in names}}  # fmt: skip
    views["part of rows"] = {n: torch.cat([x[n]] * 2, -1)[..., : x[n].shape[-1]] for n in names}
    for way in ("matrix", "stream"):
        take(monkeypatch, way)
        want = run(**x)
        for layout, view in views.items():
            assert same(run(**x | view), want), (way, layout)
        rows = x | {"query": x["query"][:1].expand(3, -1), "mask": x["mask"][:1].expand(3, -1), "exclude": None}
        first, *others = zip(*run(**rows), strict=True)
        assert all(same(other, first) for other in others)


def test_chunks_and_blocks_of_queries(monkeypatch):
    """Beside results and lists: the two best scores of every group of as many queries as the limit allows."""
    take(monkeypatch, "matrix, in chunks")
    most = 8 * 16 * 32  # bytes of a query, two scores of 16 groups, for 32 queries
    monkeypatch.setattr(launches, "MAXIMA_BYTES", most)
    monkeypatch.setattr(launches, "lookup", lambda *key: Tile(16, 0, 16, 4, 1))
    sizes, maxima = [], launches._Search.maxima

    def noted(self, query, rules):
        found = maxima(self, query, rules)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(launches._Search, "maxima", noted)
    x = call(B=34, M=200, topk=1)
    plain.judge(run(**x), **x)
    assert sizes == [most, most // 16]


# Gradients.


def leaves(x: dict) -> dict:
    return {n: v.detach().clone().requires_grad_() for n, v in x.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("B, M", [(1, 1), (12, 9)])
def test_gradients(B, M, own):
    """Against float64 autograd of plain PyTorch over the same indices, through either result and through both."""
    x = {"query": plain.numbers(0, B, 12), "keys": plain.numbers(1, M, 12), "scale": torch.tensor(0.4)}
    x = leaves(x | ({"values": plain.numbers(2, M, 70)} if own else {}))
    out, scores, indices = run(**x, topk=min(6, M + 2))
    both = [(out, plain.numbers(9, *out.shape)), (scores, plain.numbers(10, *scores.shape))]
    for through in (both, both[:1], both[1:]):
        up = [next((g for y, g in through if y is result), None) for result in (out, scores)]
        args = ([y for y, _ in through], list(x.values()), [g for _, g in through])
        got = torch.autograd.grad(*args, retain_graph=True, allow_unused=True)
        truth = plain.gradients(x["query"], x["keys"], x.get("values"), indices, x["scale"], *up)
        for name, grad in zip(x, got, strict=True):
            t.assert_within(grad, truth.values[name], truth.budget(name, torch.float32), name)
    assert same(got, torch.autograd.grad(*args, allow_unused=True))


@pytest.mark.parametrize("query, keys, values", [(BF16, torch.float32, None), (torch.float16, BF16, torch.float32),
                                                 (BF16, BF16, BF16)], ids=str)  # fmt: skip
def test_gradients_of_half_types(query, keys, values):
    x = {"query": plain.numbers(0, 4, 16, dtype=query), "keys": plain.numbers(1, 20, 16, dtype=keys)}
    x = leaves(x | ({} if values is None else {"values": plain.numbers(2, 20, 5, dtype=values)}))
    out, scores, indices = run(**x, topk=9, scale=0.25)
    up = plain.numbers(9, *out.shape).to(out.dtype), plain.numbers(10, *scores.shape)
    got = torch.autograd.grad([out, scores], list(x.values()), up)
    truth = plain.gradients(x["query"], x["keys"], x.get("values"), indices, 0.25, *up)
    for name, grad in zip(x, got, strict=True):
        assert grad.dtype == x[name].dtype
        t.assert_within(grad, truth.values[name], truth.budget(name, grad.dtype, tight=True), name)


def test_gradients_of_padding_and_of_lost_queries():
    """Rows that are not kept hold NaN; one query has no row, one is lost; the others' gradients do not notice."""
    x = leaves({"query": plain.numbers(0, 4, 6), "keys": plain.numbers(1, 30, 6), "values": plain.numbers(2, 30, 5)})
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[1] = False

    def grads(query, keys):
        out, scores, indices = run(query=query, keys=keys, values=x["values"], topk=40, mask=mask, count=25)
        return indices, torch.autograd.grad(out.sum() + scores.nan_to_num(neginf=0.0).sum(), [query, keys])

    indices, (of_query, of_keys) = grads(x["query"], x["keys"])
    assert not of_query[1].any() and not of_keys[25:].any() and (indices[1] == -1).all()
    spoiled = x["keys"].detach().clone()
    spoiled[25:] = NAN
    _, (again, rows) = grads(x["query"], spoiled.requires_grad_())
    assert same([again, rows], [of_query, of_keys])
    lost = x["query"].detach().clone()
    lost[3, 2] = NAN
    _, (got, _) = grads(lost.requires_grad_(), x["keys"])
    assert same([got[:3]], [of_query[:3]]) and got[3].isnan().any()


def test_fullgraph():
    """Traced, the call is one opaque operator; the backend in force when it runs runs it."""
    x = leaves(call(B=3, M=40, topk=4) | {"scale": torch.tensor(0.3)})
    fast = torch.compile(lambda **x: op(**x, topk=4)[0].sum(), backend="aot_eager", fullgraph=True)
    with hivilt.use_backend("triton"):
        got, want = (
            torch.autograd.grad(f(**x), list(x.values())) for f in (fast, lambda **x: op(**x, topk=4)[0].sum())
        )
        assert hivilt.last_backend() == "triton"
    assert same(got, want)


# What the row says.


def test_explain_and_refusals(capsys):
    x = call(M=20)
    assert hivilt.explain("bank_retrieval", **x)["triton"] is None
    wide = x | {"query": x["query"].double(), "keys": x["keys"].double()}
    reason = hivilt.explain("bank_retrieval", **wide)["triton"]
    assert "dtype float64" in reason and "triton" in capsys.readouterr().out
    with pytest.raises(hivilt.BackendError, match=r"bank_retrieval: backend 'triton' cannot run this call: .*float64"):
        run(**wide)


def test_no_index_overflows(monkeypatch):
    """The interpreter checks every sum of integers."""
    for way in ("stream", "matrix, groups over tiles", "every row"):
        with monkeypatch.context() as limits:
            take(limits, way)
            with interpreter.strict():
                x = CALLS["all"]
                plain.judge(run(**x), **x)


def test_calls_start_every_kernel(monkeypatch, started):
    x = leaves(call(B=3, M=40, topk=4))
    for way in ("matrix", "every row"):
        take(monkeypatch, way)
        run(**x, topk=4)[0].sum().backward()
    names = {name for room in (kernels, backward_kernels) for name, f in vars(room).items()
             if name.startswith("_") and name.endswith("_kernel") and not inspect.ismodule(f)}  # fmt: skip
    assert set(started) == names
