"""Every layout of every argument, the upstream gradient included, gives the bits of the contiguous call; nothing is
read outside a tensor."""

import plain_scale_fusion as plain
import pytest
import torch
from guard_pages import survives

import hivilt
import hivilt.testing as t

pytestmark = pytest.mark.operation("scale_fusion")
op = hivilt.ops.scale_fusion
SHAPES = {
    "odd": ([(3, 5), (2, 3)], [7, 9], 11, 2, {"prefix_tokens": 1, "prefixed": [True, False]}),
    "ones": ([(4, 4), (1, 1)], [1, 16], 16, 1, {}),
    "tile": ([(8, 8), (4, 4)], [32, 16], 32, 2, {}),
}


def run(x: dict, backend: str) -> list[torch.Tensor]:
    x = dict(x)
    g = x.pop("g")
    named = {n: v.detach().requires_grad_() for n, v in plain.leaves(x).items()}
    out = op(**plain.replaced(x, named), backend=backend)
    return [out, *torch.autograd.grad(out, list(named.values()), g)]


@pytest.mark.pairwise
@pytest.mark.parametrize("impl", ["prologue", "epilogue"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_sweep(where, shape, dtype, impl):
    backend, device = where
    grids, widths, out_width, batch, more = SHAPES[shape]
    x = plain.call(grids, widths, out_width, dtype, batch, impl=impl, **more)
    x = plain.replaced(x, {n: v.to(device) for n, v in plain.leaves(x).items()})
    rows = x["features"][0].shape[1]
    x["g"] = plain.numbers(1, batch, rows, out_width, dtype=dtype).to(device)
    plain_result = run(x, backend)
    for name, given in {**plain.leaves(x), "g": x["g"]}.items():
        for layout, view in t.layouts(given):
            copy = view.clone(memory_format=torch.contiguous_format)
            want = plain_result if torch.equal(view, given) else run(plain.replaced(x, {name: copy}), backend)
            for a, b in zip(run(plain.replaced(x, {name: view}), backend), want, strict=True):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"{name} as {layout}: strides {view.stride()}"


def test_all_arguments_at_once(where):
    """Every argument in a different strange layout."""
    backend, device = where
    names = list(t.LAYOUTS)
    for seed in range(20):
        x = plain.Case(seed, torch.float32).inputs()
        strange = {
            n: t.relayout(v.to(device), names[(seed * 7 + 5 * i) % len(names)])
            for i, (n, v) in enumerate(plain.leaves(x).items())
        }
        copies = {n: v.clone(memory_format=torch.contiguous_format) for n, v in strange.items()}
        out = op(**plain.replaced(x, copies), backend=backend)
        g = t.relayout(plain.numbers(seed, *out.shape).to(device), names[seed % len(names)])
        for a, b in zip(run(plain.replaced(x, strange) | {"g": g}, backend),
                        run(plain.replaced(x, copies) | {"g": g.contiguous()}, backend), strict=True):  # fmt: skip
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"case {seed}"


def test_one_tensor_as_every_scale(where):
    """Features may share their memory; each gets its own gradient."""
    backend, device = where
    x = plain.call([(6, 6), (6, 6)], [8, 8], 24)
    f = x["features"][0].to(device).requires_grad_()
    weight = x["weight"].to(device)
    apart = [f.detach().clone().requires_grad_() for _ in range(2)]
    one, two = op([f, f], weight, backend=backend), op(apart, weight, backend=backend)
    assert torch.equal(one, two)
    a, b = torch.autograd.grad(two.sum(), apart)
    assert torch.equal(torch.autograd.grad(one.sum(), f)[0], a + b)


def test_broadcast_upstream_gradient(where):
    """sum() hands back a gradient of stride 0 in every dimension."""
    backend, device = where
    x = plain.call([(6, 6), (3, 3)], [8, 8], 24)
    named = {n: v.to(device).requires_grad_() for n, v in plain.leaves(x).items()}
    out = op(**plain.replaced(x, named), backend=backend)
    by_sum = torch.autograd.grad(out.sum(), list(named.values()), retain_graph=True)
    by_ones = torch.autograd.grad(out, list(named.values()), torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(by_sum, by_ones, strict=True))


GUARDED = """
import plain_scale_fusion as plain
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for seed in range(200, 220):
        x = plain.Case(seed, dtype).inputs()
        named = {n: t.guarded(v, at).requires_grad_() for n, v in plain.leaves(x).items()}
        y = plain.replaced(x, named)
        out = ops.scale_fusion(**y, dropout_p=0.2, training=True, backend=backend)
        torch.autograd.grad(out, list(named.values()), t.guarded(torch.randn_like(out), at))
        grid, P = x["grids"][0], y["features"][0].shape[1] - torch.Size(x["grids"][0]).numel()
        how = {"mode": x["mode"], "align_corners": x["align_corners"], "backend": backend}
        fine = ops.interpolate_tokens(y["features"][0], grid, x["out_grid"], prefix_tokens=P, **how)
        grads = torch.autograd.grad(fine, y["features"][0], t.guarded(torch.randn_like(fine), at))
        base = t.guarded(fine[:, P:].detach(), at).requires_grad_()
        token = t.guarded(y["features"][0][:, P:].detach(), at).requires_grad_()
        scale = t.guarded(torch.tensor(0.5), at).requires_grad_()
        sums = ops.interpolate_add(base, token, scale, grid=grid, out_grid=x["out_grid"], **how)
        torch.autograd.grad(sums, [base, token, scale], t.guarded(torch.randn_like(sums), at))
        count += 1
"""


@pytest.mark.kernels
@pytest.mark.parametrize("at", ["end", "start"])
def test_nothing_is_read_outside_a_tensor(where, at):
    """Each input ends at (then starts at) a page that faults when touched; 60 cases, forward and backward."""
    survives(GUARDED, 60, where, at)
