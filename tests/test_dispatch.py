"""Which backend runs, and that tracing and transforming a call changes nothing: policy, explain, warnings, threads,
torch.compile, export, make_fx, vmap, grad, checkpoint, autocast, fake tensors, flop counting."""

import re
import threading
import warnings

import fresh
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import hivilt
from hivilt import _backends, _settings
from hivilt.ops import _topk_attention_reference as sliced
from hivilt.ops import selected_attention, topk_attention, topk_attention_varlen, topk_select

B, H, G, Q, N, D, E = 2, 4, 2, 5, 7, 8, 6
SAMPLES = 3
needs_library = pytest.mark.skipif(not hivilt._library.loaded, reason="no C++ library was built here")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def inputs(B=B, H=H, G=G, Q=Q, N=N, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return draw(B, H, Q, D, dtype=dtype), draw(B, G, N, D, dtype=dtype), draw(B, G, N, E, dtype=dtype)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def loss(query, key, value, bias=None, topk=3, **options):
    out, lse = topk_attention(query, key, value, topk, attn_mask=bias, return_lse=True, **options)
    return out.sin().sum() + lse.nan_to_num(neginf=0.0).cos().sum()


def equal(got, expected, exact=True):
    got, expected = (x if isinstance(x, tuple | list) else (x,) for x in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b) if exact else torch.allclose(a, b, atol=2e-6), (a.double() - b).abs().max()


@pytest.fixture
def forgetful(monkeypatch):
    """Warnings that were said before may be said again."""
    monkeypatch.setattr(_backends, "_said", set())


@pytest.fixture
def environment(monkeypatch):
    """Sets HIVILT_* variables and reads them, until the test is over."""

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        _settings.refresh()

    yield put
    monkeypatch.undo()
    _settings.refresh()


# Policy: argument, use_backend, HIVILT_BACKEND, auto.


@needs_library
def test_auto_takes_the_fast_row():
    x = inputs()
    topk_attention(*x, 3)
    assert hivilt.last_backend() == "cpu"
    topk_select(*x[:2], 3)
    assert hivilt.last_backend() == "cpu"


@needs_library
def test_argument_beats_context_beats_environment(environment):
    x = inputs()

    def ran(**options):
        topk_attention(*x, 3, **options)
        return hivilt.last_backend()

    environment(HIVILT_BACKEND="reference")
    assert ran() == "reference"
    with hivilt.use_backend("cpu"):
        assert ran() == "cpu"
        assert ran(backend="reference") == "reference"
        with hivilt.use_backend("reference"):
            assert ran() == "reference"
            with hivilt.use_backend("auto"):
                assert ran() == "cpu"
            assert ran() == "reference"
        assert ran() == "cpu"
    assert ran() == "reference"
    assert ran(backend="auto") == "cpu"


def test_context_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), hivilt.use_backend("reference"):
        raise ZeroDivisionError
    assert _backends.policy(None) == "auto"


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "reference "])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"expected one of 'auto', .*'cpu'.*got"):
        topk_attention(*inputs(), 3, backend=name)
    with pytest.raises(ValueError, match="expected one of"):
        hivilt.use_backend(name)


@pytest.mark.parametrize("name", [1, b"cpu", torch.device("cpu")])
def test_name_of_another_type(name):
    with pytest.raises(TypeError, match="backend: expected one of"):
        topk_attention(*inputs(), 3, backend=name)
    with pytest.raises(TypeError):
        hivilt.use_backend(name)


@pytest.mark.parametrize("name, why", [("triton", "TRITON_INTERPRET=1"), ("cuda", "ships no CUDA")])
def test_explicit_request_raises_with_its_reason(name, why, monkeypatch):
    monkeypatch.delenv(
        "TRITON_INTERPRET", raising=False
    )  # on the CPU the Triton kernels run interpreted, or not at all
    with pytest.raises(hivilt.BackendError, match=rf"topk_attention: backend '{name}'.*{why}") as caught:
        topk_attention(*inputs(), 3, backend=name)
    assert isinstance(caught.value, RuntimeError)
    with hivilt.use_backend(name), pytest.raises(hivilt.BackendError, match=why):
        topk_select(*inputs()[:2], 3)


def test_refusal_names_every_reason():
    wide = draw(1, 1, 2, 300, dtype=torch.float64)
    with pytest.raises(hivilt.BackendError, match=r"float64.*D = 300.*up to 256"):
        topk_attention(wide, wide, wide, 1, backend="cpu")


def test_library_that_is_missing(monkeypatch, forgetful):
    monkeypatch.setattr(hivilt._library, "loaded", False)
    monkeypatch.setattr(hivilt._library, "_load_failure", "the C++ library is not built (no compiler)")
    x = inputs()
    with pytest.raises(hivilt.BackendError, match="not built"):
        topk_attention(*x, 3, backend="cpu")
    with pytest.warns(RuntimeWarning, match="topk_attention runs on the PyTorch reference.*not built"):
        topk_attention(*x, 3)
    assert hivilt.last_backend() == "reference"


def test_fallback_is_said_once_per_operation_and_reason(forgetful):
    x = leaves(*inputs(dtype=torch.float64))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            topk_attention(*x, 3).sum().backward()
        assert [w.category for w in said] == [RuntimeWarning] and "float64" in str(said[0].message)
        assert said[0].filename == __file__
        topk_select(*x[:2], 3)
        assert len(said) == 2
        topk_attention(*x, 3, backend="reference")
        with hivilt.use_backend("reference"):
            topk_attention(*x, 3)
        assert len(said) == 2


def test_strict_refuses_to_fall_back(environment):
    environment(HIVILT_STRICT="1")
    x = inputs(dtype=torch.float64)
    with pytest.raises(hivilt.BackendError, match=r"HIVILT_STRICT=1.*float64"):
        topk_attention(*x, 3)
    topk_attention(*x, 3, backend="reference")


def test_dispatch_log(environment, capsys):
    environment(HIVILT_LOG="dispatch")
    topk_attention(*inputs(), 3, backend="reference")
    assert re.fullmatch(r"hivilt: topk_attention float32\[2, 4, 5, 8\] on cpu -> reference\n", capsys.readouterr().err)


@needs_library
def test_threads_do_not_see_each_other():
    x, seen, ready = inputs(), {}, threading.Barrier(2)

    def work(name: str) -> None:
        with hivilt.use_backend(name):
            ready.wait()
            for _ in range(20):
                topk_attention(*x, 3)
            seen[name] = hivilt.last_backend()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("cpu", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"cpu": "cpu", "reference": "reference"}


@needs_library
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_backward_runs_where_forward_ran(name):
    x = leaves(*inputs())
    with hivilt.use_backend(name):
        out = topk_attention(*x, 3)
    out.sum().backward()
    assert hivilt.last_backend() == name
    chosen = selected_attention(*x, topk_select(*x[:2], 3), backend=name)
    topk_attention(*x, 3)
    chosen.sum().backward()
    assert hivilt.last_backend() == name


# explain


def test_explain(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = inputs()
    verdicts = hivilt.explain("topk_attention", *x, topk=3)
    assert list(verdicts) == ["cuda", "triton", "cpu", "reference"]
    assert verdicts["reference"] is None and "Triton" in verdicts["triton"] and "CUDA" in verdicts["cuda"]
    assert (verdicts["cpu"] is None) == hivilt._library.loaded
    printed = capsys.readouterr().out
    assert all(name in printed for name in verdicts) and "asked for auto" in printed
    assert hivilt.explain(hivilt.ops.topk_attention, *x, 3, backend="triton") == verdicts
    assert "raises BackendError" in capsys.readouterr().out


def test_explain_every_operation():
    query, key, value = inputs()
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert "float64" in hivilt.explain(topk_select, query.double(), key.double(), 2)["cpu"]
    assert hivilt.explain(selected_attention, query, key, value, topk_select(query, key, 2))["reference"] is None
    packed = (query[0].transpose(0, 1), key[0].transpose(0, 1)[:5], value[0].transpose(0, 1)[:5])
    assert hivilt.explain(topk_attention_varlen, *packed, cu, cu, 3, 3, 2)["reference"] is None


def test_explain_judges_the_call_first():
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"explain: op: expected one of.*topk_attention"):
        hivilt.explain("attention", query)
    with pytest.raises(ValueError, match="topk_attention: key: expected"):
        hivilt.explain(topk_attention, query, key[..., :3], value)
    with pytest.raises(TypeError):
        hivilt.explain(topk_attention, query, key)


# Tracing. aot_eager shows everything but code generation, at a fraction of the time.


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager"} | options)


@pytest.mark.parametrize("topk", [3, None])
def test_compile_equals_eager_bit_for_bit(topk):
    x = leaves(*inputs(), draw(B, 1, Q, N))
    function = compiled(loss)
    got, expected = function(*x, topk=topk), loss(*x, topk=topk)
    equal(got, expected)
    equal(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))


def test_compile_with_inductor():
    x = leaves(*inputs())
    got, expected = compiled(loss, backend="inductor")(*x), loss(*x)
    equal(got, expected, exact=False)
    equal(torch.autograd.grad(got, x), torch.autograd.grad(expected, x), exact=False)


def test_compile_dynamic_shapes_compile_once():
    counter = CompileCounterWithBackend("aot_eager")
    function, compilations = compiled(loss, backend=counter, dynamic=True), []
    for b, q, n in ((3, 5, 7), (5, 9, 11), (4, 6, 30), (7, 33, 8)):
        x = leaves(*inputs(B=b, Q=q, N=n))
        got, expected = function(*x), loss(*x)
        equal(got, expected)
        equal(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


def test_compile_the_other_functions():
    query, key, value = leaves(*inputs())
    source = draw(B, Q, 3), draw(B, N, 3)

    def halves(query, key, value):
        indices = topk_select(query, key, 3, select_query=source[0], select_key=source[1])
        return selected_attention(query, key, value, indices, return_lse=True)

    equal(compiled(halves)(query, key, value), halves(query, key, value))
    cu_q, cu_k = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 7])

    def packed(query, key, value):
        return topk_attention_varlen(query, key, value, cu_q, cu_k, 3, 4, 2, return_lse=True, return_indices=True)

    x = leaves(draw(5, H, D), draw(7, G, D), draw(7, G, E))
    got, expected = compiled(packed)(*x), packed(*x)
    equal(got, expected)
    equal(torch.autograd.grad(got[0].sum(), x), torch.autograd.grad(expected[0].sum(), x))


@needs_library
def test_use_backend_around_a_compiled_function():
    function, x = compiled(loss), inputs()
    function(*x)
    assert hivilt.last_backend() == "cpu"
    with hivilt.use_backend("reference"):
        function(*x)
    assert hivilt.last_backend() == "reference"
    compiled(lambda *x: loss(*x, backend="reference"))(*x)
    assert hivilt.last_backend() == "reference"


def test_use_backend_inside_a_compiled_function_is_not_forgotten():
    def inside(x):
        with hivilt.use_backend("reference"):
            return topk_attention(x, x, x, 2)

    torch._dynamo.reset()
    torch.compile(inside, backend="eager")(draw(1, 1, 4, 4))  # leaves the graph and runs as written
    assert hivilt.last_backend() == "reference"
    with pytest.raises(Exception, match=r"use_backend|Observed exception"):
        compiled(inside, backend="eager")(draw(1, 1, 4, 4))


class Attend(torch.nn.Module):
    def forward(self, query, key, value):
        return topk_attention(query, key, value, 3, return_indices=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_operator(strict):
    x, tokens = inputs(), torch.export.Dim("tokens", min=4, max=100)
    program = torch.export.export(Attend(), x, dynamic_shapes=({}, {2: tokens}, {2: tokens}), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "hivilt.topk_attention.default" in names
    longer = inputs(N=20)
    equal(program.module()(*longer), Attend()(*longer))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    x = inputs()
    graph = make_fx(lambda *x: topk_attention(*x, 3), tracing_mode=mode)(*x)
    assert "hivilt.topk_attention" in graph.code
    equal(graph(*x), topk_attention(*x, 3))


@pytest.mark.parametrize("topk, axis", [(3, "keys"), (2, "queries"), (None, "keys")])
def test_fake_and_meta_tensors_have_the_real_form(topk, axis):
    def form(query, key, value):
        results = topk_attention(query, key, value, topk, axis=axis, return_lse=True, return_indices=topk is not None)
        grads = torch.autograd.grad(results[0].sum(), (query, key, value))
        return [(r.shape, r.stride(), r.dtype) for r in (*results, *grads)]

    x = leaves(*inputs())
    expected = form(*x)
    assert form(*(t.detach().to("meta").requires_grad_() for t in x)) == expected
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(t) for t in x)
        assert form(*fakes) == expected
    assert form(*fakes) == expected  # also where the mode has ended


# Transforms.


def test_func_grad_equals_backward():
    x = (*inputs(), draw(B, 1, Q, N))
    own = leaves(*x)
    equal(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*x), torch.autograd.grad(loss(*own), own))


def grads(*x, **options):
    return torch.func.grad(lambda *x: loss(*x, **options), argnums=tuple(range(len(x))))(*x)


def halves(query, key, value):
    return selected_attention(query, key, value, topk_select(query, key, 3), return_lse=True)


def everything(*x, **options):
    return topk_attention(*x, 3, return_lse=True, return_indices=True, **options)


PACKED = [torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7]), 3, 4]
MAPPED = {
    "all": (everything, (0, 1, 4)),
    "query alone": (everything, (0, None, None)),
    "dense": (lambda *x: topk_attention(*x, return_lse=True), (0, 1, 4)),
    "queries": (lambda *x: everything(*x, axis="queries"), (0, 0, None)),
    "bias": (lambda q, k, v, m: everything(q, k, v, attn_mask=m), (0, None, None, 4)),
    "one bias": (lambda q, k, v, m: everything(q, k, v, attn_mask=m[:1]), (0, None, 0, None)),
    "gradients": (grads, (0, 1, 4)),
    "gradients of query alone": (grads, (0, None, None)),
    "gradients dense": (lambda *x: grads(*x, topk=None), (0, 1, 4)),
    "gradients of bias": (grads, (0, None, None, 4)),
    "gradients of one bias": (lambda q, k, v, m: grads(q, k, v, m[:1]), (0, None, None, None)),
    "halves": (halves, (0, 1, 4)),
    "packed": (lambda q, k, v: topk_attention_varlen(q[0], k[0], v[0], *PACKED, 2), (0, None, 0)),
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_equals_a_loop(name):
    function, dims = MAPPED[name]
    shapes = [(B, H, Q, D), (B, G, N, D), (B, G, N, E), (B, H, Q, N)][: len(dims)]
    if name == "packed":
        shapes = [(1, Q, H, D), (1, N, G, D), (1, N, G, E)]
    x = [
        draw(*shape) if d is None else draw(*shape[:d], SAMPLES, *shape[d:])
        for shape, d in zip(shapes, dims, strict=True)
    ]
    got = torch.vmap(function, dims)(*x)
    each = [
        function(*(t if d is None else t.select(d, i) for t, d in zip(x, dims, strict=True))) for i in range(SAMPLES)
    ]
    if isinstance(got, Tensor):
        got, each = (got,), [(result,) for result in each]
    equal(got, tuple(torch.stack(parts) for parts in zip(*each, strict=True)), exact=False)


def test_vmap_of_vmap_and_grad_of_vmap():
    query, key, value = inputs()
    many = draw(2, 3, *query.shape)
    got = torch.vmap(torch.vmap(lambda q: topk_attention(q, key, value, 3)))(many)
    equal(got[1, 2], topk_attention(many[1, 2], key, value, 3), exact=False)
    got = torch.func.grad(lambda q: torch.vmap(lambda q: loss(q, key, value))(q).sum())(many[0])
    equal(got[1], torch.func.grad(loss)(many[0, 1], key, value), exact=False)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_dropout(randomness):
    query, key, value = inputs()
    value = torch.ones_like(value)
    same = query.expand(SAMPLES, *query.shape)
    out = torch.vmap(lambda q: topk_attention(q, key, value, dropout_p=0.5), randomness=randomness)(same)
    assert torch.equal(out[0], out[1]) == (randomness == "same")


def test_double_backward_raises():
    x = leaves(*inputs())
    first = torch.autograd.grad(loss(*x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(first[0].sum(), x[0])


def test_forward_mode_raises_instead_of_dropping_tangents():
    query, key, value = inputs()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        topk_attention(torch.autograd.forward_ad.make_dual(query, query), key, value, 3)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda q: topk_attention(q, key, value, 3), (query,), (query,))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_repeats_the_dropout_mask(reentrant):
    x, again = leaves(*inputs()), leaves(*inputs())
    again = tuple(t.detach().clone().requires_grad_() for t in x)
    torch.manual_seed(1)
    checkpoint(lambda *x: loss(*x, dropout_p=0.5), *x, use_reentrant=reentrant).backward()
    torch.manual_seed(1)
    loss(*again, dropout_p=0.5).backward()
    equal([t.grad for t in x], [t.grad for t in again])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_attention_does(dtype):
    x, source = leaves(*inputs()), (draw(B, Q, 3), draw(B, N, 3))
    options = {"select_query": source[0], "select_key": source[1], "return_indices": True}
    with torch.autocast("cpu", dtype=dtype):
        out, indices = topk_attention(*x, 3, **options)
        assert topk_attention(*(t.double() for t in x), 3).dtype == torch.float64
    assert out.dtype == dtype
    by_hand, same = topk_attention(*(t.to(dtype) for t in x), 3, **options)
    equal((out, indices), (by_hand, same))
    assert torch.equal(indices, topk_attention(*x, 3, **options)[1])  # the selection source is judged as given
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), x)] == [torch.float32] * 3
    with torch.autocast("cpu", dtype=dtype):
        equal(compiled(lambda *x: topk_attention(*x, 3))(*x), topk_attention(*x, 3))


def test_inference_mode():
    x = inputs()
    with torch.inference_mode():
        equal(topk_attention(*x, 3), topk_attention(*(t.clone() for t in x), 3))


def test_flops_are_counted():
    counter = pytest.importorskip("torch.utils.flop_counter")
    x = leaves(*inputs())
    with counter.FlopCounterMode(display=False) as mode:
        loss(*x).backward()
    forward = 2 * B * H * (Q * N * D + Q * 3 * E)
    assert mode.get_total_flops() == forward + 2 * B * H * Q * 3 * (3 * D + 2 * E)


# The reference row in slices, and what importing costs.


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("topk", [3, None])
def test_slices_of_the_reference_change_nothing(axis, shared, topk, monkeypatch):
    x = leaves(*inputs(), draw(B, 1, 1, N))
    source = {"select_query": draw(B, Q, 3), "select_key": draw(B, N, 3)} if shared else {}

    def run():
        torch.manual_seed(3)
        out, lse = topk_attention(*x[:3], topk, axis=axis, attn_mask=x[3], dropout_p=0.3, return_lse=True,
                                  backend="reference", **source)  # fmt: skip
        return out, lse, *torch.autograd.grad((out * out).sum() + lse.nan_to_num(neginf=0).sum(), x)

    whole = run()
    for pairs in (1, 17, 100):
        monkeypatch.setattr(sliced, "PAIRS", pairs)
        equal(run(), whole)


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import hivilt; new = {n.split('.')[0] for n in set(sys.modules)"
        " - before}; assert not new & {'triton', 'transformers', 'numpy', 'matplotlib'}, new; "
        "rooms = {'hivilt.nn', 'hivilt.swap', 'hivilt.testing'} & set(sys.modules); assert not rooms, rooms; "
        "assert not any(n.startswith('torch._dynamo') for n in set(sys.modules) - before)"
    )
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'attention'"):
        hivilt.attention  # noqa: B018
    assert {"accelerate", "nn", "topk_attention", "use_backend"} <= set(dir(hivilt))
