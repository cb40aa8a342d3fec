"""What tests of the contrastive losses compare with: open_clip's formulas in plain PyTorch, in float64 and in the
inputs' own precision.  None of hivilt's own code.

Errors are counted in units of the roundoff times what a value is added up from, beside those of plain PyTorch.
"""

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import hivilt.testing as t

LEAVES = ("x", "y", "logit_scale", "logit_bias")


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(B, C, R=None, N=None, dtype=torch.float32, seed=0, kind="infonce", symmetric=True, bias=False, scale=10.0,
         near=0.5) -> dict:  # fmt: skip
    """Random arguments of hivilt.losses.contrastive_loss: unit vectors, x_i near y_i.  N: with labels."""
    y = numbers(seed, N or B, C)
    labels = None if N is None else torch.randint(N, (B,), generator=torch.Generator().manual_seed(seed))
    own = y[:B] if labels is None else y[labels]
    x = numbers(seed + 1, *((B, C) if R is None else (B, R, C)))
    x = x + near * (own if R is None else own[:, None])
    x, y = (F.normalize(v, dim=-1).to(dtype) if C else v.to(dtype) for v in (x, y))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = {"x": x, "y": y, "logit_scale": torch.tensor(scale, dtype=wide), "kind": kind, "symmetric": symmetric}
    return found | {"logit_bias": torch.tensor(-scale if bias else 0.0, dtype=wide) if bias else None, "labels": labels}


@dataclass(frozen=True)
class Case:
    """A random call, told apart by its seed."""

    seed: int
    dtype: torch.dtype

    def inputs(self) -> dict:
        r = random.Random(self.seed)
        B = r.choice((1, 2, 3, r.randint(1, 20), r.randint(30, 130), 47, 48, 49, 97))
        C = r.choice((1, 3, r.randint(1, 40), 16, 33, 64, 130, 257))
        kind = r.choice(("infonce", "infonce", "infonce", "siglip"))
        R = r.choice((None, None, 1, 2, 5)) if kind == "infonce" else None
        symmetric = kind == "siglip" or r.random() < 0.6
        N = None if symmetric or r.random() < 0.4 else r.choice((1, 7, 100, 500))
        settings = (kind, symmetric, r.random() < 0.4, r.choice((1.0, 14.3, 100.0)), r.choice((0.0, 0.5, 2.0)))
        for attempt in range(100):
            x = call(B, C, R, N, self.dtype, self.seed + 1000 * attempt, *settings)
            if apart(x):
                return x
        return call(B, C, None, N, self.dtype, self.seed, *settings)  # one number has only two directions


def apart(x: dict) -> bool:
    """Whether float32 can tell which query of an image is the nearest, for every text."""
    if x["x"].dim() == 2 or x["x"].shape[1] == 1:
        return True
    top = (x["x"].double() @ x["y"].double().mT).topk(2, dim=1).values
    return bool((top[:, 0] - top[:, 1]).min() > 1e-6)


def leaves(x: dict) -> dict[str, Tensor]:
    return {n: x[n] for n in LEAVES if isinstance(x[n], Tensor)}


def first_best(dots: Tensor) -> Tensor:
    """max over dimension 1 of [B, R, N]; of equals the first gets the gradient."""
    R = dots.shape[1]
    top = dots.detach().amax(1, keepdim=True)
    order = torch.where((dots == top) | dots.isnan(), torch.arange(R, device=dots.device)[:, None], R)
    return dots.gather(1, order.amin(1, keepdim=True))[:, 0]


def formula(x, y, logit_scale, logit_bias=None, symmetric=True, labels=None, kind="infonce") -> Tensor:
    """ClipLoss and SigLipLoss of open_clip, for any R."""
    logits = logit_scale * x @ y.mT if x.dim() == 2 else logit_scale * first_best(x @ y.mT)
    if logit_bias is not None:
        logits = logits + logit_bias
    own = torch.arange(len(x), device=x.device) if labels is None else labels
    if kind == "siglip":
        sign = 2 * torch.eye(len(x), device=x.device, dtype=logits.dtype) - 1
        return -F.logsigmoid(sign * logits).sum() / len(x)
    loss = F.cross_entropy(logits, own)
    return (loss + F.cross_entropy(logits.mT, own)) / 2 if symmetric else loss


def gradients(loss_of, x: dict, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """The loss and its gradients by name, of leaves in ``dtype``."""
    named = {n: v.detach().to(device, dtype or v.dtype).requires_grad_() for n, v in leaves(x).items()}
    rest = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in x.items() if n not in named}
    loss = loss_of(**rest, **named)
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach().cpu()} | {n: g.cpu() for n, g in zip(named, grads, strict=True)}


def truth(x: dict) -> dict[str, Tensor]:
    return gradients(formula, x, torch.float64)


def eager(x: dict) -> dict[str, Tensor]:
    """In the precision of the inputs, as a training loop has it: scale and bias rounded to it too."""
    return gradients(formula, x, x["x"].dtype)


@dataclass
class Tally:
    """Errors of a sweep, each relative to the largest value of its tensor, beside those of plain PyTorch."""

    dtype: torch.dtype
    ours: dict[str, list[float]] = field(default_factory=dict)
    theirs: dict[str, list[float]] = field(default_factory=dict)

    def add(self, x: dict, got: dict[str, Tensor]) -> None:
        true, rival = truth(x), eager(x)
        for name, value in true.items():
            # What a gradient of the bias of infonce should be is 0, and of the others some tenths of the scale.
            size = max(float(value.abs().max()) if value.numel() else 0.0, 1e-3)
            for mine, of in ((self.ours, got), (self.theirs, rival)):
                error = float((of[name].double() - value).abs().max()) if value.numel() else 0.0
                assert error == error, f"{name}: NaN"
                mine.setdefault(name, []).append(error / size)

    def assert_no_worse(self) -> None:
        """Largest and mean error at most twice those of plain PyTorch in float32, once in half types."""
        factor = 2.0 if self.dtype == torch.float32 else 1.0
        assert set(self.ours) == {"loss", *LEAVES}
        for name, ours in self.ours.items():
            theirs = self.theirs[name]
            for what, of in (("largest", max), ("mean", lambda v: sum(v) / len(v))):
                a, b = of(ours) / t.UNIT[self.dtype], of(theirs) / t.UNIT[self.dtype]
                assert a <= factor * b, f"{name}: {what} error {a:.3f} u, plain PyTorch {b:.3f} u, allowed {factor}x"


def close(x: dict, got: dict[str, Tensor], what: str = "", shares: float = 0.0) -> None:
    """Within what rounding of the logits and of the sums can do: a guard against anything that is simply wrong.

    A logit is off by some u scale sqrt(C); so, relatively, is a probability, and with it every gradient.  shares: the
    roundoff of the gradients of logits where they are rounded too, before they meet x and y.
    """
    true = truth(x)
    u = t.UNIT[torch.float64 if x["x"].dtype == torch.float64 else torch.float32]
    noise = 4 * u * (float(x["logit_scale"]) + 8) * (1 + x["x"].shape[-1] ** 0.5)
    for name, value in true.items():
        last, extra = t.UNIT[got[name].dtype], 0.0
        size = float(value.abs().max()) if value.numel() else 0.0
        if name == "logit_scale":  # a sum of terms of both signs, each at most one
            size = 2.0
        elif name == "logit_bias":
            size = 2.0 + size
        elif name == "loss":
            size += 1.0
        else:  # shares of the pairs cancel where a probability is almost 1
            size += float(x["logit_scale"]) / len(x["x"])
            extra = shares * size
        limit = noise * size + extra + 2 * last * value.abs() + 1e-30
        error = (got[name].double() - value).abs()
        assert (error <= limit).all(), (
            f"{what}: {name}: error {float(error.max()):.3g}, allowed {float(limit.min()):.3g}"
        )


def representative(name: str, device: str = "cpu") -> list[tuple]:
    """Arguments of an operator, without its backend, that between the calls set every optional one."""
    a, b = call(5, 6, R=2), call(4, 6, N=9, symmetric=False, bias=True)
    found = []
    for z, kind, columns in ((a, "infonce", True), (b, "infonce", False), (call(5, 6, bias=True), "siglip", False)):
        z = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in z.items()}
        x = z["x"] if z["x"].dim() == 3 else z["x"][:, None]
        scale = (None, 0.7) if z is a else (z["logit_scale"], 1.0)
        head = (x, z["y"], *scale, z["logit_bias"], 0.0 if z["logit_bias"] is not None else 0.3, z["labels"])
        if name == "contrastive_loss":
            found.append((*head, columns, kind))
        elif name == "contrastive_loss_backward":
            rows, cols, target = torch.ops.hivilt.contrastive_loss(*head, columns, kind, "reference")
            grads = [torch.ones_like(v) if v.numel() else None for v in (rows, cols, target)]
            found += [(*head, kind, rows, cols, *grads, *wanted) for wanted in ((True, True), (True, False))]
    return found
