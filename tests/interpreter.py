"""Triton's interpreter, made fast enough for a test suite, or strict.  Used where kernels are interpreted.

Fast: as it comes, it patches the whole language again at every call of a device function, though the kernel around it
has done so, and computes every integer sum twice for a check of overflow that it then leaves out. Most of the rest of
its time goes into objects that describe types, built anew for every value: shapes, their products, their names. Here
those of a shape are built, and checked, once. What is computed, by numpy, stays what it was.
Strict: the check of overflow raises.
"""

import contextlib
import dataclasses
import functools
import inspect
import math

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

builder = interpreter.interpreter_builder
Semantic = type(interpreter.interpreter_semantic)


@functools.cache
def languages(function) -> tuple:
    """The modules of the language that a function sees."""
    return tuple(x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core))


def call_device_function(self, *args, **kwargs):
    """As InterpretedFunction.__call__, but patches only what is not patched yet."""
    if any(tl.core.is_builtin(language.arange) for language in languages(self.fn)):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise InterpreterError(repr(error)) from error


class Shape:
    """What the types and the values of one shape have in common."""

    def __init__(self, sizes: tuple):
        self.sizes = sizes
        self.of_type = tl.tuple(sizes)
        self.of_value = tl.tuple([tl.constexpr(n) for n in sizes])
        self.numel = math.prod(sizes)
        self.constant = tl.constexpr(self.numel)


SCALAR = Shape(())
SHAPES: dict[tuple, Shape] = {}


def describe_block(self, element_ty, shape, slow=tl.block_type.__init__) -> None:
    """As block_type.__init__; the name, which only messages show, is left to who asks."""
    sizes = tuple([n.value if type(n) is tl.constexpr else n for n in shape])
    found = SHAPES.get(sizes)
    if found is None:
        slow(self, element_ty, tl.tuple(sizes))
        found = SHAPES[sizes] = Shape(sizes)
        del self.name
    self.common, self.element_ty, self.shape, self.numel = found, element_ty, found.of_type, found.numel


def describe_value(self, handle, type) -> None:
    """As tensor.__init__."""
    common = getattr(type, "common", SCALAR)
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = common.of_value, common.constant


@functools.cache
def joint(a: tuple, b: tuple) -> tuple | None:
    """The shape that two of one rank are spread to; None: not for this function."""
    fits = len(a) == len(b) and all(1 in (m, n) or m == n for m, n in zip(a, b, strict=True))
    return tuple([max(m, n) for m, n in zip(a, b, strict=True)]) if fits else None


def spread(self, lhs, rhs, slow=Semantic.broadcast_impl_value) -> tuple:
    """As broadcast_impl_value."""
    a, b = (getattr(x.type, "common", SCALAR) for x in (lhs, rhs))
    if a is b:
        return lhs, rhs
    to = joint(a.sizes, b.sizes) if a is not SCALAR and b is not SCALAR else None
    if to is None:
        return slow(self, lhs, rhs)
    return tuple(
        x
        if common.sizes == to
        else self.tensor(self.builder.create_broadcast(x.handle, to), tl.block_type(x.dtype, to))
        for x, common in ((lhs, a), (rhs, b))
    )


def check_operands(
    self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False,
    slow=Semantic.binary_op_type_checking_impl,
) -> tuple:  # fmt: skip
    """As binary_op_type_checking_impl, which has nothing to convert between two values of one type."""
    if type(lhs) is type(rhs) is tl.tensor and lhs.dtype is rhs.dtype and not div_or_mod and not lhs.dtype.is_ptr():
        return self.broadcast_impl_value(lhs, rhs)
    return slow(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


def stored_as(dtype, known={}, slow=interpreter._get_np_dtype):  # noqa: B006 - a cache
    """As _get_np_dtype, which builds its table at every call."""
    name = dtype.scalar.name
    if name not in known:
        known[name] = slow(dtype)
    return known[name]


PLAIN = {int, float, bool, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type}


def unwrapped(x, slow=tl.core._unwrap_if_constexpr):
    """As _unwrap_if_constexpr, which looks for lists and tuples first."""
    kind = type(x)
    return x if kind in PLAIN else x.value if kind is tl.constexpr else slow(x)


def same_dtype(self, other, slow=tl.dtype.__eq__) -> bool:
    """As dtype.__eq__."""
    return self is other or slow(self, other)


def same_block(self, other) -> bool:
    """As block_type.__eq__."""
    return type(other) is tl.block_type and self.common is other.common and self.element_ty == other.element_ty


def patch_member(obj, name, member, builder, scope) -> None:
    """As _patch_attr, for calls that mostly name no argument."""

    def call(*args, **named):
        named["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **named)

    scope.set_attr(obj, name, call)


def make_fast() -> None:
    interpreter.InterpretedFunction.__call__ = call_device_function
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    tl.block_type.__init__ = describe_block
    tl.block_type.name = functools.cached_property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.block_type.name.__set_name__(tl.block_type, "name")
    tl.tensor.__init__ = describe_value
    Semantic.broadcast_impl_value = spread
    Semantic.binary_op_type_checking_impl = check_operands
    interpreter._get_np_dtype = stored_as
    interpreter._patch_attr = patch_member
    tl.core._unwrap_if_constexpr = unwrapped
    tl.dtype.__eq__ = same_dtype
    tl.block_type.__eq__ = same_block
    tl.block_type.to_ir = lambda self, builder: self  # the interpreter has no other types


@contextlib.contextmanager
def strict():
    """An int32 that overflows raises."""
    before = builder.options
    builder.options = dataclasses.replace(before, sanitize_overflow=True, debug=True)
    try:
        yield
    finally:
        builder.options = before
