"""Seeded random calls of topk_attention, and ``check``: run one on a backend and judge everything it returns."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .assertions import Tally, assert_topk, assert_within
from .memory import LAYOUTS, relayout
from .oracle import INF, eager, oracle


@dataclass(frozen=True)
class Case:
    """One random call, fully determined by ``seed`` and ``dtype``."""

    seed: int
    dtype: torch.dtype
    shape: tuple[int, int, int, int, int, int, int]  # B, H, G, Q, N, D, E
    topk: int | None
    axis: str = "keys"
    mask: str = ""  # "", "bool" or "float"
    mask_shape: tuple[int, ...] = ()
    mask_dtype: torch.dtype = torch.float32
    key_mask: bool = False
    query_mask: bool = False
    select: int = 0  # channels of the shared selection, 0: per head
    scale: float | None = None
    fill: str = "normal"
    layout: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    changes: tuple[tuple[str, object], ...] = ()  # what the caller changed in the drawn case

    def __str__(self) -> str:
        sizes = "-".join(f"{n}{v}" for n, v in zip("BHGQNDE", self.shape, strict=True))
        return f"{sizes}-top{self.topk}-{self.axis}-seed{self.seed}-{str(self.dtype)[6:]}"

    def repro(self, **settings) -> str:
        """A shell line that runs this case alone."""
        changes = "".join(f", {name}={value!r}" for name, value in self.changes)
        keywords = "".join(f", {name}={value!r}" for name, value in settings.items() if value)
        return (
            'python -c "import torch, hivilt.ops, hivilt.testing as t; t.check(hivilt.ops.topk_attention, '
            f"t.case({self.seed}, '{str(self.dtype)[6:]}'{changes}){keywords})\"  # {self}"
        )

    def inputs(self, device: str | torch.device = "cpu") -> dict:
        """The keyword arguments of the call."""
        g = torch.Generator().manual_seed(self.seed)
        B, H, G, Q, N, D, E = self.shape

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=g)
            if self.fill == "positive":
                x = torch.rand(shape, generator=g)
            elif self.fill == "peaky":
                x = 2.5 * x
            elif self.fill == "ties":
                x = x.mul(1.5).round().div(2)
            elif self.fill == "integers":  # scores are exact in float32 when scale is a power of two
                x = torch.randint(-(self.seed % 8) - 1, self.seed % 8 + 2, shape, generator=g).float()
            elif self.fill == "heavy":
                x = x * torch.randn(shape, generator=g).exp()
            return x.to(self.dtype)

        def bits(p: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=g) < p

        x: dict = {"query": draw(B, H, Q, D), "key": draw(B, G, N, D), "value": draw(B, G, N, E), "topk": self.topk}
        if self.fill == "positive":  # the budget of values is one for sums of mixed signs; see oracle.py
            x["value"] = torch.randn(x["value"].shape, generator=g).to(self.dtype)
        for name, layout in zip(("query", "key", "value"), self.layout, strict=True):
            x[name] = relayout(x[name], layout)
        x |= {"axis": self.axis, "scale": self.scale}
        if self.mask:
            allowed = bits(
                random.Random(self.seed).choice((0.25, 0.7, 0.95)) if self.mask_shape else 0.9, *self.mask_shape
            )
            bias = torch.where(allowed, torch.randn(self.mask_shape, generator=g), -INF).to(self.mask_dtype)
            x["attn_mask"] = allowed if self.mask == "bool" else bias
        if self.key_mask:
            x["key_mask"] = bits(0.8, B, N) & bits(0.93, B, 1)
        if self.query_mask:
            x["query_mask"] = bits(0.85, B, Q) & bits(0.95, B, 1)
        if self.select:
            x["select_query"], x["select_key"] = draw(B, Q, self.select), draw(B, N, self.select)
        return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in x.items()}


def case(seed: int, dtype: torch.dtype | str = torch.float32, **changes) -> Case:
    """The random case number ``seed``: sizes 0..200, D and E 1..160, every kind of mask, axis and layout."""
    r = random.Random(seed)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def tokens() -> int:
        tile_edge = 16 * r.randint(1, 8) + r.randint(-1, 1)
        return r.choice((r.randint(0, 2), r.randint(2, 17), r.randint(2, 64), r.randint(18, 200), tile_edge))

    def width() -> int:
        return r.choice((r.randint(1, 9), r.randint(1, 160), r.choice((16, 31, 32, 33, 64, 64, 80, 96, 128))))

    B, G, repeats = r.choice((1, 1, 2, 3)), r.choice((1, 1, 2, 3)), r.choice((1, 1, 1, 2, 4))
    Q, N, D = tokens(), tokens(), width()
    E = D if r.random() < 0.5 else width()
    if r.random() < 0.02:
        B = 0
    H = G * repeats
    while B * H * Q * N > 60_000:  # keeps one case at a few milliseconds
        B, Q = max(1, B - 1), max(1, Q // 2) if B == 1 else Q
    axis = r.choice(("keys", "keys", "queries"))
    C = N if axis == "keys" else Q
    topk = r.choice((None, 1, r.randint(1, max(1, C // 4)), r.randint(1, max(1, C)), r.randint(1, max(1, C)),
                     max(1, C - 1), max(1, C), C + 1, C + 40))  # fmt: skip
    select = r.choice((0, 0, 0, 0, r.randint(1, 70)))
    mask = r.choice(("", "", "bool", "float"))
    full = [B, 1 if select else H, Q, N]
    mask_shape = [n if r.random() < 0.75 else 1 for n in full]
    mask_shape = mask_shape[r.choice((0, 0, 0, 0, 1, 1, 2, 2, 3, 4)) :] if mask else []
    names = [n for n in LAYOUTS if n not in ("expanded_last", "expanded_all", "overlapping")]
    layout = [r.choice(("contiguous", "permuted", r.choice(names))) for _ in range(3)]
    if layout[2] == "expanded_row":  # equal value rows make sums of one sign, see Case.inputs
        layout[2] = "step2_row"
    made = Case(
        seed, dtype, (B, H, G, Q, N, D, E), topk, axis, mask, tuple(mask_shape),
        r.choice((torch.float32, dtype)), r.random() < 0.3, r.random() < 0.25, select,
        r.choice((None, None, None, 0.25, 1.0, -0.5, 0.0)) if not select else None,
        r.choice(("normal", "normal", "positive", "peaky", "ties", "heavy")),
        tuple(layout),
    )  # fmt: skip
    if dtype == torch.float64:
        made = replace(made, mask_dtype=torch.float64)
    return replace(made, **changes, changes=tuple(changes.items()))


def cases(count: int, dtype: torch.dtype | str = torch.float32, seed: int = 0) -> Iterator[Case]:
    """``count`` random cases, the same ones every time."""
    return (case(seed * 1_000_003 + i, dtype) for i in range(count))


def judge(
    op: Callable,
    inputs: dict,
    *,
    backend: str | None = None,
    backward: bool = False,
    seed: int = 0,
    exact: bool = False,
    tally: Tally | None = None,
    what: str = "",
    repro: str = "",
) -> dict[str, Tensor]:
    """Call ``op`` (topk_attention) and hold indices, values and gradients against the oracle; return all of them."""
    x = {name: t.detach() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    before = {name: t.clone() for name, t in x.items() if isinstance(t, Tensor)}
    names = ("query", "key", "value", "attn_mask")
    leaves = [n for n in names if x.get(n) is not None and x[n].dtype.is_floating_point] * backward
    for name in leaves:
        x[name].requires_grad_()
    query, topk = x["query"], x.get("topk")
    grads = None, None
    try:
        result = op(**x, return_lse=True, return_indices=topk is not None, backend=backend)
        out, lse, indices = result if topk is not None else (*result, None)
        got = {"out": out.detach(), "lse": lse.detach()}
        if backward:
            g = torch.Generator().manual_seed(seed)
            grads = [torch.randn(t.shape, generator=g).to(t.device, t.dtype) for t in (out, lse)]
            got |= dict(zip(leaves, torch.autograd.grad([out, lse], [x[n] for n in leaves], grads), strict=True))
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}\n  repro: {repro}") from error
    x = {name: t.detach() if isinstance(t, Tensor) else t for name, t in x.items()}
    for name, copy in before.items():
        assert torch.equal(x[name].nan_to_num(7), copy.nan_to_num(7)), f"{name} was changed\n  repro: {repro}"
    wanted = {"lse": torch.promote_types(query.dtype, torch.float32)}
    wanted |= {"attn_mask": x["attn_mask"].dtype} if "attn_mask" in got else {}
    for name, t in got.items():
        assert t.dtype == wanted.get(name, query.dtype), f"{name}: dtype {t.dtype}\n  repro: {repro}"
    if indices is not None:
        assert_topk(indices, **{n: t for n, t in x.items() if n != "value"}, exact=exact, repro=repro)
    truth = oracle(**x, indices=indices, grad_out=grads[0], grad_lse=grads[1])
    for name, t in got.items():
        # Only the GPU's kernels may round the probabilities, also where they are interpreted.
        tight = name == "out" and query.device.type == "cpu" and backend != "triton"
        assert_within(t, truth.values[name], truth.budget(name, query.dtype, tight=tight), f"{what}: {name}", repro)
    if tally is not None:
        keywords = {n: x.get(n) for n in ("query", "key", "value", "scale", "attn_mask")}
        tally.add(truth, got, eager(**keywords, kept=truth.kept, grad_out=grads[0], grad_lse=grads[1]))
    return got | ({"indices": indices} if indices is not None else {})


def check(
    op: Callable,
    case: Case,
    *,
    backend: str | None = None,
    backward: bool = False,
    device: str = "cpu",
    exact: bool = False,
    tally: Tally | None = None,
) -> dict[str, Tensor]:
    """``judge`` a random case; the failure message carries a line that runs this case alone."""
    settings = {"backend": backend, "backward": backward, "exact": exact}
    keywords = settings | {"seed": case.seed + 1, "tally": tally, "what": str(case)}
    return judge(op, case.inputs(device), repro=case.repro(**settings), **keywords)
