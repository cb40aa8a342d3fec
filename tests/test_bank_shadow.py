"""The int8 copy of a bank: what its bytes promise, that retrieval with it is retrieval without it, bit for bit, and
that a FeatureBank never reads one that is out of date."""

import copy
import pickle
import threading

import plain_bank as plain
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

import hivilt
from hivilt.nn import FeatureBank
from hivilt.ops import bank_retrieval, bank_shadow

INF, NAN = plain.INF, plain.NAN
HARD = plain.hard_banks(64)
USED = torch.ops.hivilt.isa() == "avx512_bf16" if hivilt._library.loaded else False
needs_bytes = pytest.mark.skipif(not USED, reason="the instruction set in use has no dot product of bytes")


@pytest.fixture(autouse=True)
def built(verdicts):
    if verdicts["cpu", "cpu"] is not None:
        pytest.skip(verdicts["cpu", "cpu"])


def same(a, b) -> bool:
    return all(p.numpy().tobytes() == q.numpy().tobytes() for p, q in zip(a, b, strict=True))


def read(shadow: torch.Tensor, width: int):
    """codes, step, norm, residue in float64, and offset."""
    padded = (width + 15) // 16 * 16
    facts = shadow[:, padded:].contiguous()
    step, norm, residue = facts.view(torch.float32)[:, :3].double().unbind(1)
    assert not shadow[:, width:padded].any()
    return shadow[:, :width].double(), step, norm, residue, facts.view(torch.int32)[:, 3].long()


@pytest.mark.parametrize("width", [1, 5, 16, 31, 192, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_bytes_promise(width, dtype):
    keys = plain.numbers(width, 300, width) * torch.logspace(-8, 8, 300)[:, None].clamp(1e-8, 1e4)
    keys[0], keys[1, :] = 0.0, -3.0
    keys = keys.to(dtype)
    codes, step, norm, residue, offset = read(bank_shadow(keys), width)
    true = keys.double()
    length, error = true.norm(dim=1), (true - step[:, None] * codes).norm(dim=1)
    assert (codes.abs() <= 127).all() and (codes.abs().amax(1)[step > 0] == 127).all()
    assert torch.equal(offset, -128 * codes.sum(1).long())
    slack = 4 * width * 2**-24 * length + 1e-17
    assert (length <= norm).all() and (norm <= length + slack).all()
    assert (error <= residue).all() and (residue <= error + slack).all()
    assert (error <= step / 2 * width**0.5 + slack).all()
    tiny = plain.numbers(0, 3, width) * 1e-25
    codes, step, norm, residue, _ = read(bank_shadow(tiny), width)
    assert not codes.any() and not step.any() and (tiny.double().norm(dim=1) <= residue).all()


def test_rows_without_a_number_are_marked():
    keys = plain.numbers(0, 9, 20)
    keys[1, 3], keys[2, 0], keys[3, 19], keys[4] = NAN, INF, -INF, 3e38
    norm = read(bank_shadow(keys), 20)[2]
    assert (norm < 1e15).tolist() == [True, False, False, False, False, True, True, True, True]


def test_some_rows_are_written():
    old, new = plain.numbers(0, 50, 33), plain.numbers(1, 50, 33)
    shadow, slots = bank_shadow(old), torch.tensor([7, 49, 0, 7])
    mixed = old.clone()
    mixed[slots] = new[slots]
    assert bank_shadow(mixed, shadow=shadow, slots=slots) is shadow
    assert torch.equal(shadow, bank_shadow(mixed))
    assert bank_shadow(new, shadow=shadow) is shadow and torch.equal(shadow, bank_shadow(new))
    assert torch.equal(bank_shadow(new.mT.contiguous().mT), shadow)
    assert bank_shadow(new[:0]).shape == (0, 64)


@pytest.mark.parametrize("name", HARD)
def test_hard_banks(name):
    q, k, topk = HARD[name]
    shadow = bank_shadow(k)
    want = bank_retrieval(q, k, topk, scale=1e-3, precision="fp32", backend="cpu")
    for some in (slice(0, 1), slice(1, 9), slice(9, 25), slice(0, 64)):
        got = bank_retrieval(q[some], k, topk, scale=1e-3, shadow=shadow, backend="cpu")
        assert same(got, [x[some] for x in want]), some
    plain.judge(want, q, k, topk, scale=1e-3, one_sign=True)


def midpoints(width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A query of signs, which bytes hold exactly, and rows whose every element lies half a step off, so that errors are
    all of one sign: as far off as the bound allows.  Which sign is drawn; the scores differ by less than that."""
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=g) * 2.0 - 1.0
    codes = torch.randint(-9, 10, (4000, width), generator=g).float()
    codes[:, 0] = 127.0
    off = (torch.randint(0, 2, (4000, 1), generator=g) - 0.5) * 0.998
    keys = codes + off * signs
    keys[:, 0] = 127.0
    return signs[None], keys


@pytest.mark.parametrize("width", [48, 192])
def test_errors_of_a_whole_margin(width):
    q, k = midpoints(width, width)
    codes, step, _, residue, _ = read(bank_shadow(k), width)
    error = ((step[:, None] * codes - k.double()) @ q[0].double()).abs()
    assert (error > 0.98 * residue * width**0.5).all()  # half a margin would lose rows
    got = bank_retrieval(q, k, 40, shadow=bank_shadow(k), backend="cpu")
    assert same(got, bank_retrieval(q, k, 40, precision="fp32", backend="cpu"))
    plain.judge(got, q, k, 40, one_sign=True)
    approximate = (step[:, None] * codes) @ q[0].double()
    assert set(approximate.topk(40).indices.tolist()) != set(got[2][0].tolist())


@pytest.mark.parametrize("exponent", [0, -62])
def test_a_row_better_by_less_than_two_margins(exponent):
    """The bytes of one row say too little, those of all others too much.  At 2^-62 what rounding takes from an element
    is as large as it may be without a square that a float can hold, where subnormals become zeros."""
    width = 192
    q, k = midpoints(width, 0)
    away, codes = 0.499 * q[0], k[0].round()
    away[0] = 0.0
    rows = (codes - away).expand(300, width).clone()
    rows[77] = codes + away
    rows[77, 1:186] -= q[0, 1:186]
    rows *= 2.0**exponent
    want = bank_retrieval(q, rows, 1, precision="fp32", backend="cpu")
    assert want[2].item() == 77
    torch.set_flush_denormal(True)
    shadow = bank_shadow(rows)
    torch.set_flush_denormal(False)
    _, _, _, residue, _ = read(shadow, width)
    assert (rows[:1].double() - codes.double() * 2.0**exponent).norm() <= residue[0]
    assert same(bank_retrieval(q, rows, 1, shadow=shadow, backend="cpu"), want)


def test_masks_counts_values_and_gradients():
    q, k, v = plain.numbers(0, 13, 40), plain.numbers(1, 3000, 40), plain.numbers(2, 3000, 7)
    shadow = bank_shadow(k)
    mask = plain.numbers(3, 13, 3000) > 0.5
    for more in ({"mask": mask}, {"mask": mask[0]}, {"count": 2000}, {"exclude": torch.arange(13)},
                 {"values": v, "scale": torch.tensor(0.3), "mask": mask, "count": torch.tensor(2999)}):  # fmt: skip
        runs = []
        for extra in ({"shadow": shadow}, {"precision": "fp32"}):
            leaf = q.clone().requires_grad_()
            found = bank_retrieval(leaf, k, 11, **more, **extra, backend="cpu")
            runs.append((*[x.detach() for x in found], *torch.autograd.grad(found[0].sum() + found[1].sum(), leaf)))
        assert same(*runs), more


def test_wild_rows_and_queries():
    for bad in (NAN, INF, -INF, 3e38, 1e16):
        q, k = plain.numbers(0, 12, 24), plain.numbers(1, 2200, 24)
        rows = [0, 95, 96, 1099, 1100, 2199]
        k[rows] = bad * torch.sign(k[rows])
        q[5, 3] = bad
        for mask in (None, plain.numbers(2, 12, 2200) > 0):
            got = bank_retrieval(q, k, 12, mask=mask, shadow=bank_shadow(k), backend="cpu")
            want = bank_retrieval(q, k, 12, mask=mask, precision="fp32", backend="cpu")
            assert torch.equal(got[2], want[2])
            assert all(a.nan_to_num(7).equal(b.nan_to_num(7)) for a, b in zip(got[:2], want[:2], strict=True))


def test_same_bits_for_any_threads_and_any_splits():
    q, k = plain.numbers(0, 3, 64), plain.numbers(1, 9001, 64)
    shadow, runs = bank_shadow(k), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(bank_retrieval(q, k, 50, shadow=shadow, backend="cpu"))
    torch.set_num_threads(2)
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@needs_bytes
def test_it_is_the_shadow_that_is_read():
    """Of a copy of other rows the wrong ones are found; nothing else shows that the copy is looked at."""
    q, k = plain.numbers(0, 2, 32), plain.numbers(1, 4000, 32)
    wrong = bank_retrieval(q, k, 5, shadow=bank_shadow(-k), backend="cpu")
    right = bank_retrieval(q, k, 5, backend="cpu")
    assert not torch.equal(wrong[2], right[2])
    for extra in ({"precision": "fp32"}, {"precision": "bf16"}, {"backend": "reference"}):
        more = {"backend": "cpu"} | extra
        assert torch.equal(bank_retrieval(q, k, 5, shadow=bank_shadow(-k), **more)[2], right[2]), extra
    many = plain.numbers(2, 65, 32)
    assert same(bank_retrieval(many, k, 5, shadow=bank_shadow(-k)), bank_retrieval(many, k, 5))


@pytest.mark.parametrize(
    "what", [1.0, [1], torch.zeros(9, 32), torch.zeros(9, 32, dtype=torch.uint8),
             torch.zeros(8, 32, dtype=torch.int8), torch.zeros(9, 16, dtype=torch.int8),
             torch.zeros(9, 64, dtype=torch.int8)[:, ::2], torch.zeros(9, 32, dtype=torch.int8, device="meta")]
)  # fmt: skip
def test_malformed_shadows(what):
    q, k = plain.numbers(0, 2, 13), plain.numbers(1, 9, 13)
    with pytest.raises((TypeError, ValueError), match="shadow: expected"):
        bank_retrieval(q, k, 2, shadow=what)
    with pytest.raises((TypeError, ValueError), match="shadow: expected"):
        bank_shadow(k, shadow=what)


@pytest.mark.parametrize(
    "slots", [0, [0], torch.tensor([9]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([0]).int(),
              torch.tensor(0), torch.tensor([[0]])]
)  # fmt: skip
def test_malformed_slots(slots):
    k = plain.numbers(1, 9, 13)
    shadow = bank_shadow(k)
    before = shadow.clone()
    with pytest.raises((TypeError, ValueError), match="bank_shadow: slots: expected"):
        bank_shadow(-k, shadow=shadow, slots=slots)
    with pytest.raises(ValueError, match="there is no shadow yet"):
        bank_shadow(k, slots=torch.tensor([0]))
    assert torch.equal(shadow, before)


def test_other_banks_are_refused():
    for keys in (None, torch.zeros(3), torch.zeros(3, 4, dtype=torch.int8)):
        with pytest.raises((TypeError, ValueError), match="bank_shadow: keys: expected"):
            bank_shadow(keys)
    with pytest.raises(hivilt.BackendError, match="float64"):
        bank_shadow(torch.zeros(3, 4).double())
    with pytest.raises(hivilt.BackendError, match="meta"):
        bank_shadow(torch.zeros(3, 4, device="meta"))


# The module.

M, C = 2000, 24


def bank(mode: str = "fifo", **more) -> FeatureBank:
    return FeatureBank(M, C, update_mode=mode, topk=6, shadow="int8", **more)


def up_to_date(module: FeatureBank) -> bool:
    """There is a copy that the module would use, and it is that of the rows it holds."""
    kept = module.__dict__.get("_copy")
    if kept is None or not kept.knows(module.bank):
        return False
    assert torch.equal(kept._bytes, bank_shadow(module.bank))
    return True


def agrees(module: FeatureBank, q: torch.Tensor) -> bool:
    other = FeatureBank(M, C, update_mode=module.update_mode, topk=6, dtype=module.bank.dtype)
    other.load_state_dict(module.state_dict())
    return torch.equal(module(q, return_scores=True)[2], other(q, return_scores=True)[2])


@needs_bytes
@pytest.mark.parametrize("mode", ["fifo", "ema"])
def test_updates_are_followed(mode):
    module, q = bank(mode), plain.numbers(0, 3, C)
    module.update(plain.numbers(1, M - 30, C))
    assert not up_to_date(module)
    module(q)
    assert not up_to_date(module)  # made when it is read a second time
    module(q)
    assert up_to_date(module)
    holes = plain.numbers(2, 90, C)
    holes[[0, 44, 89], 5] = NAN
    features = [plain.numbers(3, 100, C), holes, plain.numbers(4, 3 * M + 7, C), plain.numbers(5, 0, C)]
    for rows in features:
        module.update(rows)
        assert up_to_date(module) and agrees(module, q)
    with torch.inference_mode():
        module.update(plain.numbers(6, 10, C))
        assert agrees(module, q)
    assert up_to_date(module)
    if mode == "ema":
        module.update(plain.numbers(7, 4, C), slots=torch.tensor([5, 5, M - 1, 0]))
        assert up_to_date(module) and agrees(module, q)


WRITES = {
    "a row": lambda m: m.bank[7].mul_(30),
    "all rows": lambda m: m.bank.copy_(m.bank.flip(0)),
    "another tensor": lambda m: setattr(m, "bank", m.bank.flip(0)),
    "a state_dict": lambda m: m.load_state_dict(m.state_dict() | {"bank": m.bank.flip(0)}),
    "reset": lambda m: (m.reset(), m.update(plain.numbers(8, 50, C))),
    "half": lambda m: m.half(),
    "compiled": lambda m: torch.compile(m.update, backend="aot_eager")(plain.numbers(8, 50, C)),
}


@needs_bytes
@pytest.mark.parametrize("write", WRITES)
def test_other_writes_make_it_anew(write):
    module, q = bank(), plain.numbers(0, 3, C)
    module.update(plain.numbers(1, M, C))
    module(q), module(q)
    assert up_to_date(module)
    WRITES[write](module)
    q = q.to(module.bank.dtype)
    assert not up_to_date(module) and agrees(module, q)
    module(q)
    assert up_to_date(module) and agrees(module, q)


@needs_bytes
def test_tensors_in_the_same_place_are_told_apart():
    """A bank that replaces another may lie where that one lay, with the same version."""
    module, q = bank(), plain.numbers(0, 3, C)
    for seed in range(20):
        module.bank = plain.numbers(seed, M, C)
        module.filled.fill_(M)
        module(q)
        assert agrees(module, q)


@needs_bytes
def test_a_bank_lent_for_a_call():
    """The module's own bank lives on, and the other one may be what a transform wraps, without memory."""
    module, other, q = bank(), bank(), plain.numbers(0, 3, C)
    for seed, m in enumerate((module, other)):
        m.update(plain.numbers(seed + 1, M, C))
        m(q), m(q)
    lent = {"bank": other.bank}
    for _ in range(3):
        assert torch.equal(functional_call(module, lent, (q,)), other(q)) and agrees(module, q)
    stacked = torch.stack([module.bank, other.bank])
    both = vmap(lambda rows: functional_call(module, {"bank": rows}, (q,)))(stacked)
    assert torch.equal(both, torch.stack([module(q), other(q)]))
    assert torch.equal(vmap(module)(q[None])[0], module(q))
    of_bank = grad(lambda rows: functional_call(module, {"bank": rows}, (q,)).sum())(other.bank)
    leaf = other.bank.clone().requires_grad_()
    assert torch.equal(of_bank, torch.autograd.grad(functional_call(module, {"bank": leaf}, (q,)).sum(), leaf)[0])


@needs_bytes
def test_tensors_that_are_swapped_by_loading():
    module, q = bank(), plain.numbers(0, 3, C)
    module.update(plain.numbers(1, M, C))
    module(q), module(q)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict(module.state_dict() | {"bank": module.bank.flip(0)})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert not up_to_date(module) and agrees(module, q) and agrees(module, q)
    module(q)
    assert up_to_date(module)


@needs_bytes
def test_fake_tensors_have_no_copy():
    with FakeTensorMode():
        module, q = bank(), torch.zeros(3, C)
        assert module(q).shape == module(q).shape == (3, C)
        module.update(q)
        assert module(q).shape == (3, C) and not up_to_date(module)


@needs_bytes
def test_copies_and_settings():
    module, q = bank(), plain.numbers(0, 3, C)
    module.update(plain.numbers(1, M, C))
    module(q), module(q)
    assert set(module.state_dict()) == {"bank", "ptr", "filled", "skipped"}
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.update(plain.numbers(2, M, C))
        assert not up_to_date(other) and agrees(other, q) and agrees(other, q)
    assert up_to_date(module)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(q), module(q))
    module(plain.numbers(0, 65, C))  # too many to profit
    module.shadow = None
    module(q)
    assert not up_to_date(module)
    module.double()
    module.shadow = "int8"
    assert module(q.double()).dtype == module(q.double()).dtype == torch.float64
    with hivilt.use_backend("reference"):
        module(q.double()), module(q.double())


def test_the_setting():
    assert "shadow='int8'" in repr(bank()) and "shadow" not in repr(FeatureBank(3, 4))
    for wrong in ("bf16", "", 8, True):
        with pytest.raises((TypeError, ValueError), match="FeatureBank: shadow: expected"):
            FeatureBank(3, 4, shadow=wrong)
    plain_twin = hivilt.reference.modules.FeatureBank(M, C, topk=6, shadow="int8")
    plain_twin.update(plain.numbers(1, M, C))
    q = plain.numbers(0, 3, C)
    want = plain_twin(q, return_scores=True)[2]
    hivilt.accelerate(plain_twin)
    plain_twin(q), plain_twin(q)
    assert up_to_date(plain_twin) == USED and torch.equal(plain_twin(q, return_scores=True)[2], want)


@needs_bytes
def test_readers_beside_a_writer():
    """Rows are numbered: a reader that met a copy behind its bank would find no row with the best number."""
    module = FeatureBank(400, 16, topk=1, shadow="int8")
    direction = plain.numbers(0, 1, 16)
    direction /= direction.norm()
    module.update(direction * torch.arange(400.0)[:, None])
    wrong, done = [], threading.Event()

    def reader():
        while not done.is_set():
            _, scores, slots = module(direction, return_scores=True)
            with module.reading():
                row = module.bank[slots[0, 0]] @ direction[0]
            if float(scores) > float(row) + 1e-3:
                wrong.append((float(scores), float(row)))

    threads = [threading.Thread(target=reader) for _ in range(3)]
    for t in threads:
        t.start()
    for step in range(150):
        module.update(direction * (400.0 + step))
    done.set()
    for t in threads:
        t.join(60)
    assert not wrong and up_to_date(module)
    assert float(module(direction, return_scores=True)[1]) == pytest.approx(549.0)
