"""How an operator is called: straight to a backend's row in plain eager mode, as an opaque operator everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import _library
from .._backends import VERSION, Operation, Row, choose, probe

_PLAIN = (Tensor, torch.nn.Parameter)
_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def eager(x: Tensor) -> bool:
    """True where nothing traces or transforms: then a row is called directly, with one operator boundary in all."""
    return (
        not _compiling() and type(x) in _PLAIN and not _functorch_active() and not _dispatch_modes() and not x.is_meta
    )


def run(operation: Operation, backend: str | Row | None, args: tuple):
    """One operation on its operator arguments; ``backend`` None means what is in force when it runs, a row of the
    operation has been chosen already."""
    if isinstance(backend, Row):
        return backend.run(*args)
    if eager(probe(args)):
        return choose(operation, backend, args).run(*args)
    if not _compiling():
        _library.register_flops()
    return operation.opaque(*args, backend or "")


def record(function: type[Function], args: tuple):
    """``function.apply(*args)``.  In plain eager mode without its ``inspect.signature`` of forward at every call, which
    only fills in defaults (there are none) and takes longer than all the rest of a small call."""
    if eager(probe(args)):
        # As apply does: a tensor that outlived its functorch transform is replaced by what it wraps.
        return super(Function, function).apply(*[_unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args])
    return function.apply(*args)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd, or a functorch transform that may ask for derivatives, has to see a call on these tensors."""
    if forward_ad._current_level >= 0:  # forward mode: the Function refuses, a bare operator would drop tangents
        return True
    if not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in tensors) or _functorch_active()


def draw_seed(x: Tensor) -> Tensor:
    """A dropout seed from torch's default generator of x's device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)


def differentiable_once(operation: Operation, instead: str) -> type[Function]:
    """A Function (operator arguments of a backward, backend) -> its results; differentiating them raises."""

    class BackwardOnce(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return run(operation, args[-1], args[:-1])

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            no_second_derivative(operation.public, instead)

    return BackwardOnce


def no_second_derivative(public: str, instead: str) -> NoReturn:
    raise RuntimeError(f"hivilt: {public} has no double backward; use {instead} where second derivatives are needed")


def cpp(twin: Callable[[], Callable]) -> Callable:
    """Runs a C++ operator; a value that only C++ looks at (an offset, an index) comes back as a ValueError."""

    def call(*args):
        try:
            return twin()(*args)
        except RuntimeError as error:
            text = str(error)
            if "hivilt.ValueError: " not in text:
                raise
            raise ValueError("hivilt: " + text.split("hivilt.ValueError: ", 1)[1].split("\n", 1)[0]) from None

    return call


def absent(kind: str, public: str) -> Row:
    """The row of a backend for which this version ships no kernel of an operation."""
    reason = f"hivilt {VERSION} ships no {kind} kernel for {public}"

    def never(*args):
        raise AssertionError("a row whose why_not always refuses was run")

    return Row(kind.split()[0].lower(), lambda *args: reason, never)


CPU_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def why_not_cpu(*args) -> str | None:
    """Of the C++ kernels that take any shape: every reason at once; None when there is none."""
    x = probe(args)
    if x.is_cpu and x.dtype in CPU_DTYPES and _library.loaded:
        return None
    reasons = [_library.load_failure()] if _library.load_failure() else []
    if not x.is_cpu:
        reasons.append(f"the tensors are on {x.device}")
    if x.dtype not in CPU_DTYPES:
        reasons.append(f"dtype {str(x.dtype)[6:]}: the kernels take float32, bfloat16 and float16")
    return "; ".join(reasons)


def build(
    name: str,
    public: str,
    schema: ModuleType,
    reference: ModuleType,
    triton: Row | None = None,
    why_not: Callable[..., str | None] = why_not_cpu,
) -> Operation:
    """The operation ``name``: its rows, the operator ``hivilt::name`` that chooses among them when it runs, one sample
    after the other under vmap, and its C++ twin ``hivilt::name_cpu`` with the same arguments minus ``backend``.

    schema: has SCHEMAS, FAKES and FLOPS by name; reference: has a function of that name; why_not: of the cpu row.
    """
    arguments, results = schema.SCHEMAS[name]
    fake, flops = schema.FAKES[name], schema.FLOPS.get(name)
    twin = _library.define(f"{name}_cpu({arguments}) -> {results}", fake=fake, flops=flops)

    def run(*args):  # the opaque operator, on real tensors
        return choose(operation, args[-1], args[:-1]).run(*args[:-1])

    operation = Operation(
        public,
        Row("reference", lambda *args: None, getattr(reference, name)),
        Row("cpu", why_not, cpp(lambda: twin)),
        triton or absent("Triton", public),
        absent("CUDA C++", public),
    )
    operation.opaque = _library.define(
        f"{name}({arguments}, str backend) -> {results}",
        fake=lambda *args: fake(*args[:-1]),
        run=run,
        vmap=lambda info, in_dims, *args: in_turn(operation.opaque, info.batch_size, in_dims, args),
        flops=flops,
    )
    return operation


def in_turn(op: Callable, size: int, in_dims: Sequence[Any], args: Sequence[Any]):
    """A batching rule for vmap: the samples one after the other."""

    def pick(x: Any, dim: Any, sample: int):
        if isinstance(x, list | tuple):
            dims = dim if isinstance(dim, list | tuple) else (dim,) * len(x)
            return [pick(y, d, sample) for y, d in zip(x, dims, strict=True)]
        return x if dim is None else x.select(dim, sample)

    def join(each: list):
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        parts = [join(list(part)) for part in zip(*each, strict=True)]
        kind = type(each[0]) if type(each[0]) in (list, tuple) else tuple
        return kind(part[0] for part in parts), kind(part[1] for part in parts)

    return join([op(*(pick(x, d, v) for x, d in zip(args, in_dims, strict=True))) for v in range(size)])
