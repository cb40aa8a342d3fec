"""Gradients of family B.  Interpolation is linear and its transpose is another interpolation, so it is its own backward
to any order; the fusion saves its inputs and what its norm was applied to.  Derivation: docs/scale_fusion.md."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .._backends import Row
from ._running import no_second_derivative, record, records, run
from ._scale_fusion_rows import BACKWARD, INTERPOLATE, INTERPOLATE_DOT, SCALE_FUSION


def _name(backend: str | Row) -> str:
    """Backward has rows of its own: the one of the same name."""
    return backend.name if isinstance(backend, Row) else backend


class ScaleFusion(Function):
    """(operator arguments after the features, backend, *features) -> out, linear."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        *rest, backend = args[:17]
        return run(SCALE_FUSION, backend, (list(args[17:]), *rest))

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, bias, norm_weight, norm_bias, seed, *settings, save, backend = inputs[:17]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, norm_weight, norm_bias, output[1], seed, *inputs[17:])
        ctx.settings, ctx.backend = settings, _name(backend)

    @staticmethod
    def backward(ctx, grad_out, _):
        needs = ctx.needs_input_grad
        nothing = (None,) * len(needs)
        features_grad, parameters_grad = any(needs[17:]), any(needs[:4])
        if grad_out is None or not (features_grad or parameters_grad):
            return nothing
        weight, norm_weight, norm_bias, linear, seed, *features = ctx.saved_tensors
        args = (grad_out, weight, norm_weight, norm_bias, linear, seed, *ctx.settings, features_grad, parameters_grad,
                ctx.backend, *features)  # fmt: skip
        # A plain backward records nothing; under create_graph a second backward must fail loudly, not silently.
        grads = BackwardOnce.apply(*args) if torch.is_grad_enabled() else BackwardOnce.forward(*args)
        found = [*grads[:4], *(None,) * 13, *grads[4:]]
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))


class BackwardOnce(Function):
    """(operator arguments of the backward, backend, *features) -> gradients of the parameters, then of the features;
    differentiating them raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_out, *args):
        of_features, *of_parameters = run(BACKWARD, args[17], (grad_out, list(args[18:]), *args[:17]))
        return *of_parameters, *of_features

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        no_second_derivative("scale_fusion", "hivilt.reference.scale_fusion")


def interpolate(backend: str | Row, x, base, scale, factor, *rest) -> Tensor:
    """base + factor * scale * U x (transposed: U^T x), recorded where somebody needs a derivative."""
    args = (x, base, scale, factor, *rest)
    return record(Interpolate, (*args, backend)) if records(x, base, scale) else run(INTERPOLATE, backend, args)


class Interpolate(Function):
    """(operator arguments, backend) -> out.  Its gradient is the transposed interpolation, to any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return run(INTERPOLATE, args[-1], args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, scale, *ctx.settings, backend = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, scale)
        ctx.backend = _name(backend)

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        factor, *how, transposed = ctx.settings
        of_x = of_scale = None
        if ctx.needs_input_grad[0]:
            of_x = interpolate(ctx.backend, grad, None, scale, factor, *how, not transposed)
        if ctx.needs_input_grad[2]:
            fine, coarse = (x, grad) if transposed else (grad, x)  # <g, U^T x> = <x, U g>
            of_scale = interpolate_dot(ctx.backend, fine, coarse, factor, *how)
        return of_x, grad if ctx.needs_input_grad[1] else None, of_scale, *(None,) * 8


def interpolate_dot(backend: str | Row, grad, x, factor, *how) -> Tensor:
    """factor * sum(grad * U x)."""
    args = (grad, x, factor, *how)
    return record(InterpolateDot, (*args, backend)) if records(grad, x) else run(INTERPOLATE_DOT, backend, args)


class InterpolateDot(Function):
    """(operator arguments, backend) -> a number; bilinear in its two tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return run(INTERPOLATE_DOT, args[-1], args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, *ctx.settings, backend = inputs
        ctx.save_for_backward(grad, x)
        ctx.backend = _name(backend)

    @staticmethod
    def backward(ctx, of_dot):
        grad, x = ctx.saved_tensors
        factor, *how = ctx.settings
        of_grad = of_x = None
        if ctx.needs_input_grad[0]:
            of_grad = interpolate(ctx.backend, x, None, of_dot, factor, *how, False)
        if ctx.needs_input_grad[1]:
            of_x = interpolate(ctx.backend, grad, None, of_dot, factor, *how, True)
        return of_grad, of_x, *(None,) * 7
