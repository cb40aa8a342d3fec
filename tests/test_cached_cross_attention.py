"""CachedCrossAttention: the same numbers as without a cache, projections made once, and never a stale one."""

import copy
import pickle

import pytest
import torch
from plain_attention import close, plain_topk
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hivilt
from hivilt import nn as fast
from hivilt.reference import modules as plain

B, Q, N, C, H = 2, 3, 9, 16, 4
ROOMS = pytest.mark.parametrize("room", [plain, fast], ids=["plain", "fast"])


def build(room, **options):
    torch.manual_seed(3)
    module = room.CachedCrossAttention(C, H, **options).eval()
    with torch.no_grad():
        module.attn.in_proj_bias.normal_()
        module.attn.out_proj.bias.normal_()
    return module


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def sequences():
    return torch.randn(B, Q, C), torch.randn(B, N, C), torch.randn(B, N, C)


def truth(module, query, key, value, keep=None):
    keep = None if keep is None else keep[:, None, None]
    return plain_topk(module.attn, query, key, value, key.shape[1], keep=keep)[0]


def check(module, query, key, value, name="image", kept=False, keep=None):
    """The result is right, and came from the entry that was there if and only if ``kept``."""
    before = module.cache.get(name)
    out = module(query, key, value, name, key_mask=keep)
    close(out.double(), truth(module, query, key, value, keep))
    assert (before is not None and module.cache.get(name) is before) == kept
    return out


@ROOMS
@pytest.mark.parametrize("same", [True, False], ids=["key-is-value", "two-tensors"])
def test_the_second_call_projects_nothing_but_the_query(room, same):
    module = build(room)
    query, key, value = sequences()
    value = key if same else value
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as flops:
            module(query, key, value, "image")
        counts.append(flops.get_total_flops())
    assert counts[0] - counts[1] == 4 * B * N * C * C
    for i in range(3):
        check(module, torch.randn(B, 1 + i, C), key, value, kept=True)


@ROOMS
def test_without_a_name_or_without_the_cache_nothing_is_kept(room):
    module = build(room)
    query, key, value = sequences()
    for call in ((), (None,), ("image", False)):
        close(module(query, key, value, *call).double(), truth(module, query, key, value))
    assert module.cache == {}


# Never stale.


@ROOMS
@pytest.mark.parametrize("which", ["key", "value", "base"])
def test_a_write_in_place_is_seen(room, which):
    module = build(room)
    query, key, value = sequences()
    if which == "base":  # a view of a tensor is written through another
        whole = torch.randn(B, N + 1, C)
        key = value = whole[:, 1:]
    check(module, query, key, value)
    check(module, query, key, value, kept=True)
    {"key": key, "value": value, "base": whole if which == "base" else key}[which].mul_(2.0)
    check(module, query, key, value)


@ROOMS
def test_another_tensor_of_the_same_shape_is_seen(room):
    module = build(room)
    query, key, value = sequences()
    check(module, query, key, value)
    check(module, query, key.clone(), value)
    check(module, query, key, value)
    memory = key.numpy().copy()  # a tensor that dies leaves its address to the next
    for _ in range(2):
        memory += 1.0
        tensor = torch.from_numpy(memory)
        check(module, query, tensor, tensor)
        del tensor


@ROOMS
def test_views_taken_anew_are_the_same_tensor(room):
    module = build(room)
    query, whole = torch.randn(B, Q, C), torch.randn(B, N + 1, C)
    check(module, query, whole[:, 1:], whole[:, 1:])
    check(module, query, whole[:, 1:], whole[:, 1:], kept=True)
    check(module, query, whole[:, :-1], whole[:, :-1])


@ROOMS
@pytest.mark.parametrize("change", ["weight", "bias", "load", "optimizer", "new", "data"])
def test_new_parameters_are_seen(room, change):
    module = build(room)
    query, key, value = sequences()
    before = check(module, query, key, value)
    if change == "weight":
        module.attn.in_proj_weight.mul_(1.5)
    elif change == "bias":
        module.attn.in_proj_bias.add_(1.0)
    elif change == "load":
        module.load_state_dict({k: v + 0.1 for k, v in module.state_dict().items()})
    elif change == "optimizer":
        module.attn.in_proj_weight.grad = torch.ones_like(module.attn.in_proj_weight)
        torch.optim.SGD(module.parameters(), 0.1).step()
    elif change == "new":
        module.attn.in_proj_weight = nn.Parameter(torch.randn(3 * C, C))
    else:
        module.attn.in_proj_weight.data = torch.randn(3 * C, C)
    assert (check(module, query, key, value) - before).abs().max() > 1e-3


@ROOMS
def test_another_dtype_and_autocast_are_seen(room):
    module = build(room)
    query, key, value = sequences()
    one = module(query, key, value, "image")
    with torch.autocast("cpu", torch.bfloat16):
        half = module(query, key, value, "image")
        assert half.dtype == torch.bfloat16 and module.cache["image"].k.dtype == torch.bfloat16
    assert torch.equal(module(query, key, value, "image"), one)
    module.double()
    assert module.cache == {}
    check(module, query.double(), key.double(), value.double())


@ROOMS
def test_inference_tensors_are_compared(room):
    module = build(room)
    with torch.inference_mode():
        query, key, value = sequences()
        check(module, query, key, value)
        check(module, query, key, value, kept=True)
        key[0, 0] += 1.0
        check(module, query, key, value)
        check(module, query, key, value, kept=True)
    other = key.clone()
    check(module, query, other, other)


@ROOMS
def test_the_mask_is_that_of_the_call(room):
    module = build(room)
    query, key, value = sequences()
    keep = torch.rand(B, N) < 0.6
    keep[0, 0], keep[1] = True, False
    check(module, query, key, value)
    out = check(module, query, key, value, kept=True, keep=keep)
    assert (out[1] == module.attn.out_proj.bias).all()
    check(module, query, key, value, kept=True)
    key[~keep] = float("nan")
    assert torch.equal(module(query, key, value, "image", key_mask=keep.long()), out)


# How much is kept, and when.


@ROOMS
def test_compat_is_the_layer_as_first_written(room):
    """What a name's first call passed is served to later ones, written to or not; other names and no name are not."""
    module = build(room, compat="seed", max_entries=1)
    query, key, value = sequences()
    first = module(query, key, value, "image")
    other = torch.randn(B, N, C)
    module(query, other, other, "another")
    assert torch.equal(module(query, other, other, "image"), first)
    close(module(query, other, other, "another").double(), truth(module, query, other, other))
    close(module(query, other, value).double(), truth(module, query, other, value))
    close(module(query, other, value, "image", use_cache=False).double(), truth(module, query, other, value))
    key.mul_(2.0)
    close(module(query, other, other, "image").double(), truth(module, query, key, value))
    module.clear_cache()
    close(module(query, other, other, "image").double(), truth(module, query, other, other))


@ROOMS
def test_the_longest_unused_goes(room):
    module = build(room, max_entries=2)
    images = [torch.randn(B, N, C) for _ in range(3)]
    query = torch.randn(B, Q, C)
    for name in (0, 1, 0, 2):
        module(query, images[name], images[name], name)
    assert list(module.cache) == [0, 2]
    check(module, query, images[0], images[0], 0, kept=True)
    check(module, query, images[1], images[1], 1)
    assert list(module.cache) == [0, 1]
    module.clear_cache()
    assert module.cache == {}


@ROOMS
def test_training_and_gradients_use_no_cache(room):
    module = build(room)
    query, key, value = sequences()
    module.train()
    module(query, key, value, "image")
    module.eval()
    with torch.enable_grad():
        key.requires_grad_()
        for _ in range(2):
            module(query, key, value, "image").sum().backward()
        assert key.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in module.parameters())
    assert module.cache == {}
    module.requires_grad_(False)
    with torch.enable_grad():
        check(module, query, key.detach(), value)
    assert list(module.cache) == ["image"]


@ROOMS
def test_changed_attentions_and_transforms_are_called_without_cache(room):
    query, key, value = sequences()
    module, fired = build(room), []
    module.attn.register_forward_hook(lambda *_: fired.append(1))
    close(module(query, key, value, "image").double(), truth(module, query, key, value))
    assert fired and module.cache == {}
    module = build(room)
    mapped = torch.func.vmap(lambda q, k: module(q, k, k, "image"))(query[:, None], key[:, None])
    close(mapped[:, 0].double(), truth(module, query, key, key))
    assert module.cache == {}
    module.to("meta")
    assert module(*(x.to("meta") for x in (query, key, value)), "image").shape == query.shape and module.cache == {}


def test_compiles_in_one_graph():
    module = build(fast)
    query, key, value = sequences()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(query, key, value, "image").double(), truth(module, query, key, value))


@ROOMS
def test_copies_do_not_carry_the_cache(room):
    module = build(room)
    query, key, value = sequences()
    out = module(query, key, value, "image")
    assert list(module.state_dict()) == [f"attn.{n}" for n in nn.MultiheadAttention(C, H).state_dict()]
    for twin in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and twin.cache == {} and list(module.cache) == ["image"]
        assert torch.equal(twin(query, key, value, "image"), out)
    other = build(room)
    other.load_state_dict(module.state_dict(), strict=True)


def test_accelerate_keeps_the_cache_right():
    module = build(plain)
    query, key, value = sequences()
    check(module, query, key, value)
    assert [e.path for e in hivilt.accelerate(module).replaced] == ["attn"]
    check(module, query, key, value, kept=True)
    assert type(fast.CachedCrossAttention(C, H).attn) is fast.MultiheadAttention


@ROOMS
def test_bad_arguments(room):
    module = build(room)
    query, key, value = sequences()
    for args, kind, text in (
        ((query[0], key, value), ValueError, "query: expected 3 dimensions"),
        ((query, [1], value), TypeError, "key"),
        ((query, key[..., 1:], value), ValueError, r"key: expected shape \(2, N, 16\)"),
        ((query, key[:1], value), ValueError, "key: expected shape"),
        ((query, key, value[:, 1:]), ValueError, "value: expected 9 tokens"),
        ((query, key, value, [1]), TypeError, "cache_key: expected something hashable; got"),
        ((query, key, value, 1, True, key[..., 0]), TypeError, "key_mask"),
        ((query, key, value, 1, True, torch.ones(B, Q, dtype=torch.bool)), ValueError, "key_mask"),
    ):
        with pytest.raises(kind, match=f"CachedCrossAttention: {text}"):
            module(*args)
    for args, kind, text in (
        ((0, 1), ValueError, "hidden_dim"),
        ((16, 3), ValueError, "num_heads"),
        ((16, 4, 0), ValueError, "max_entries"),
    ):
        with pytest.raises(kind, match=text):
            room.CachedCrossAttention(*args)
