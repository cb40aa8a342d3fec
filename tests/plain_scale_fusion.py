"""What tests of scale_fusion compare with, written without hivilt's own code: interpolation matrices in numpy from
ATen's rule, the operation and its gradients in float64 with error budgets, and plain PyTorch as a user writes it today.

Budgets are first-order: beside every value stands the sum of the absolute values of what it was added up from, and
errors of u times that are carried on through norm, activation and backward with the derivatives' largest values.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import hivilt.testing as t

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "none": lambda x: x,
}
STEEPEST, BENT = 1.13, 0.8  # largest first derivative of an activation (gelu at 1.4), second one (gelu at 0)
TORCH_MODES = {"linear": ("linear", "bilinear", "trilinear"), "nearest": ("nearest",) * 3, "area": ("area",) * 3}

# Sizes that went wrong somewhere, as (grid, out_grid).
GRIDS = [
    ((7,), (14,)), ((3,), (14,)), ((16,), (14,)), ((5,), (3,)), ((10,), (17,)), ((10,), (6,)), ((1,), (9,)),
    ((9,), (1,)), ((1,), (1,)), ((4,), (22,)), ((5,), (51,)), ((2,), (9,)), ((40,), (40,)), ((64,), (1,)),
    ((7, 7), (14, 14)), ((3, 3), (14, 14)), ((16, 16), (14, 14)), ((5, 5), (3, 3)), ((10, 10), (17, 6)),
    ((9, 16), (18, 32)), ((1, 6), (5, 6)), ((6, 1), (6, 5)), ((4, 3), (22, 3)), ((1, 1), (7, 4)), ((8, 5), (1, 1)),
    ((2, 3, 4), (4, 6, 8)), ((3, 2, 5), (3, 5, 2)), ((1, 4, 1), (3, 1, 2)), ((2, 2, 2), (9, 1, 2)),
]  # fmt: skip


# Interpolation.


def axis_matrix(size: int, out_size: int, mode: str, align_corners: bool, dtype: torch.dtype) -> np.ndarray:
    """Weights [out_size, size] of F.interpolate along one axis: positions in float32, each operation rounded, and in
    float64 for float64 tensors."""
    matrix = np.zeros((out_size, size))
    number = np.float64 if dtype == torch.float64 else np.float32
    outputs = np.arange(out_size)
    if size == out_size:
        return np.eye(size)
    if mode == "area":
        for o in outputs:
            first, last = o * size // out_size, -(-(o + 1) * size // out_size)
            matrix[o, first:last] = number(1) / number(last - first)
        return matrix
    if mode == "nearest":
        ratio = number(size) / number(out_size)
        chosen = np.minimum(np.floor(outputs.astype(number) * ratio).astype(int), size - 1)
        matrix[outputs, chosen] = 1.0
        return matrix
    if align_corners:
        ratio = number(size - 1) / number(out_size - 1) if out_size > 1 else number(0)
        position = outputs.astype(number) * ratio
    else:
        ratio = number(size) / number(out_size)
        position = np.maximum((outputs.astype(number) + number(0.5)) * ratio - number(0.5), number(0))
    left = np.minimum(position.astype(int), size - 1)
    part = np.clip(position - left.astype(number), number(0), number(1))
    np.add.at(matrix, (outputs, left), (number(1) - part).astype(np.float64))
    np.add.at(matrix, (outputs, np.minimum(left + 1, size - 1)), part.astype(np.float64))
    return matrix


def upsampling(grid, out_grid, mode="linear", align_corners=False, dtype=torch.float32) -> Tensor:
    """U [prod(out_grid), prod(grid)] in float64."""
    whole = np.ones((1, 1))
    for size, out_size in zip(grid, out_grid, strict=True):
        whole = np.kron(whole, axis_matrix(size, out_size, mode, align_corners, dtype))
    return torch.from_numpy(whole)


def with_prefix(matrix: Tensor, prefix: int, own: int) -> Tensor:
    """The same beside ``prefix`` outputs before the grid, that copy a scale's ``own`` (as many, or 0) prefix tokens."""
    rows, columns = matrix.shape
    wide = matrix.new_zeros(prefix + rows, own + columns)
    wide[:own, :own] = torch.eye(own)
    wide[prefix:, own:] = matrix
    return wide


def resize(x: Tensor, grid, out_grid, mode="linear", align_corners=False) -> Tensor:
    """F.interpolate on tokens as models do it today: [B, prod(grid), C] -> [B, prod(out_grid), C]."""
    if not x.shape[0]:  # F.interpolate refuses an empty batch
        return x.new_empty(0, math.prod(out_grid), x.shape[2])
    name = TORCH_MODES[mode][len(grid) - 1]
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    corners = align_corners if mode == "linear" else None
    return F.interpolate(image, size=tuple(out_grid), mode=name, align_corners=corners).flatten(2).transpose(1, 2)


def interpolated(x: Tensor, grid, out_grid, mode="linear", align_corners=False, prefix=0) -> t.Truth:
    """U x and its budget: every axis rounds its weights, its products and its sums."""
    U = with_prefix(upsampling(grid, out_grid, mode, align_corners, x.dtype), prefix, prefix)
    return t.Truth(torch.empty(0), {"out": U @ x.double()}, {"out": len(grid) * (U @ x.double().abs())})


# The whole operation. ``x`` holds the keyword arguments of hivilt.ops.scale_fusion.


def scales(x: dict):
    """Per scale: tokens, grid, columns of the weight, number of its own prefix tokens."""
    widths = [f.shape[2] for f in x["features"]]
    for f, grid, w in zip(x["features"], x["grids"], x["weight"].split(widths, 1), strict=True):
        yield f, grid, w, f.shape[1] - math.prod(grid)


def setting(x: dict, name: str):
    defaults = {
        "norm": "layer", "activation": "gelu", "eps": 1e-5, "mode": "linear", "align_corners": False,
        "prefix_tokens": 0, "out_grid": x["grids"][0], "bias": None, "norm_weight": None, "norm_bias": None,
    }  # fmt: skip
    found = x.get(name)
    return defaults[name] if found is None else found


def leaves(x: dict) -> dict[str, Tensor]:
    """Every argument that may get a gradient, by name."""
    named = {f"features[{s}]": f for s, f in enumerate(x["features"])}
    named |= {name: x[name] for name in ("weight", "bias", "norm_weight", "norm_bias") if x.get(name) is not None}
    return named


def replaced(x: dict, by_name: dict[str, Tensor]) -> dict:
    """The same call on other tensors."""
    features = [by_name.get(f"features[{s}]", f) for s, f in enumerate(x["features"])]
    return x | {n: v for n, v in by_name.items() if not n.startswith("features")} | {"features": features}


def truth(x: dict, grad_out: Tensor | None = None, keep: Tensor | None = None) -> t.Truth:
    """Everything a call owes in float64. ``keep``: what dropout multiplies by, [B, P + N, O]."""
    dtype, mode, corners = x["features"][0].dtype, setting(x, "mode"), setting(x, "align_corners")
    out_grid, prefix = setting(x, "out_grid"), setting(x, "prefix_tokens")
    rounds = len(out_grid) + 1  # of a product: its weight along each axis, the projection
    keep = torch.ones(()) if keep is None else keep.double()
    y = size = torch.zeros((), dtype=torch.float64)
    aligned = []
    for f, grid, w, own in scales(x):
        U = with_prefix(upsampling(grid, out_grid, mode, corners, dtype), prefix, own)
        aligned.append((U, U @ f.double(), U @ f.double().abs(), w.double()))
        y, size = y + aligned[-1][1] @ w.double().mT, size + aligned[-1][2] @ w.double().abs().mT
    e = rounds * size
    if x.get("bias") is not None:
        y, e = y + x["bias"].double(), e + x["bias"].double().abs()

    def mean(v: Tensor) -> Tensor:
        return v.mean(-1, keepdim=True)

    a, b = (None if setting(x, name) is None else setting(x, name).double() for name in ("norm_weight", "norm_bias"))
    norm = setting(x, "norm")
    h, e_h, inv = y, e, torch.ones(())
    if norm == "layer":
        inv = (mean((y - mean(y)) ** 2) + setting(x, "eps")).rsqrt()
        h = (y - mean(y)) * inv
        e_h = inv * (e + mean(e) + h.abs() * mean(h.abs() * e)) + h.abs()
    z, e_z = h if a is None else h * a, e_h if a is None else e_h * a.abs()
    if norm != "none":
        z, e_z = z if b is None else z + b, e_z + z.abs() + (0.0 if b is None else b.abs())
    activation = setting(x, "activation")
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        out = ACTIVATIONS[activation](at)
        slope = torch.autograd.grad(out.sum(), at)[0]
    e_out = STEEPEST * e_z + (0.0 if activation in ("none", "relu") else z.abs())
    found = t.Truth(torch.empty(0), {"out": out.detach() * keep}, {"out": e_out * keep})
    if grad_out is None:
        return found

    g = grad_out.double() * keep
    dz = g * slope
    e_dz = g.abs() * (STEEPEST + (0.0 if activation in ("none", "relu") else BENT * e_z))
    dh, e_dh = (dz, e_dz) if a is None else (dz * a, e_dz * a.abs() + (dz * a).abs())
    dy, e_dy = dh, e_dh
    if norm == "layer":
        size_dh, size_h = dh.abs(), h.abs()
        dy = inv * (dh - mean(dh) - h * mean(dh * h))
        e_dy = inv * (
            e_dh + mean(e_dh) + size_h * mean(e_dh * size_h + size_dh * e_h) + e_h * mean(size_dh * size_h)
            + size_dh + mean(size_dh) + size_h * mean(size_dh * size_h)
        ) + dy.abs() * (1 + inv * mean(size_h * e))  # fmt: skip
    values, spread = found.values, found.spread
    for s, (U, _, _, w) in enumerate(aligned):
        name = f"features[{s}]"
        values[name], spread[name] = U.mT @ (dy @ w), U.mT @ ((e_dy + rounds * dy.abs()) @ w.abs())
    parts = [(dy.mT @ f, e_dy.mT @ size + rounds * dy.abs().mT @ size) for _, f, size, _ in aligned]
    values["weight"], spread["weight"] = (torch.cat([p[i].sum(0) for p in parts], 1) for i in (0, 1))
    pairs = {"bias": (dy, e_dy), "norm_bias": (dz, e_dz)}
    pairs["norm_weight"] = dz * h, e_dz * h.abs() + dz.abs() * e_h
    for name, (value, error) in pairs.items():
        if x.get(name) is not None:
            values[name], spread[name] = value.sum((0, 1)), error.sum((0, 1))
    return found


def eager(x: dict, grad_out: Tensor | None = None) -> dict[str, Tensor]:
    """Resize, concatenate, project, normalise, activate: plain PyTorch in the inputs' own precision."""
    dtype, norm = x["features"][0].dtype, setting(x, "norm")
    named = {n: v.detach().to(dtype).contiguous().requires_grad_(grad_out is not None) for n, v in leaves(x).items()}
    y = replaced(x, named)
    prefix, aligned = setting(x, "prefix_tokens"), []
    for f, grid, _, own in scales(y):
        fine = resize(f[:, own:], grid, setting(x, "out_grid"), setting(x, "mode"), setting(x, "align_corners"))
        aligned.append(torch.cat([F.pad(f[:, :own], (0, 0, 0, prefix - own)), fine], 1))
    z = F.linear(torch.cat(aligned, 2), y["weight"], y.get("bias"))
    if norm == "layer":
        z = F.layer_norm(z, z.shape[-1:], y.get("norm_weight"), y.get("norm_bias"), setting(x, "eps"))
    elif norm == "affine":
        z = z * y["norm_weight"] + y["norm_bias"]
    out = ACTIVATIONS[setting(x, "activation")](z)
    got = {"out": out.detach()}
    if grad_out is not None:
        got |= dict(zip(named, torch.autograd.grad(out, list(named.values()), grad_out), strict=True))
    return got


def dropout_keep(seed: int, p: float, shape: tuple[int, int, int]) -> Tensor:
    """What dropout multiplies by for ``seed``: Philox counter (c >> 3, n, 0, b), 16 bits a channel, low ones first."""
    B, N, C = shape
    drop = round(p * 65536)
    b, n, c = np.meshgrid(np.arange(B), np.arange(N), np.arange((C + 7) // 8), indexing="ij")
    seed &= 0xFFFFFFFFFFFFFFFF
    counter = np.stack([c, n, np.zeros_like(n), b], -1).astype(np.uint32)
    words = t.philox(counter, (seed & 0xFFFFFFFF, seed >> 32))  # [B, N, C / 8, 4]
    halves = np.stack([words & 0xFFFF, words >> 16], -1).reshape(B, N, 8 * ((C + 7) // 8))[..., :C]
    kept = torch.from_numpy(halves.astype(np.int64) >= drop)
    return kept * (65536 / max(1, 65536 - drop))


# Calls.


def numbers(seed: int, *shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(grids, widths, out_width, dtype=torch.float32, batch=2, seed=0, bias=True, prefixed=None, wide_norm=False,
         **settings) -> dict:  # fmt: skip
    """Random arguments. ``prefixed``: which scales have prefix tokens; wide_norm: the norm's parameters in float32."""
    prefix = settings.get("prefix_tokens", 0)
    prefixed = [True] * len(grids) if prefixed is None else prefixed
    features = [
        numbers(seed * 100 + s, batch, prefix * has + math.prod(grid), width, dtype=dtype)
        for s, (grid, width, has) in enumerate(zip(grids, widths, prefixed, strict=True))
    ]
    fan = sum(widths)
    x = {"features": features, "weight": numbers(seed + 7, out_width, fan).div(math.sqrt(fan)).to(dtype)}
    if bias:
        x["bias"] = numbers(seed + 8, out_width, dtype=dtype)
    if settings.get("norm", "layer") != "none":
        kind = torch.float32 if wide_norm and dtype != torch.float64 else dtype
        x["norm_weight"] = numbers(seed + 9, out_width, dtype=kind)
        x["norm_bias"] = numbers(seed + 10, out_width, dtype=kind)
    return x | {"grids": [tuple(g) for g in grids]} | settings


@dataclass(frozen=True)
class Case:
    """A random call, told apart by its seed."""

    seed: int
    dtype: torch.dtype

    def inputs(self) -> dict:
        r = random.Random(self.seed)
        rank, S = r.choice((1, 2, 2, 2, 3)), r.choice((1, 2, 3, 3, 4))
        most = {1: 60, 2: 12, 3: 5}[rank]

        def grid():
            return tuple(r.choice((1, r.randint(1, most), r.randint(1, most), r.randint(1, most))) for _ in range(rank))

        out_grid = grid()
        grids = [out_grid if r.random() < 0.3 else grid() for _ in range(S)]
        widths = [r.choice((1, 3, 8, 24, 40, 96, 100, r.randint(1, 70))) for _ in range(S)]
        out_width = r.choice((1, 2, 7, 16, 24, 33, 64, 96, 100, 130, r.randint(1, 200)))
        mode, prefix = r.choice(("linear", "linear", "linear", "nearest", "area")), r.choice((0, 0, 0, 1, 5))
        norm = r.choice(("layer", "layer", "layer", "affine", "none"))
        if out_width == 1 and norm == "layer":  # its norm is constant: nothing but rounding would be left to compare
            norm = "none"
        x = call(
            grids, widths, out_width, self.dtype, r.choice((1, 1, 2, 3)), self.seed, r.random() < 0.7,
            [r.random() < 0.8 for _ in range(S)], r.random() < 0.3, out_grid=out_grid, norm=norm,
            activation=r.choice(tuple(ACTIVATIONS)), mode=mode, prefix_tokens=prefix,
            align_corners=mode == "linear" and r.random() < 0.4, impl=r.choice(("auto", "prologue", "epilogue")),
        )  # fmt: skip
        if norm == "layer" and r.random() < 0.3:
            del x["norm_weight"]
        if norm == "layer" and r.random() < 0.3:
            del x["norm_bias"]
        return x


def judge(op, x: dict, backend: str, device="cpu", backward=True, tally=None, what="", keep=None, upstream=0) -> dict:
    """Calls ``op`` (scale_fusion), holds output and gradients to their budgets and returns them on the CPU."""
    moved = {n: v.detach().to(device) for n, v in leaves(x).items()}
    moved = {n: t.relayout(v, "contiguous") if v.is_contiguous() else v for n, v in moved.items()}
    before = {n: v.clone() for n, v in moved.items()}
    named = {n: v.requires_grad_(backward) for n, v in moved.items()}
    out = op(**replaced(x, named), backend=backend)
    got = {"out": out.detach().cpu()}
    g = None
    if backward:
        g = numbers(upstream + 11, *out.shape).to(out.dtype)
        if setting(x, "activation") == "relu":  # where rounding may cross the step, the gradient is anybody's guess
            linear = truth({**x, "activation": "none"}, keep=None)
            g = torch.where(linear.values["out"].abs() < 4 * linear.budget("out", out.dtype), 0.0, g).to(out.dtype)
        grads = torch.autograd.grad(out, list(named.values()), g.to(device))
        got |= {n: v.cpu() for n, v in zip(named, grads, strict=True)}
    for n, v in before.items():
        assert torch.equal(named[n].detach(), v), f"{what}: {n} was written"
        assert n not in got or got[n].dtype == v.dtype, f"{what}: gradient of {n} is {got[n].dtype}"
    assert out.dtype == x["features"][0].dtype and out.is_contiguous()
    true = truth(x, g, keep)
    for name, value in got.items():
        dtype = value.dtype if name == "out" else out.dtype
        t.assert_within(value, true.values[name], true.budget(name, dtype), f"{what}: {name}")
    if tally is not None and out.numel():
        alike = {"features": "features", **{n: n for n in ("out", "weight", "bias", "norm_weight", "norm_bias")}}
        rival = eager(x, g)
        for name in got:
            common = alike[name.split("[")[0]]
            one = t.Truth(true.kept, {common: true.values[name]}, {common: true.spread[name]})
            tally.add(one, {common: got[name]}, {common: rival[name]})
    return got


def representative(name: str, device: str = "cpu") -> list[tuple]:
    """Arguments of an operator, without its backend, that between the calls set every optional one."""
    draw = lambda *shape: numbers(sum(shape), *shape).to(device)  # noqa: E731
    seed = torch.tensor(5, device=device)
    if name == "interpolate_tokens":
        how = (4, 3), (2, 5), 2, "linear", False
        return [
            (draw(2, 12, 5), None, None, 1.0, [4, 3], [2, 5], 2, "linear", False, False),
            (draw(2, 12, 5), draw(2, 13, 5), draw(1)[0], 0.5, [5, 7], [3, 10], 1, "area", False, False),
            (draw(2, 10, 5), None, draw(1)[0], 2.0, list(how[0]), list(how[1]), *how[2:4], True, True),
        ]
    if name == "interpolate_tokens_dot":
        return [(draw(2, 10, 5), draw(2, 12, 5), 0.5, [4, 3], [2, 5], 2, "linear", True)]
    features, weight, vector = [draw(2, 6, 3), draw(2, 12, 4)], draw(9, 7), draw(9)
    plainest = ([2, 3, 4, 3], [2, 3], "none", 1e-5, "none", 0.0, "area", False, 0, "auto")
    fullest = ([1, 3, 3, 3], [2, 3], "layer", 1e-5, "gelu", 0.5, "linear", True, 3, "prologue")
    if name == "scale_fusion":
        return [
            (features, weight, None, None, None, None, *plainest, False),
            (features, weight, vector, vector, vector, seed, *fullest, True),
        ]
    if name == "scale_fusion_backward":
        empty = torch.empty(0, device=device)
        return [
            (draw(2, 6, 9), features, weight, None, None, empty, None, *plainest, True, False),
            (draw(2, 9, 9), features, weight, vector, vector, draw(2, 9, 9), seed, *fullest, True, True),
            (draw(2, 9, 9), features, weight, None, vector, draw(2, 9, 9), seed, *fullest, False, True),
        ]
    return []
