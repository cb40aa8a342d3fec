"""Triton's interpreter, made fast enough for a test suite, or strict.  Used where kernels are interpreted.

Fast: as it comes, it patches the whole language again at every call of a device function, though the kernel around it
has done so, and computes every integer sum twice for a check of overflow that it then leaves out.
Strict: that check raises.
"""

import contextlib
import dataclasses
import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

builder = interpreter.interpreter_builder


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


def make_fast() -> None:
    interpreter.InterpretedFunction.__call__ = call_device_function
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@contextlib.contextmanager
def strict():
    """An int32 that overflows raises."""
    before = builder.options
    builder.options = dataclasses.replace(before, sanitize_overflow=True, debug=True)
    try:
        yield
    finally:
        builder.options = before
