"""Every way through the Triton kernels of family A, in the interpreter at small sizes: the limits that decide between
kernels are moved so that small calls take the ways of large ones."""

import itertools

import pytest
import torch

import hivilt
import hivilt.testing as t

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("the kernels run on the GPU here, at sizes of their own", allow_module_level=True)

configs = pytest.importorskip("hivilt.triton_kernels.configs")
launch = pytest.importorskip("hivilt.triton_kernels.launch")
plan = pytest.importorskip("hivilt.triton_kernels.topk_attention_plan")
interpreter = pytest.importorskip("interpreter")

op, varlen = hivilt.ops.topk_attention, hivilt.ops.topk_attention_varlen
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NEVER = 10**9

# way -> (FUSED, columns that fit into a tile, GATHER_FROM, SAMPLE, multiprocessors)
WAYS = {
    "fused": (NEVER, 1024, NEVER, 16, 2),
    "tile, bitmask": (0, 1024, NEVER, 16, 2),
    "stream, lists": (0, 0, 0, 16, 2),
    "stream, bitmask": (0, 0, NEVER, 16, 1),
    "stream in parts, lists": (0, 0, 0, 16, 132),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    fused, tile, gather, sample, multiprocessors = WAYS[request.param]
    for name, value in {"FUSED": fused, "GATHER_FROM": gather, "SAMPLE": sample, "SAMPLE_SINGLE": sample}.items():
        monkeypatch.setattr(plan, name, value)
    limits = configs.LIMITS["sm_90"]._replace(one_tile_half=tile, one_tile_single=tile)
    monkeypatch.setitem(configs.LIMITS, "sm_90", limits)
    monkeypatch.setattr(launch, "part_of", lambda x: ("sm_90", multiprocessors))
    # Tiles of 16 columns: short rows have several, and parts of their own.
    small = {key: c._replace(cols=16) for key, c in configs.TABLE["sm_90"].items() if key[0] == "stream_select"}
    monkeypatch.setitem(configs.TABLE, "sm_90", configs.TABLE["sm_90"] | small)
    configs.forget()
    request.addfinalizer(configs.forget)
    return request.param


@pytest.fixture
def started(monkeypatch) -> set[str]:
    """Names of the kernels that calls start."""
    names: set[str] = set()
    start = launch.launch

    def noted(kernel, *args, **constants):
        names.add(kernel.__name__)
        return start(kernel, *args, **constants)

    monkeypatch.setattr(launch, "launch", noted)
    return names


PLAIN = {"mask": "", "mask_shape": (), "key_mask": False, "query_mask": False, "select": 0, "topk": 5, "axis": "keys",
         "scale": None, "fill": "normal", "layout": ("permuted", "contiguous", "offset3")}  # fmt: skip
SHAPE = (1, 2, 1, 21, 70, 12, 10)
CALLS = {
    "plain": {"shape": (1, 4, 2, 21, 70, 12, 10)},
    "one": {"topk": 1},
    "most": {"topk": 60},
    "ties": {"fill": "ties", "topk": 9},
    "heavy tails": {"fill": "heavy", "topk": 20},
    "bias": {"mask": "float", "mask_shape": (1, 2, 21, 70)},
    "bias of keys": {"mask": "float", "mask_shape": (1, 1, 1, 70)},
    "bias of queries": {"mask": "float", "mask_shape": (1, 2, 21, 1)},
    "bool and padding": {"mask": "bool", "mask_shape": (1, 1, 21, 70), "key_mask": True, "query_mask": True},
    "queries": {"axis": "queries", "mask": "float", "mask_shape": (1, 1, 21, 70)},
    "shared": {"select": 7, "key_mask": True, "mask": "float", "mask_shape": (1, 1, 21, 70)},
    "shared queries": {"select": 40, "axis": "queries"},
    "dense": {"topk": None, "mask": "float", "mask_shape": (1, 1, 1, 1), "query_mask": True},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_every_way_within_budget(way, call, dtype):
    seed = list(CALLS).index(call)
    t.check(op, t.case(seed, dtype, **PLAIN | {"shape": SHAPE} | CALLS[call]), backend="triton", backward=True)


def test_every_way_takes_its_kernels(way, started):
    t.check(op, t.case(1, torch.bfloat16, shape=SHAPE, **PLAIN), backend="triton", backward=True)
    expected = {
        "fused": {"_topk_attention_kernel"},
        "tile, bitmask": {"_topk_attention_kernel", "_attention_forward_kernel"},
        "stream, lists": {"_stream_select_kernel", "_gather_forward_kernel", "_gather_key_gradient_kernel"},
        "stream, bitmask": {"_stream_select_kernel", "_pack_lists_kernel", "_attention_forward_kernel"},
        "stream in parts, lists": {"_stream_select_kernel", "_gather_forward_kernel", "_gather_query_gradient_kernel"},
    }
    assert expected[way] <= started


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_in_parts(monkeypatch, started, dtype):
    """Few long rows: several programs share each, and their lists are merged; masked parts hold nothing."""
    monkeypatch.setattr(launch, "part_of", lambda x: ("sm_90", 132))
    monkeypatch.setattr(plan, "one_tile", lambda *_: 0)
    case = t.case(3, dtype, shape=(1, 2, 1, 3, 1400, 8, 8), **PLAIN | {"topk": 7, "key_mask": True, "fill": "ties"})
    x = case.inputs()
    x["key_mask"][:, 400:1100] = False
    t.judge(op, x, backend="triton", backward=True)
    assert {"_merge_lists_kernel", "_gather_forward_kernel"} <= started
    x["key"][0, 0, 1200] = float("nan")  # seen by the program of the last part alone
    x["key_mask"][:, 1200] = True
    assert op(**x, backend="triton").isnan().all()


def test_sampled_bar_that_is_too_high(monkeypatch):
    """The sample sees only high scores: every row would keep too few, and runs again without a bar."""
    monkeypatch.setattr(plan, "one_tile", lambda *_: 0)
    monkeypatch.setattr(plan, "SAMPLE_SINGLE", 16)
    key = torch.rand(1, 1, 512, 4)
    key[:, :, :: 512 // 16] += 100.0
    x = {"query": torch.rand(1, 1, 5, 4), "key": key, "value": torch.randn(1, 1, 512, 4), "topk": 40}
    t.judge(op, x, backend="triton")


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "minus infinity"])
@pytest.mark.parametrize("way", ["stream, lists"], indirect=True)
def test_buffer_that_keeps_filling_up(way, order):
    scores = torch.arange(600.0)
    scores = {"ascending": scores, "descending": -scores, "equal": scores * 0, "minus infinity": scores * 0}[order]
    bias = scores.view(1, 1, 1, 600).clone()
    if order == "minus infinity":
        bias[..., 3:] = float("-inf")
    x = {"query": torch.zeros(1, 1, 2, 4), "key": torch.zeros(1, 1, 600, 4), "value": torch.randn(1, 1, 600, 4)}
    t.judge(op, x | {"attn_mask": bias, "topk": 11}, backend="triton", backward=True, exact=True)


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_packed_calls(way, axis):
    """Empty segments at every place, and tokens behind the last one."""
    lengths_q, lengths_k = [0, 5, 17, 0, 9], [4, 0, 33, 6, 20]
    starts = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    tokens = [int(s[-1]) + 2 for s in starts]
    query, key, value = (torch.randn(n, h, 8) for n, h in ((tokens[0], 4), (tokens[1], 2), (tokens[1], 2)))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse, indices = varlen(
        *leaves,
        *starts,
        max(lengths_q),
        max(lengths_k),
        3,
        axis=axis,
        return_lse=True,
        return_indices=True,
        backend="triton",
    )
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, upstream)
    for b in range(len(lengths_q)):
        q, k = (slice(int(s[b]), int(s[b + 1])) for s in starts)
        part = [x.detach()[i].transpose(0, 1)[None] for x, i in ((query, q), (key, k), (value, k))]
        own = indices[q if axis == "keys" else k].transpose(0, 1)[None]
        truth = t.oracle(*part, 3, axis=axis, indices=own, grad_out=upstream[q].transpose(0, 1)[None])
        got = {"out": out[q], "query": grads[0][q], "key": grads[1][k], "value": grads[2][k]}
        for name, x in got.items():
            t.assert_within(
                x.detach().transpose(0, 1)[None], truth.values[name], truth.budget(name, torch.float32), f"{b} {name}"
            )
    assert not out[tokens[0] - 2 :].any() and (lse[tokens[0] - 2 :] == float("-inf")).all()


@pytest.mark.parametrize("keys", [20, 70])
def test_indices_out_of_range_list_nothing(monkeypatch, keys):
    """As in a captured CUDA graph, where nobody can look at them: both ways, under a bitmask and over lists."""
    monkeypatch.setattr("hivilt.ops._topk_attention_triton.check_lists", lambda *_: None)
    leaves = [torch.randn(2, 2, n, 8, requires_grad=True) for n in (5, keys, keys)]
    sound = torch.tensor([[3, -1], [0, 9], [-1, -1], [19, 4], [-1, 2]], dtype=torch.int32).expand(2, 2, 5, 2)
    found = []
    for wild in (-1, keys, keys + 3, 2**31 - 1):
        indices = torch.where(sound < 0, wild, sound)
        out = hivilt.ops.selected_attention(*leaves, indices, backend="triton")
        found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_default_device_is_not_that_of_segments():
    """As after ``torch.set_default_device("cuda")``."""
    x, starts = torch.randn(7, 2, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    with torch.device("meta"):
        out = varlen(x, x, x, starts, starts, 4, 4, 2, backend="triton")
    assert torch.equal(out, varlen(x, x, x, starts, starts, 4, 4, 2, backend="triton"))


def test_dropout_is_the_documented_mask(way):
    x = t.case(4, torch.float32, shape=(2, 2, 1, 9, 33, 8, 8), **PLAIN).inputs()
    torch.manual_seed(5)
    seed = hivilt.ops._running.draw_seed(x["query"])
    torch.manual_seed(5)
    leaves = [x[name].requires_grad_() for name in ("query", "key", "value")]
    out, indices = op(**x, dropout_p=0.4, return_indices=True, backend="triton")
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, upstream)
    keep = t.dropout_keep(int(seed), 0.4, (2, 2, 9, 33))
    x = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in x.items()}
    truth = t.oracle(**x, indices=indices, keep=keep, grad_out=upstream)
    for name, value in zip(("out", "query", "key", "value"), (out, *grads), strict=True):
        t.assert_within(value.detach(), truth.values[name], truth.budget(name, torch.float32), name)


def test_poison_that_no_row_keeps_changes_no_bit(way):
    case = t.case(
        6, torch.bfloat16, shape=SHAPE, **PLAIN | {"key_mask": True, "query_mask": True, "layout": ("contiguous",) * 3}
    )
    results = []
    for x in (case.inputs(), t.poison(case.inputs())):
        leaves = [x[name].requires_grad_() for name in ("query", "key", "value")]
        out, lse = op(**x, return_lse=True, backend="triton")
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        results.append((out, lse, *torch.autograd.grad(out, leaves, upstream)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and not b.isnan().any()


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_offsets_beyond_int32(way, name):
    """A batch stride of more than 2^31 elements, in memory that is never touched; an int32 that overflows raises."""
    x = {n: torch.randn(2, 1, T, 8).bfloat16() for n, T in (("query", 4), ("key", 40), ("value", 40))}
    want = op(**x, topk=6, backend="triton", return_lse=True)
    T, far = x[name].shape[2], 2**31 + 64
    spread = torch.empty(far + T * 8, dtype=torch.bfloat16).as_strided((2, 1, T, 8), (far, T * 8, 8, 1))
    x[name] = spread.copy_(x[name])
    with interpreter.strict():
        got = op(**x, topk=6, backend="triton", return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strict_interpreter(way, dtype):
    """The whole of a call, backward and dropout included, without an int32 that overflows."""
    case = t.case(8, dtype, shape=(1, 2, 1, 9, 40, 8, 8), **PLAIN | {"mask": "float", "mask_shape": (1, 1, 9, 40)})
    x = case.inputs()
    leaves = [x[name].requires_grad_() for name in ("query", "key", "value", "attn_mask")]
    with interpreter.strict():
        torch.autograd.grad(op(**x, dropout_p=0.5, backend="triton").float().sum(), leaves)


def test_strict_interpreter_is_strict():
    @triton.jit
    def overflow(x, n):
        n = n + 2147483647  # the language raises where it checks
        triton.language.store(x, n)

    with interpreter.strict(), pytest.raises(Exception, match="overflow"):
        overflow[(1,)](torch.zeros(1, dtype=torch.int32), 5)


@pytest.mark.pairwise
@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_outside_a_tensor(way, dtype, at):
    """Every input lies against a page that faults."""
    for extra in ({"mask": "float", "mask_shape": (1, 1, 21, 70)}, {"select": 7, "key_mask": True}):
        x = t.case(9, dtype, shape=SHAPE, **PLAIN | extra | {"layout": ("contiguous",) * 3}).inputs()
        x = {name: t.guarded(v, at) if isinstance(v, torch.Tensor) else v for name, v in x.items()}
        leaves = [x[name].requires_grad_() for name in ("query", "key", "value")]
        out = op(**x, backend="triton")
        torch.autograd.grad(out, leaves, t.guarded(torch.ones_like(out), at))
