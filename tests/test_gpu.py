"""What only a GPU can show about the Triton kernels: graphs, streams, addresses beyond 2^31, memory, cold caches.

Without a GPU the same lines are rehearsed on the CPU, at sizes that Triton's interpreter bears; what is left without
meaning then is skipped.  ``make gpu`` runs this file on a GPU.
"""

from concurrent.futures import ThreadPoolExecutor

import fresh
import pytest
import torch

import hivilt
import hivilt.testing as t

op, select = hivilt.ops.topk_attention, hivilt.ops.topk_select
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
REPEATS = 250 if GPU else 1
BEYOND = 2**31 if GPU else 2**16
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU; nothing of it can be rehearsed on a CPU")
needs_two_gpus = pytest.mark.skipif(not GPU or torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

# The interpreter is slow, and the sizes below that make a row long are those of float32.
DTYPE = torch.bfloat16 if GPU else torch.float32
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]

# Which kernels run -> (H, G, Q, N, D, E), topk, axis, channels of a shared selection; in a rehearsal the second ones.
PATHS = {
    "row in one tile": [((12, 12, 1000, 500, 64, 64), 32, "keys", 0), ((2, 1, 5, 20, 16, 12), 5, "keys", 0)],
    "long rows": [((4, 2, 700, 5000, 64, 64), 40, "keys", 0), ((2, 1, 5, 260, 16, 12), 3, "keys", 0)],
    "few long rows": [((2, 2, 3, 20000, 64, 48), 40, "keys", 0), ((1, 1, 2, 1100, 16, 16), 3, "keys", 0)],
    "many kept": [((4, 4, 300, 3000, 80, 80), 300, "keys", 0), ((2, 2, 5, 260, 16, 12), 20, "keys", 0)],
    "queries": [((4, 2, 1000, 500, 64, 64), 32, "queries", 0), ((2, 1, 11, 20, 16, 12), 4, "queries", 0)],
    "shared": [((8, 8, 1000, 500, 64, 64), 32, "keys", 256), ((2, 1, 11, 20, 16, 12), 4, "keys", 9)],
    "dense": [((8, 2, 500, 700, 64, 64), None, "keys", 0), ((2, 1, 11, 20, 16, 12), None, "keys", 0)],
}


@pytest.fixture(autouse=True)
def runs_here(verdicts):
    if verdicts["triton", DEVICE] is not None:
        pytest.skip(verdicts["triton", DEVICE])


def inputs(path: str, dtype: torch.dtype, seed: int = 0, mask: str = "bool", **changes) -> dict:
    (H, G, Q, N, D, E), topk, axis, channels = PATHS[path][not GPU]
    plain = {"fill": "normal", "scale": None, "layout": ("contiguous",) * 3, "key_mask": True, "query_mask": False}
    plain |= {"mask": mask, "mask_shape": (1, 1, Q, N) if mask else (), "axis": axis, "select": channels}
    plain |= {"shape": (2 if GPU else 1, H, G, Q, N, D, E), "topk": topk}
    return t.case(seed, dtype, **plain | changes).inputs(DEVICE)


def run(x: dict, backward: bool = True, **options) -> list[torch.Tensor]:
    """Everything that a call returns, with gradients for an upstream gradient of ones."""
    x = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in x.items()}
    names = ["query", "key", "value"]
    if "attn_mask" in x and x["attn_mask"].is_floating_point():
        names.append("attn_mask")
    leaves = [x[name].requires_grad_(backward) for name in names]
    results = list(op(**x, return_lse=True, return_indices=x["topk"] is not None, backend="triton", **options))
    grads = torch.autograd.grad(results[0], leaves, torch.ones_like(results[0])) if backward else ()
    return [*(v.detach() for v in results), *grads]


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    bits = [x.contiguous().view(torch.uint8) for x in (*a, *b)]
    return len(a) == len(b) and all(map(torch.equal, bits[: len(a)], bits[len(a) :]))


def room(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that nobody has written; skips where there is not as much."""
    size = elements * dtype.itemsize
    if GPU and torch.cuda.mem_get_info()[0] < size + 2**31:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of GPU memory and some more")
    return torch.empty(elements, dtype=dtype, device=DEVICE)


@needs_gpu
def test_auto_picks_triton():
    x = inputs("row in one tile", DTYPE)
    leaf = x["query"].requires_grad_()
    out = op(**x)
    assert hivilt.last_backend() == "triton"
    out.sum().backward()
    assert hivilt.last_backend() == "triton" and leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_every_time(path, dtype):
    x = inputs(path, dtype, mask="float" if path == "queries" else "bool")
    first = run(x)
    for _ in range(REPEATS):
        assert same(first, run(x))


def capture(work):
    """(results, a function that computes them again in place): a CUDA graph, or a rehearsal of one."""
    if not GPU:
        results = work()

        def again() -> None:
            for old, new in zip(results, work(), strict=True):
                old.copy_(new)

        return results, again
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):  # compiles what has to be compiled, and fills the allocator's pools
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return results, graph.replay


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_graph_replayed_with_other_inputs(path, backward):
    x = inputs(path, DTYPE)
    results, again = capture(lambda: run(x, backward))
    for seed in (1, 2) if GPU else (1,):
        for name, other in inputs(path, DTYPE, seed).items():
            if isinstance(other, torch.Tensor):
                x[name].copy_(other)
        again()
        wait()
        assert same(results, run(x, backward)), f"inputs {seed}"


def spread(tensors: list[torch.Tensor], along: int) -> list[torch.Tensor]:
    """Copies as views into one allocation, one within the gaps of the other.  Their steps along one dimension are so
    long that each ends beyond BEYOND, the others short."""
    counts = [x.shape[along] for x in tensors]
    slices = [x.numel() // count for x, count in zip(tensors, counts, strict=True)]
    long = -(-BEYOND // (min(counts) - 1))
    assert sum(slices) <= long
    where = room(long * (max(counts) - 1) + sum(slices), tensors[0].dtype)
    views = []
    for i, x in enumerate(tensors):
        strides, step = [long] * 4, 1
        for dim in (3, 2, 1, 0):
            if dim != along:
                strides[dim], step = step, step * x.shape[dim]
        views.append(where.as_strided(x.shape, strides, sum(slices[:i])).copy_(x))
        assert sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) >= BEYOND
    return views


@pytest.mark.parametrize("along", ["batch", "head", "row"])
@pytest.mark.parametrize(
    "path", ["row in one tile", "long rows", "queries", "dense"] if GPU else ["long rows", "dense"]
)
def test_offsets_beyond_two_to_the_31(path, along):
    """Strided views give the bits of compact tensors, gradients included."""
    Q, N, width = 3, 260 if path == "long rows" else 12, 8
    if GPU:
        Q, N, width = *(2 * (1100 if path == "long rows" else 100,)), 64
    shape = (3, 4, 4, Q, N, width, width) if GPU else (2, 2, 2, Q, N, width, width)
    x = inputs(path, DTYPE, mask="", shape=shape, topk=None if path == "dense" else 4)
    names = ("query", "key", "value")
    views = spread([x[name] for name in names], ("batch", "head", "row").index(along))
    assert all(torch.equal(view, x[name]) for name, view in zip(names, views, strict=True)), "the views overlap"
    assert same(run(x | dict(zip(names, views, strict=True))), run(x))


def test_mask_beyond_two_to_the_31():
    x = inputs("row in one tile", DTYPE, mask="bool")
    (view,) = spread([x["attn_mask"]], 2)
    assert same(run(x | {"attn_mask": view}), run(x))


def test_results_beyond_two_to_the_31():
    """One head, and more elements of output, then of lists, than 2^31: the last rows are those of a compact call."""
    g = torch.Generator().manual_seed(0)
    elements = BEYOND if GPU else 2**13
    for width, topk in ((64, 4), (16, 64)):
        rows = elements // 64 + 256
        room(rows * (width + 2 * topk + 32), torch.bfloat16)  # output, lists, queries
        some = torch.randn(1, 1, 64, 16, generator=g).to(DEVICE, torch.bfloat16)
        key, value = (torch.randn(1, 1, 80, n, generator=g).to(DEVICE, torch.bfloat16) for n in (16, width))
        query = some.expand(1, rows // 64, 64, 16).reshape(1, 1, -1, 16)
        out, indices = op(query, key, value, topk, return_indices=True, backend="triton")
        assert max(out.numel(), indices.numel()) > elements
        expected = op(some, key, value, topk, return_indices=True, backend="triton")
        for part in (slice(0, 64), slice(-64, None)):
            assert same([out[:, :, part], indices[:, :, part]], list(expected))
        del query, out, indices


def side_by_side(*works) -> list:
    """What the works return, each in a stream of its own and held up until all are queued; in a rehearsal in turn."""
    if not GPU:
        return [work() for work in works]
    here, streams, results = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in works], []
    for beside, work in zip(streams, works, strict=True):
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            torch.cuda._sleep(2_000_000)
            results.append(work())
    for beside in streams:
        here.wait_stream(beside)
    wait()
    return results


@pytest.mark.parametrize("path", PATHS)
def test_another_stream(path):
    """Inputs that are still being made in a stream are waited for, because the kernels run in it."""

    def late(x: dict) -> list[torch.Tensor]:
        for name in blank:
            blank[name].copy_(x[name], non_blocking=True)
        return run(x | blank)

    for seed in range(10 if GPU else 1):
        x = inputs(path, DTYPE, seed)
        blank = {n: torch.zeros_like(v) for n, v in x.items() if isinstance(v, torch.Tensor)}
        expected = run(x)
        assert same(side_by_side(lambda x=x: late(x))[0], expected)


def test_two_streams_at_once():
    """Neither call sees the scratch memory of the other."""
    x = [inputs(path, DTYPE) for path in (("long rows", "few long rows") if GPU else ("row in one tile", "dense"))]
    expected = [run(one) for one in x]
    for _ in range(50 if GPU else 1):
        got = side_by_side(lambda: run(x[0]), lambda: run(x[1]))
        assert all(map(same, got, expected))


@needs_two_gpus
def test_tensors_decide_the_device():
    x = {n: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for n, v in inputs("long rows", DTYPE).items()}
    with torch.cuda.device(1):
        expected = run(x)
    with torch.cuda.device(0):
        got = run(x)
        assert torch.cuda.current_device() == 0
    assert all(v.device.index == 1 for v in got) and same(got, expected)


@pytest.mark.parametrize("topk, axis", [(3, "keys"), (2, "queries"), (None, "keys")])
def test_more_heads_than_a_grid_dimension_holds(topk, axis):
    """B * H beyond 65535, the most of the second and third dimension of a grid."""
    batch, heads = (17000, 4) if GPU else (3, 2)
    g = torch.Generator().manual_seed(0)
    x = {n: torch.randn(batch, heads, tokens, 8, generator=g).to(DEVICE) for n, tokens in (("query", 3), ("key", 5))}
    x |= {"value": x["key"].flip(-1), "topk": topk, "axis": axis}
    whole = run(x)
    for pick in (slice(0, 2), slice(-2, None)):
        part = {n: v[pick] if isinstance(v, torch.Tensor) else v for n, v in x.items()}
        assert same(run(part), [v[pick] for v in whole])


# What starts each kernel of the table: (Q, N, topk, axis), with lengths for half types and for float32.
LISTS, DENSE = 2 * ((70, 100, 2, "queries"),), 2 * ((70, 100, None, "keys"),)
STARTERS = {
    **{f"one_tile_{N}": 2 * ((70, N - 20, 9, "keys"),) for N in (128, 256, 512, 1024)},
    "stream_select": ((70, 1100, 9, "keys"), (70, 300, 9, "keys")),
    "merge_lists": 2 * ((3, 2100 if GPU else 1100, 9, "keys"),),
    "gather_forward": ((70, 1100, 9, "keys"), (70, 300, 9, "keys")),
    "gather_backward": ((70, 1100, 9, "keys"), (70, 300, 9, "keys")),
    "pack_lists": LISTS,
    "bias_gradient": LISTS,
    **dict.fromkeys(("dense_forward", "delta", "dense_query_gradient", "dense_key_gradient"), DENSE),
}


def test_every_kernel_of_the_table_has_a_starter():
    from hivilt.triton_kernels import configs

    assert set(configs.KERNELS) == set(STARTERS)


WIDTHS = [*((dtype, width) for dtype in DTYPES for width in (64, 128, 256)), (torch.float16, 64)]


@pytest.mark.parametrize("masked", [False, True] if GPU else [True])
@pytest.mark.parametrize("dtype, width", WIDTHS if GPU else [(torch.float32, 16)], ids=str)
@pytest.mark.parametrize("kernel", STARTERS)
def test_every_configuration(kernel, dtype, width, masked, nan_filled_memory, monkeypatch):
    """Each row of the table by itself: its kernel writes all that it has to write, and nothing unwritten is read."""
    from hivilt.triton_kernels import configs

    used, lookup = set(), configs.lookup

    def noted(part, name, *key):
        used.add(name.removesuffix("_heavy"))
        return lookup(part, name, *key)

    monkeypatch.setattr(configs, "lookup", noted)
    Q, N, topk, axis = STARTERS[kernel][dtype == torch.float32]
    Q = Q if GPU else 3
    D = width - 3 if width > 64 else width  # also columns that a tile has and the tensor has not
    bias = kernel == "bias_gradient"
    plain = {"mask": "float" if bias else "", "mask_shape": (1, 2, Q, N) if bias else (), "select": 0, "scale": None}
    plain |= {"fill": "normal", "key_mask": masked, "query_mask": False, "layout": ("contiguous",) * 3}
    case = t.case(1, dtype, shape=(1, 2, 2, Q, N, D, D), topk=topk, axis=axis, **plain)
    t.check(op, case, backend="triton", device=DEVICE, backward=True)
    if kernel.startswith("one_tile") and kernel not in used and "stream_select" in used:
        pytest.skip(f"such rows of {N} are too long for one tile of this GPU")
    assert kernel in used, f"the call did not start it, but {', '.join(sorted(used))}"


COLD = """
import hashlib, sys, torch, hivilt
device = sys.argv[1]
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, n, 16, generator=g).to(device).requires_grad_() for n in (9, 21, 21))
out, lse = hivilt.ops.topk_attention(q, k, v, 5, return_lse=True, backend="triton")
grads = torch.autograd.grad(out.sum(), (q, k, v))
print(hashlib.sha256(b"".join(x.detach().cpu().numpy().tobytes() for x in (out, lse, *grads))).hexdigest())
"""


def test_two_processes_fill_a_cold_cache(tmp_path):
    """Both compile at the same time into one empty cache; neither loads what the other has half written."""
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(fresh.run, COLD, DEVICE, timeout=90, TRITON_CACHE_DIR=str(tmp_path)) for _ in range(2)]
        done = [each.result() for each in both]
    assert [process.returncode for process in done] == [0, 0], done
    assert done[0].stdout == done[1].stdout


@pytest.mark.parametrize("topk, axis", [(None, "keys"), (9, "keys"), (4, "queries")])
@pytest.mark.parametrize("p", [0.1, 0.7])
def test_dropout_mask_is_the_documented_one(topk, axis, p):
    """Read off bit by bit: with values one-hot, an output element is a probability, dropped or not."""
    B, H, Q, N = (3, 5, 131, 200) if GPU else (2, 2, 7, 18)
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(B, H, n, 16, generator=g).to(DEVICE) for n in (Q, N))
    value = torch.eye(N, device=DEVICE).expand(B, H, N, N)
    for seed in (0, 2**63 - 1, -7):
        number = torch.tensor(seed, device=DEVICE)
        rest = (-1 if topk is None else topk, int(axis == "queries"), *(None,) * 7)
        operator = torch.ops.hivilt.topk_attention
        plain, dropped = (
            operator(query, key, value, *rest, number if rate else None, 0.25, rate, "triton")[0] for rate in (0.0, p)
        )
        keep = t.dropout_keep(seed, p, (B, H, Q, N)).to(DEVICE)
        assert torch.equal(dropped != 0, (plain != 0) & (keep != 0))
        torch.testing.assert_close(dropped.double(), plain.double() * keep, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, *([torch.float16] if GPU else [])], ids=str)
@pytest.mark.parametrize("path", [path for path in PATHS if path != "dense"])
def test_selection_equals_that_of_the_cpu(path, dtype, verdicts):
    """Where scores are exact, ties and all, both backends list the same indices."""
    if verdicts["cpu", "cpu"] is not None:
        pytest.skip(verdicts["cpu", "cpu"])
    for seed in (0, 3, 7) if GPU else (0, 7):  # integers up to seed + 1, so of few values and of many
        x = inputs(path, dtype, seed, fill="integers", scale=None if "shared" in path else 1.0)
        x.pop("value")
        here = {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
        got = select(**x, backend="triton")
        assert torch.equal(got.cpu(), select(**here, backend="cpu")), f"seed {seed}"


@needs_gpu
@pytest.mark.parametrize("sizes", [(8, 12, 1024, 512, 64, 32), (2, 12, 4096, 4096, 64, 64)], ids=str)
def test_memory_of_a_forward(sizes):
    """Beyond inputs and results less than 64 MB, where one matrix of scores would be 100 MB and 800 MB."""
    B, H, Q, N, D, topk = sizes
    x = [torch.randn(B, H, tokens, D, device=DEVICE, dtype=torch.bfloat16) for tokens in (Q, N, N)]
    op(*x, topk)
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = op(*x, topk)
    wait()
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert extra < 64e6, f"{extra / 1e6:.1f} MB"


@needs_gpu
def test_memory_does_not_grow():
    x = inputs("long rows", DTYPE)
    run(x)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        run(x)
    assert torch.cuda.memory_allocated() == before
