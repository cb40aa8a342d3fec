"""The ways to run a whole model that are raced against each other, and what each must compute.

eager    the model of hivilt.reference.models: plain PyTorch, attention by scaled_dot_product_attention; where topk is
         asked for, as it is usually written (UsualTopk), because the specification there is exact but slow
compile  torch.compile of eager              hivilt   the model of the same name in hivilt.models, on its kernels

A training step is forward, loss, backward and AdamW.  Dropout and drop path are 0, so that results can be compared.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import fusion_rivals
import torch
from device import REHEARSED
from roofline import Cost
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hivilt.models
from hivilt.reference import models as plain
from hivilt.reference.modules import MultiheadAttention
from hivilt.testing import UNIT

MAY_REFUSE = {"compile"}  # see rivals.MAY_REFUSE
RIVALS = ("eager", "compile", "hivilt")
DIRECTIONS = ("inference", "training step")
RIVAL_FACTOR, OUR_FACTOR = 16, 2.0  # times eager's error that a rival, and hivilt, is granted
CLASSES = 100
hivilt_backend = fusion_rivals.hivilt_backend


class UsualTopk(MultiheadAttention):
    """Scores, topk, a mask, softmax: all pairs are written."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        if self.topk is None:
            return super()._attend(q, k, v, **call)
        scores = q @ k.mT * self.head_dim**-0.5
        if call["key_mask"] is not None:
            scores = scores.masked_fill(~call["key_mask"][:, None, None], -1e30)
        best = scores.topk(min(self.topk, k.shape[2]), -1).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        out = scores.masked_fill(~kept, -1e30).softmax(-1) @ v
        return out if call["query_mask"] is None else out * call["query_mask"][:, None, :, None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model on one batch, fully determined. Subclasses name the model and draw its inputs."""

    B: int
    direction: str = "inference"
    device: str = "cpu"

    operation = ""

    def __str__(self) -> str:
        return f"B{self.B}-{self.sizes()}-fp32-{self.device}"

    @property
    def training(self) -> bool:
        return self.direction != "inference"

    def seeded(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    # Of the subclasses.

    def sizes(self) -> str:
        raise NotImplementedError

    def build(self, room) -> nn.Module:
        raise NotImplementedError

    def inputs(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def logits(self, found: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def dense(self) -> Case:
        """The same without selection."""
        return self

    def smallest(self) -> Case:
        """A tiny call of the same kind."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class HiViT(Case):
    """Three scales, 12 or 8 heads, the bank read and written."""

    image: int
    patch: int
    C: int
    heads: int
    layers: int = 2

    operation = "HiViT"

    def sizes(self) -> str:
        return f"image{self.image}-patch{self.patch}-C{self.C}-H{self.heads}-L{self.layers}"

    def build(self, room):
        return room.HiViT(
            image_size=self.image, patch_size=self.patch, hidden_dim=self.C, num_heads=self.heads,
            num_layers=self.layers, num_classes=CLASSES, bank_size=2000, use_bank="residual", dropout=0.0,
            drop_path_rate=0.0,
        )  # fmt: skip

    def inputs(self):
        return {"images": torch.randn(self.B, 3, self.image, self.image, generator=self.seeded())}

    def logits(self, found):
        return found["logits"]

    def smallest(self):
        return replace(self, B=1, image=4 * self.patch, C=8 * self.heads, layers=1)


@dataclass(frozen=True, kw_only=True)
class HiViLT(Case):
    """Small encoders of ``layers`` blocks, words padded to mixed lengths; topk: of the local fusion, None is dense."""

    image: int
    patch: int
    words: int
    C: int
    heads: int
    layers: int = 2
    topk: int | None = None

    operation = "HiViLT"

    def sizes(self) -> str:
        kept = "dense" if self.topk is None else f"top{self.topk}"
        patches = (self.image // self.patch) ** 2
        return f"N{patches}-T{self.words}-C{self.C}-H{self.heads}-L{self.layers}-{kept}"

    def build(self, room):
        blocks = {"num_layers": self.layers}
        return room.HierarchicalViLTransformer(
            hidden_dim=self.C, num_heads=self.heads, num_classes=CLASSES, dropout=0.0, topk=self.topk,
            vision_config={"image_size": self.image, "patch_size": self.patch, **blocks},
            text_config={"vocab_size": 1000, "max_length": self.words, **blocks},
        )  # fmt: skip

    def inputs(self):
        g = self.seeded()
        lengths = torch.randint(self.words // 2, self.words + 1, (self.B, 1), generator=g)
        return {
            "images": torch.randn(self.B, 3, self.image, self.image, generator=g),
            "text": torch.randint(1000, (self.B, self.words), generator=g),
            "attention_mask": torch.arange(self.words) < lengths,
        }

    def logits(self, found):
        return torch.cat([found["output"], found["itm_logits"], found["vision_embed"], found["text_embed"]], 1)

    def dense(self):
        return replace(self, topk=None)

    def smallest(self):
        return replace(self, B=1, image=4 * self.patch, words=8, C=8 * self.heads, layers=1, topk=self.topk and 2)


def make(name: str, case: Case) -> nn.Module:
    """The model of a rival; all rivals have the same parameters, which no bias leaves at 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.build(hivilt.models if name == "hivilt" else plain)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        if name != "hivilt":
            for module in model.modules():
                if type(module) is MultiheadAttention:
                    module.__class__ = UsualTopk
    return model.to(case.device).train(case.training)


def draw(case: Case) -> dict[str, Tensor]:
    """The inputs, and ``weight`` [B, numbers], the gradient that the results get in training."""
    x = {name: t.to(case.device) for name, t in case.inputs().items()}
    with torch.device("meta"):
        model = case.dense().build(plain).eval()
        width = case.logits(call(model, {n: t.to("meta") for n, t in x.items()})).shape[1]
    x["weight"] = torch.randn(case.B, width, generator=case.seeded()).to(case.device) / case.B
    return x


def call(model: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # patches that do not fill an image: 14, 7 and 3 are meant
        return model(**{name: t for name, t in x.items() if name != "weight"})


def runner(name: str, case: Case, x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed: () -> (logits,), in training (logits, a gradient for each parameter)."""
    model = make(name, case)
    run = functools.partial(call, model)
    if name == "compile":
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=False, backend="eager" if REHEARSED else "inductor")
        run = functools.partial(call, compiled)
    if not case.training:

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (case.logits(run(x)),)

        return infer
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-4)

    def step() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        logits = case.logits(run(x))
        (logits * x["weight"]).sum().backward()
        optimizer.step()
        return (logits.detach(), *(p.grad for p in parameters))

    return step


@functools.cache
def flops_of_forward(case: Case) -> int:
    """Counted by torch on the plain dense model, products alone."""
    model, x = case.dense().build(plain).eval().to("meta"), {n: t.to("meta") for n, t in case.inputs().items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(model, x)
    return counter.get_total_flops()


def case_cost(name: str, case: Case) -> Cost:
    """Each product once, in training three times; bytes: the parameters read once, in training those, their gradients
    and both moments read and written."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in case.build(plain).parameters())
    numbers = sum(t.numel() for t in case.inputs().values())
    return Cost(flops_of_forward(case) * (3 if case.training else 1),
                4 * (parameters * (8 if case.training else 1) + numbers))  # fmt: skip


class Gate:
    """Holds the results of a first call to the same model in float64, by the error of eager.

    Logits by their largest error; gradients by the root mean square of all errors, each in parts of the largest number
    of its parameter, because of a parameter alone eager may be lucky.
    """

    def __init__(self, case: Case, x: dict[str, Tensor]):
        self.case = case
        model = make("eager", case).double()
        wide = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
        with torch.set_grad_enabled(case.training):
            logits = case.logits(call(model, wide))
            if case.training:
                (logits * wide["weight"]).sum().backward()
        self.logits = logits.detach()
        self.grads = [p.grad for p in model.parameters()] if case.training else []
        self.allowed = self.errors(runner("eager", case, copy.copy(x))())

    def errors(self, results: tuple[Tensor, ...]) -> dict[str, float]:
        found = {"out": float((results[0].double() - self.logits).abs().max())}
        if self.case.training:
            parts = [
                torch.ones(1) if g is None else ((g.double() - t) / t.abs().max()).flatten()
                for g, t in zip(results[1:], self.grads, strict=True)
                if t is not None and float(t.abs().max()) > 1e-7
            ]
            found["grads"] = float(torch.cat(parts).square().mean().sqrt())
        return found

    def check(self, name: str, results: tuple[Tensor, ...]) -> dict[str, float]:
        found, factor = self.errors(results), OUR_FACTOR if name == "hivilt" else RIVAL_FACTOR
        for what, error in found.items():
            largest = float(self.logits.abs().max()) if what == "out" else 1.0
            granted = factor * self.allowed[what] + 4 * UNIT[torch.float32] * largest
            assert error <= granted, f"{self.case}: {name}: {what}: error {error:.3g}, allowed {granted:.3g}"
        return found
