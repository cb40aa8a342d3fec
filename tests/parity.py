"""What tests against Hugging Face models share: results and gradients of an original and of what shares its parameters,
both judged by the original in float64."""

import copy
import math

import pytest
import torch
from multi_scale import as_exact

from hivilt.nn import _heads


@pytest.fixture(autouse=True)
def kernels_at_any_size(monkeypatch):
    """Import it: the accelerated modules then take their kernels for tiny calls too."""
    monkeypatch.setattr(_heads, "PAIRS", 0)


def randomise(module, scale=0.2) -> None:
    """No parameter 0 and no norm weight 1, where a wrong formula could hide; no gate of 0."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))


def results(module, call, inputs, weight=None):
    """(output, gradients): of <output, weight> for each floating input, and for each parameter of ``module``."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    module.zero_grad()
    out = call(*leaves)
    weight = torch.ones_like(out) if weight is None else weight.to(out.dtype)
    (out * weight).sum().backward()
    found = {f"input {i}": x.grad for i, x in enumerate(leaves) if x.is_floating_point()}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return out.detach(), {name: None if g is None else g.clone() for name, g in found.items()}


def check_gradients(found, rivals, of_truth, what="") -> None:
    """Gradients as near to the truth as those of plain PyTorch, in one of its ways: over all of them the root mean
    square of the relative errors is within twice its own. For a single tensor, behind many layers, the ratio of two
    such errors is luck (torch's SDPA against its own written-out attention: up to 2.5 in 25 draws): its relative error
    may be 4 times the larger of plain PyTorch's own for that tensor and for all."""
    assert all(set(found) == set(other) for other in (*rivals, of_truth)), set(found) ^ set(of_truth)
    largest = max(float(g.abs().max()) for g in of_truth.values())
    errors = {}
    for name, truth in of_truth.items():
        ours, *theirs = (float((x[name].double() - truth).norm()) for x in (found, *rivals))
        size = float(truth.norm())
        if size < 1e-9 * largest:  # such as a key's bias, to which a softmax is blind
            assert ours < 1e-5 * largest, f"{what}gradient of {name}: {ours:.3g} instead of 0"
        else:
            errors[name] = ours / size, max(theirs) / size
    ours, plain = (math.sqrt(sum(x * x for x in column) / len(errors)) for column in zip(*errors.values(), strict=True))
    assert ours <= 2.0 * plain, f"{what}gradients: relative error {ours:.3g}, plain PyTorch's {plain:.3g}"
    for name, (one, other) in errors.items():
        allowed = 4.0 * max(other, plain)
        assert one <= allowed, f"{what}gradient of {name}: relative error {one:.3g}, allowed {allowed:.3g}"


def wide(x):
    return x.double() if x.is_floating_point() else x


def choose_attention(model, name) -> None:
    """Of a model of transformers, or a part of one that looks up the name in its config."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = name


def check_parity(original, call_original, classes, call_ours, inputs) -> float:
    """``cls.from_hf(original)`` of each class equals the original: the output and the gradient of every input and every
    parameter, within twice the original's own float32 error. Returns the largest difference of float32 outputs.

    call_original(module, *inputs), call_ours(module, *inputs): an output tensor each.
    """
    original.eval()
    truth = copy.deepcopy(original).double()
    choose_attention(truth, "sdpa")  # what is written out there takes a softmax in float32, whatever comes
    weight = torch.randn(call_original(original, *inputs).shape, dtype=torch.float64)
    exact, of_truth = results(truth, lambda *x: call_original(truth, *x), [wide(x) for x in inputs], weight)
    theirs, rivals = None, []
    for name in ("sdpa", "eager"):
        choose_attention(original, name)
        theirs, gradients = results(original, lambda *x: call_original(original, *x), inputs, weight)
        rivals.append(gradients)
    assert len(of_truth) > len(inputs) and float(exact.abs().max()) > 1e-3
    worst = 0.0
    for cls in classes:
        twin = copy.deepcopy(original)
        ours = cls.from_hf(twin)
        assert not ours.training and not any(p.is_meta for p in [*ours.parameters(), *ours.buffers()])
        shared = {id(p) for p in twin.parameters()}
        assert all(id(p) in shared for p in ours.parameters())
        # Gradients are read from the original's parameters: that ours has them too is what sharing means.
        out, found = results(twin, lambda *x, m=ours: call_ours(m, *x), inputs, weight)
        as_exact(out, theirs, exact, cls.__name__)
        worst = max(worst, float((out - theirs).abs().max()))
        check_gradients(found, rivals, of_truth, f"{cls.__module__}, ")
        double = cls.from_hf(copy.deepcopy(original).double())
        torch.testing.assert_close(call_ours(double, *[wide(x) for x in inputs]), exact, rtol=1e-10, atol=1e-10)
    return worst


def twins(plain_class, class_, *args, **options):
    """A plain module and its accelerated twin with the same random parameters, in eval mode."""
    plain, ours = plain_class(*args, **options), class_(*args, **options)
    randomise(plain)
    assert list(plain.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(plain.state_dict(), strict=True)
    return plain.eval(), ours.eval()


def check_twins(plain, ours, call, inputs) -> None:
    """The same output and gradients, those of the twin within twice the plain one's error; each parameter has one."""
    truth = copy.deepcopy(plain).double()
    exact, of_truth = results(truth, lambda *x: call(truth, *x), [wide(x) for x in inputs])
    weight = torch.randn(exact.shape, dtype=torch.float64)
    exact, of_truth = results(truth, lambda *x: call(truth, *x), [wide(x) for x in inputs], weight)
    theirs, of_plain = results(plain, lambda *x: call(plain, *x), inputs, weight)
    out, found = results(ours, lambda *x: call(ours, *x), inputs, weight)
    as_exact(out, theirs, exact)
    assert {name for name, _ in ours.named_parameters()} <= set(found), "a parameter without a gradient"
    check_gradients(found, [of_plain], of_truth)


def gradients_are_finite(module) -> bool:
    return all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
