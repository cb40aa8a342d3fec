"""NaN and infinity, repetition, neighbours: what they change, and that nothing else changes a bit."""

import hashlib
import math

import plain_scale_fusion as plain
import pytest
import torch

import hivilt

pytestmark = pytest.mark.operation("scale_fusion")
op = hivilt.ops.scale_fusion
MODES = [("linear", False), ("linear", True), ("nearest", False), ("area", False)]
REPEATS = {"reference": 10}  # others: 100


def run(x: dict, backend: str, device: str, g: torch.Tensor | None = None, seed: int = 0, **more) -> dict:
    """Output and all gradients."""
    named = {n: v.detach().to(device).requires_grad_() for n, v in plain.leaves(x).items()}
    torch.manual_seed(seed)
    out = op(**plain.replaced(x, named), **more, backend=backend)
    g = torch.ones_like(out) if g is None else g.to(device)
    grads = torch.autograd.grad(out, list(named.values()), g)
    return {"out": out.detach()} | dict(zip(named, grads, strict=True))


def rows_of(x: dict, s: int, token: int) -> torch.Tensor:
    """Bool [P + N]: outputs in which a token of scale s has weight."""
    f, grid, _, own = list(plain.scales(x))[s]
    U = plain.upsampling(grid, plain.setting(x, "out_grid"), plain.setting(x, "mode"),
                         plain.setting(x, "align_corners"), f.dtype)  # fmt: skip
    return plain.with_prefix(U, plain.setting(x, "prefix_tokens"), own)[:, token] > 0


def tokens_of(x: dict, s: int, rows: torch.Tensor) -> torch.Tensor:
    """Bool: tokens of scale s with weight in any of the rows."""
    f, grid, _, own = list(plain.scales(x))[s]
    U = plain.upsampling(grid, plain.setting(x, "out_grid"), plain.setting(x, "mode"),
                         plain.setting(x, "align_corners"), f.dtype)  # fmt: skip
    return (plain.with_prefix(U, plain.setting(x, "prefix_tokens"), own)[rows] > 0).any(0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
@pytest.mark.parametrize("mode, align_corners", MODES)
def test_bad_token_ruins_only_rows_in_which_it_has_weight(where, mode, align_corners, impl, bad):
    backend, device = where
    settings = {"mode": mode, "align_corners": align_corners, "impl": impl, "prefix_tokens": 1, "out_grid": (6, 5)}
    for dtype in (torch.float32, torch.bfloat16):
        x = plain.call([(6, 5), (3, 4), (8, 9)], [9, 12, 7], 20, dtype, **settings)
        clean = run(x, backend, device)
        for s, token in ((0, 0), (0, 8), (1, 1), (1, 6), (2, 1), (2, 40)):
            y = plain.replaced(x, {f"features[{s}]": x["features"][s].clone()})
            y["features"][s][1, token, 3] = bad
            got = run(y, backend, device)
            rows = rows_of(x, s, token)
            if not (mode == "nearest" or s == 2):  # a finer scale or nearest may leave a token out
                assert rows.any()
            assert got["out"][1, rows].isnan().any(1).all()
            assert torch.equal(got["out"][1, ~rows], clean["out"][1, ~rows]) and torch.equal(
                got["out"][0], clean["out"][0]
            )
            for other in range(3):  # gradients: tokens that share no output with the bad one keep theirs
                name, spared = f"features[{other}]", ~tokens_of(x, other, rows)
                assert torch.equal(got[name][1, spared], clean[name][1, spared]), name
                assert torch.equal(got[name][0], clean[name][0]), name


@pytest.mark.parametrize("mode, align_corners", MODES)
def test_bad_gradient_reaches_only_tokens_with_weight(where, mode, align_corners):
    backend, device = where
    x = plain.call([(6, 5), (3, 4), (8, 9)], [9, 12, 7], 20, mode=mode, align_corners=align_corners)
    g = plain.numbers(5, 2, 30, 20)
    clean = run(x, backend, device, g)
    for token in (0, 7, 29):
        bad = g.clone()
        bad[0, token, 2] = math.nan
        got = run(x, backend, device, bad)
        row = torch.arange(30) == token
        for s in range(3):
            name, touched = f"features[{s}]", tokens_of(x, s, row)
            assert got[name][0, touched].isnan().all() and torch.equal(got[name][0, ~touched], clean[name][0, ~touched])
            assert torch.equal(got[name][1], clean[name][1])
        assert got["weight"].isnan().all() and got["norm_bias"][2].isnan()
        assert torch.equal(got["norm_bias"][3:], clean["norm_bias"][3:])


def test_bad_weight_row_ruins_its_channel_alone(where):
    """Without a norm, output channels do not know of each other."""
    backend, device = where
    x = plain.call([(6, 5), (3, 4)], [9, 12], 20, norm="none")
    clean = run(x, backend, device)
    x["weight"] = x["weight"].clone()
    x["weight"][4, 11] = math.nan
    got = run(x, backend, device)
    rest = torch.arange(20) != 4
    assert got["out"][..., 4].isnan().all() and torch.equal(got["out"][..., rest], clean["out"][..., rest])
    assert torch.equal(got["bias"][rest], clean["bias"][rest])
    assert torch.equal(got["weight"][rest], clean["weight"][rest])


def digest(got: dict) -> str:
    raw = b"".join(v.cpu().contiguous().view(torch.uint8).numpy().tobytes() for v in got.values() if v.numel())
    return hashlib.sha256(raw).hexdigest()


CALLS = {
    "images": ([(12, 12), (6, 6), (3, 3)], [24, 16, 8], 40, 3, {}),
    "one image": ([(40, 40), (20, 20)], [12, 8], 24, 1, {}),
    "sequence": ([(700,), (175,)], [20, 12], 33, 2, {"mode": "area"}),
    "coarse output": ([(3, 3), (24, 24)], [16, 24], 24, 2, {"prefix_tokens": 2, "norm": "affine"}),
}


@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(where, dtype, name, impl):
    """Run to run and for any number of threads, dropout included: output, features and every parameter."""
    backend, device = where
    grids, widths, out_width, batch, more = CALLS[name]
    x = plain.call(grids, widths, out_width, dtype, batch, impl=impl, **more)
    dropout = {"dropout_p": 0.3, "training": True}
    first = digest(run(x, backend, device, **dropout))
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        for _ in range(REPEATS.get(backend, 100) // 5):
            assert digest(run(x, backend, device, **dropout)) == first, f"{threads} threads"


@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_neighbours(where, dtype, impl):
    """A sample's output and the gradients of its features depend neither on how many others there are nor on its
    place among them; parameters sum over the batch."""
    backend, device = where
    for grids, size in (([(7, 7), (4, 4), (2, 2)], 17), ([(14, 14), (28, 28)], 5)):
        x = plain.call(grids, [24, 16, 8][: len(grids)], 40, dtype, size, impl=impl)
        g = plain.numbers(4, size, math.prod(grids[0]), 40, dtype=dtype)
        whole = run(x, backend, device, g)
        for pick in (slice(0, 1), slice(3, 4), slice(1, 3), slice(size - 4, size)):
            part = plain.replaced(x, {f"features[{s}]": f[pick] for s, f in enumerate(x["features"])})
            got = run(part, backend, device, g[pick])
            for name in ("out", *(f"features[{s}]" for s in range(len(grids)))):
                assert torch.equal(got[name], whole[name][pick]), (name, pick)
