"""The ways to fuse scales, to add an interpolated sequence and to pool tokens that are raced against each other.

eager          plain PyTorch as the models are written: transpose, reshape to an image, F.interpolate, cat, Linear, ...
permute        the same on a channels_last view        compile        torch.compile of eager
deterministic  eager under torch.use_deterministic_algorithms                hivilt   hivilt.ops on its fastest backend
gemm           a floor: the matrix products alone, each scale at its own size
copy           a floor: a copy that reads and writes as many bytes as the operation must
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from device import REHEARSED
from roofline import Cost
from torch import Tensor

import hivilt
from hivilt.testing import UNIT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAY_REFUSE = {"compile"}  # see rivals.MAY_REFUSE
FLOORS = ("gemm", "copy")
DIRECTIONS = ("inference", "training forward", "forward+backward")
DROPOUT = 0.1
RIVAL_FACTOR = 16  # times eager's error that a rival is granted; hivilt is granted OUR_FACTOR
OUR_FACTOR = {"fp32": 2.0, "bf16": 1.1}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call, fully determined. Subclasses name the operation and write it in plain PyTorch."""

    B: int
    direction: str = "inference"
    dtype: str = "fp32"
    device: str = "cpu"

    operation = ""
    dropout = False  # in the last two directions
    ends_in_relu = False

    def __str__(self) -> str:
        return f"B{self.B}-{self.sizes()}-{self.dtype}-{self.device}"

    @property
    def backward(self) -> bool:
        return self.direction == "forward+backward"

    @property
    def drops(self) -> bool:
        return self.dropout and self.direction != "inference"

    def numbers(self, *shapes: Sequence[int]) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=g).to(self.device, DTYPES[self.dtype]) for shape in shapes]

    # Of the subclasses.

    def sizes(self) -> str:
        raise NotImplementedError

    def draw(self) -> list[Tensor]:
        """What the operation is a function of, gradients included."""
        raise NotImplementedError

    def plain(self, *leaves: Tensor, drop: Callable[[Tensor], Tensor], resize: Callable[..., Tensor]) -> Tensor:
        raise NotImplementedError

    def ours(self, *leaves: Tensor) -> Tensor:
        raise NotImplementedError

    def products(self, leaves: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(x, weight) of every matrix product that cannot be avoided."""
        return []

    def counts(self) -> tuple[int, int, int]:
        """Flops that one forward cannot avoid, each scale projected where it has fewer tokens; numbers in the leaves;
        numbers in the output."""
        raise NotImplementedError

    def smallest(self) -> Case:
        """A tiny call of the same kind."""
        raise NotImplementedError


def resize(x: Tensor, grid: tuple[int, ...], out_grid: tuple[int, ...]) -> Tensor:
    """As the models do it; with one image the reshape gives a contiguous NCHW copy."""
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    mode = "bilinear" if len(grid) == 2 else "linear"
    return F.interpolate(image, size=out_grid, mode=mode, align_corners=False).flatten(2).transpose(1, 2)


def resize_view(x: Tensor, grid: tuple[int, ...], out_grid: tuple[int, ...]) -> Tensor:
    """On a channels_last view, where nothing is copied."""
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    fine = F.interpolate(image, size=out_grid, mode="bilinear", align_corners=False)
    return fine.permute(0, 2, 3, 1).flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class Fusion(Case):
    """CrossScaleFusion: grids and channels halve from scale to scale."""

    side: int
    channels: int
    scales: int = 3

    operation = "scale_fusion"
    dropout = True

    def sizes(self) -> str:
        return f"{self.side}x{self.side}-C{self.channels}-S{self.scales}"

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [(max(1, self.side >> s),) * 2 for s in range(self.scales)]

    @property
    def widths(self) -> list[int]:
        return [self.channels >> s for s in range(self.scales)]

    def draw(self) -> list[Tensor]:
        shapes = [(self.B, g[0] * g[1], c) for g, c in zip(self.grids, self.widths, strict=True)]
        C, fan = self.channels, sum(self.widths)
        *features, weight, bias, norm_weight, norm_bias = self.numbers(*shapes, (C, fan), (C,), (C,), (C,))
        return [*features, weight / math.sqrt(fan), bias, norm_weight, norm_bias]

    def plain(self, *leaves, drop, resize):
        *features, weight, bias, norm_weight, norm_bias = leaves
        fine = [features[0], *(resize(f, g, self.grids[0]) for f, g in zip(features[1:], self.grids[1:], strict=True))]
        y = F.linear(torch.cat(fine, -1), weight, bias)
        return drop(F.gelu(F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias)))

    def ours(self, *leaves):
        *features, weight, bias, norm_weight, norm_bias = leaves
        return hivilt.ops.scale_fusion(
            features, weight, bias, grids=self.grids, norm_weight=norm_weight, norm_bias=norm_bias,
            dropout_p=DROPOUT if self.drops else 0.0, training=self.drops, backend=hivilt_backend(self.device),
        )  # fmt: skip

    def products(self, leaves):
        features, weight = leaves[: self.scales], leaves[self.scales]
        columns = [w.contiguous() for w in weight.detach().split(self.widths, 1)]
        return list(zip(features, columns, strict=True))

    def counts(self):
        B, C, fan = self.B, self.channels, sum(self.widths)
        tokens = B * sum(g[0] * g[1] * c for g, c in zip(self.grids, self.widths, strict=True))
        return 2 * C * tokens, tokens + C * fan + 3 * C, B * self.side**2 * C

    def smallest(self):
        return replace(self, B=1, side=8, channels=8)


@dataclass(frozen=True, kw_only=True)
class Add(Case):
    """x + scale U y on sequences: the step of ProgressiveFusion."""

    n: int
    N: int
    C: int

    operation = "interpolate_add"

    def sizes(self) -> str:
        return f"n{self.n}-N{self.N}-C{self.C}"

    def draw(self) -> list[Tensor]:
        return [*self.numbers((self.B, self.N, self.C), (self.B, self.n, self.C)), torch.full((), 0.7).to(self.device)]

    def plain(self, x, y, scale, *, drop, resize):
        return x + scale.to(x.dtype) * resize(y, (self.n,), (self.N,))

    def ours(self, x, y, scale):
        return hivilt.ops.interpolate_add(x, y, scale, backend=hivilt_backend(self.device))

    def counts(self):
        return 0, self.B * (self.N + self.n) * self.C + 1, self.B * self.N * self.C

    def smallest(self):
        return replace(self, B=1, n=4, N=8, C=8)


@dataclass(frozen=True, kw_only=True)
class Pool(Case):
    """AdaptiveGlobalPooling: mean, maximum and attention with a hidden layer of C / 4."""

    N: int
    C: int

    operation = "token_pool"

    def sizes(self) -> str:
        return f"N{self.N}-C{self.C}"

    def draw(self) -> list[Tensor]:
        N, C, K = self.N, self.C, self.C // 4
        features, W, b, w, c, mix = self.numbers((self.B, N, C), (K, C), (K,), (1, K), (1,), (3,))
        return [features, W / math.sqrt(C), b, w / math.sqrt(K), c, mix]

    def plain(self, features, W, b, w, c, mix, *, drop, resize):
        weights = F.linear(torch.tanh(F.linear(features, W, b)), w, c).softmax(1)
        pools = [features.mean(1), features.max(1)[0], (features * weights).sum(1)]
        return (torch.stack(pools) * mix.softmax(0).view(-1, 1, 1)).sum(0)

    def ours(self, *leaves):
        return hivilt.ops.token_pool(*leaves, backend=hivilt_backend(self.device))

    def products(self, leaves):
        return [(leaves[0], leaves[1].detach())]

    def counts(self):
        B, N, C, K = self.B, self.N, self.C, self.C // 4
        return 2 * B * N * C * K, B * N * C + K * C + 2 * K + 4, B * C

    def smallest(self):
        return replace(self, B=1, N=8, C=8)


HEADS = {"B0": ((32, 64, 160, 256), 256), "B5": ((64, 128, 320, 512), 768)}  # widths of the scales, of the head


@dataclass(frozen=True, kw_only=True)
class Head(Case):
    """SegFormer's decode head on the maps of a square image; backward in training mode, but for its dropout.

    labels: 0 leaves the classifier out, so that the fusion is alone.
    """

    model: str
    image: int = 512
    labels: int = 150

    operation = "segformer"

    @property
    def ends_in_relu(self) -> bool:
        return not self.labels

    def sizes(self) -> str:
        return f"{self.model}-{self.image}x{self.image}" + ("" if self.labels else "-fusion")

    @functools.cached_property
    def module(self) -> torch.nn.Module:
        from transformers import SegformerConfig
        from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

        widths, width = HEADS[self.model]
        config = SegformerConfig(
            hidden_sizes=list(widths), decoder_hidden_size=width, num_labels=self.labels, classifier_dropout_prob=0.0
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = SegformerDecodeHead(config)
            if not self.labels:
                head.classifier = torch.nn.Identity()
            with torch.no_grad():  # of a trained head these are not 0 and 1
                head.batch_norm.running_mean.normal_(std=0.1)
                head.batch_norm.running_var.uniform_(0.5, 2.0)
        return head.to(self.device, DTYPES[self.dtype]).train(self.backward)

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        sides = [self.image // (4 << s) for s in range(4)]
        return [(self.B, c, side, side) for c, side in zip(HEADS[self.model][0], sides, strict=True)]

    def draw(self) -> list[Tensor]:
        return [*self.numbers(*self.shapes), *self.module.parameters()]

    def plain(self, *leaves, drop, resize):
        module = self.module
        if leaves[0].dtype == torch.float64:
            module = copy.deepcopy(module).double()
        parameters = dict(zip([name for name, _ in module.named_parameters()], leaves[4:], strict=True))
        return torch.func.functional_call(module, parameters, (list(leaves[:4]),))

    def ours(self, *leaves):
        with hivilt.use_backend(hivilt_backend(self.device)):
            return self.fused(list(leaves[:4]))

    @functools.cached_property
    def fused(self) -> torch.nn.Module:
        return hivilt.nn.SegformerFusionHead.from_hf(self.module)

    def counts(self):
        width, pixels = HEADS[self.model][1], self.B * (self.image // 4) ** 2
        maps = sum(math.prod(shape) for shape in self.shapes)
        parameters = sum(t.numel() for t in self.module.parameters())
        return 2 * width * (maps + self.labels * pixels), maps + parameters, (self.labels or width) * pixels

    def smallest(self):
        return replace(self, B=1, image=64)


def hivilt_backend(device: str) -> str | None:
    """The backend with kernels for this device; None where only the reference would run."""
    names = ("cuda", "triton") if device == "cuda" or REHEARSED else ("cpu",)
    x = torch.zeros(1, 4, 8, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        verdicts = hivilt.explain("scale_fusion", [x], torch.zeros(8, 8, device=device))
    return next((name for name in names if verdicts[name] is None), None)


# The rivals: each takes the case and gives back a function of its leaves.


def eager(case: Case) -> Callable:
    drop = functools.partial(F.dropout, p=DROPOUT) if case.drops else lambda y: y
    return functools.partial(case.plain, drop=drop, resize=resize)


def permute(case: Case) -> Callable:
    return functools.partial(eager(case), resize=resize_view)


def compiled(case: Case) -> Callable:
    torch._dynamo.reset()
    return torch.compile(eager(case), fullgraph=True, dynamic=False, backend="eager" if REHEARSED else "inductor")


RIVALS = {"eager": eager, "permute": permute, "compile": compiled, "deterministic": eager,
          "hivilt": lambda case: case.ours}  # fmt: skip


@contextlib.contextmanager
def deterministic():
    """Deterministic algorithms, without the filling of fresh memory that comes with them."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def draw(case: Case) -> dict[str, Tensor]:
    """The leaves, and ``grad_out``."""
    x = {f"leaf{i}": t.detach() for i, t in enumerate(case.draw())}
    if case.backward:
        with torch.no_grad():
            out = eager(Undropped.of(case) if case.drops else case)(*x.values())
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
        # Among millions of numbers some are 0 without having been dropped, or are 0 for one and just above for another:
        # nothing flows back through those near 0.
        near = (64 if case.ends_in_relu else 8 if case.drops else 0) * UNIT[out.dtype]
        x["grad_out"] = torch.where(out.abs() < near, 0.0, grad)
    return x


def leaves_of(x: dict[str, Tensor]) -> list[Tensor]:
    return [t for name, t in x.items() if name != "grad_out"]


def runner(name: str, case: Case, x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed: () -> (out,), with backward (out, a gradient for each leaf)."""
    if name in FLOORS:
        return (gemm if name == "gemm" else copied)(case, x)
    forward, records = RIVALS[name](case), case.direction != "inference"
    leaves = leaves_of(x)
    if isinstance(case, Head):
        leaves = [*leaves[:4], *case.module.parameters()]  # which the module itself computes with
    leaves = [t.requires_grad_(records) if t.is_leaf else t for t in leaves]
    around = deterministic if name == "deterministic" else contextlib.nullcontext

    def run() -> tuple[Tensor, ...]:
        with around(), torch.set_grad_enabled(records):
            out = forward(*leaves)
            return (out, *torch.autograd.grad(out, leaves, x["grad_out"])) if case.backward else (out,)

    return run


def gemm(case: Case, x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The matrix products alone; backward makes two of each."""
    pairs = [[t.detach().requires_grad_(case.backward) for t in pair] for pair in case.products(leaves_of(x))]
    grads = [torch.randn_like(F.linear(*pair).detach()) for pair in pairs] if case.backward else []

    def run() -> tuple[Tensor, ...]:
        out = [F.linear(*pair) for pair in pairs]
        return (*out, *torch.autograd.grad(out, [t for pair in pairs for t in pair], grads)) if grads else tuple(out)

    return run


def copied(case: Case, x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A copy that reads and writes, together, as many bytes as the operation must."""
    source = torch.ones(case_cost("copy", case).bytes // 2, dtype=torch.uint8, device=case.device)
    target = torch.zeros_like(source)
    return lambda: (target.copy_(source),)


def case_cost(name: str, case: Case) -> Cost:
    """Leaves read once, results written once.  Backward does each product twice more, reads the leaves and the gradient
    of the output again and writes a gradient for each leaf."""
    flops, leaves, out = case.counts()
    times, numbers = (3, 3 * leaves + 2 * out) if case.backward else (1, leaves + out)
    return Cost(0 if name == "copy" else flops * times, DTYPES[case.dtype].itemsize * numbers)


class Gate:
    """Holds results to float64, by the error of eager in the case's own precision.

    A rival whose dropout cannot be known is judged through the zeros of its own output; how many they are is judged
    too.  Errors are largest ones, of the output and of each gradient.
    """

    def __init__(self, case: Case, x: dict[str, Tensor]):
        self.case, self.x = case, x
        plain = replace(case, direction="forward+backward" if case.backward else "inference")
        plain = plain if not case.drops else Undropped.of(plain)
        self.true = self.truth(None)
        results = runner("eager", plain, x)()
        self.allowed = {n: self.error(n, got, self.true[n]) for n, got in self.named(results).items()}
        if case.drops:  # which makes errors larger: sums of fewer terms cancel less
            results = self.named(runner("eager", case, x)())
            true = self.truth(self.kept(results["out"]) / (1 - DROPOUT))
            self.allowed |= {n: max(self.allowed[n], self.error(n, got, true[n])) for n, got in results.items()}

    def named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"out" if i == 0 else f"grad{i - 1}": t.detach() for i, t in enumerate(results)}

    def truth(self, keep: Tensor | None) -> dict[str, Tensor]:
        leaves = [t.detach().double().requires_grad_(self.case.backward) for t in leaves_of(self.x)]
        drop = (lambda y: y) if keep is None else (lambda y: y * keep)
        with torch.set_grad_enabled(self.case.backward):
            out = self.case.plain(*leaves, drop=drop, resize=resize)
            grads = torch.autograd.grad(out, leaves, self.x["grad_out"].double()) if self.case.backward else ()
        return self.named((out, *grads))

    def kept(self, out: Tensor) -> Tensor:
        """What dropout left of an output, 1.0 or 0.0, by its zeros; ``draw`` looks after those that are 0 of itself."""
        return (out.detach() != 0).double()

    @staticmethod
    def error(name: str, got: Tensor, true: Tensor) -> float:
        assert got.shape == true.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(true.shape)}"
        error = float((got.double() - true).abs().max()) if got.numel() else 0.0
        return error if error == error else math.inf

    def check(self, name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        """Raises AssertionError, or returns the largest errors."""
        case = self.case
        if name in FLOORS:
            assert all(t.isfinite().all() for t in results), f"{name}: not finite"
            return {}
        true, u = self.true, UNIT[DTYPES[case.dtype]]
        if case.drops:
            kept = self.kept(results[0])
            p = round(DROPOUT * 65536) / 65536 if name == "hivilt" else DROPOUT
            # Ours draws independently; of torch's generator it is enough that it drops about as much.
            rate, slack = 1 - float(kept.mean()), 5 * math.sqrt(p * (1 - p) / kept.numel())
            slack = slack if name == "hivilt" else max(slack, 0.1 * p)
            assert abs(rate - p) < slack, f"{case}: {name}: dropped {rate:.4f}, expected {p:.4f} +- {slack:.4f}"
            true = self.truth(kept / (1 - p))
        errors = {}
        for what, got in self.named(results).items():
            errors[what] = self.error(what, got, true[what])
            factor = OUR_FACTOR[case.dtype] if name == "hivilt" else RIVAL_FACTOR
            # Dropout scales errors with the values, and a few units are there for gradients that eager has exactly.
            allowed = factor * self.allowed[what] / (1 - DROPOUT) + 4 * u * float(true[what].abs().max())
            assert errors[what] <= allowed, (
                f"{case}: {name}: {what}: largest error {errors[what]:.3g}, allowed {allowed:.3g}"
            )
        return errors


class Undropped(Fusion):
    """A fusion that drops nothing, to learn eager's error from."""

    dropout = False

    @classmethod
    def of(cls, case: Fusion) -> Undropped:
        return cls(**{name: getattr(case, name) for name in case.__dataclass_fields__})
