"""Which implementation runs: rows (name, why_not, run) per operation, and the choice between them.

An explicit request (argument, then ``use_backend``, then HIVILT_BACKEND) runs or raises BackendError with the reasons;
``auto`` takes the first row that accepts the call and says once why it fell back to the reference.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _settings

VERSION = "0.1.0"
NAMES = ("cuda", "triton", "cpu", "reference")  # auto asks in this order
LEGAL = ("auto", *NAMES)


class BackendError(RuntimeError):
    """A backend that was asked for cannot run the call; the text names it, the operation and every reason."""


class Row(NamedTuple):
    """One implementation of an operation; both callables take the operator's arguments without ``backend``."""

    name: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]


class Operation:
    """An operation and its rows. ``public`` is the name users know it by; backward shares it with forward."""

    def __init__(self, public: str, *rows: Row):
        self.public = public
        self.rows = {row.name: row for row in rows}
        # The rows that auto asks about a tensor of a device; the others would only repeat that it is another device.
        self.on_cpu = [self.rows[name] for name in ("cpu", "reference")]
        self.on_cuda = [self.rows[name] for name in ("cuda", "triton", "reference")]
        self.elsewhere = [self.rows["reference"]]

    def ladder(self, x: Any) -> list[Row]:
        return self.on_cpu if x.is_cpu else self.on_cuda if x.is_cuda else self.elsewhere


class _Thread(threading.local):
    asked: tuple[str, ...] = ()  # names of the surrounding use_backend blocks, innermost last
    ran: str | None = None


_thread = _Thread()
_said: set[tuple[str, str]] = set()
_explainers: dict[str, tuple[Operation, inspect.Signature, Callable]] = {}


def check_name(name: str | None, argument: str = "backend") -> None:
    """Raises unless ``name`` is a backend, "auto" or None."""
    if name is None or (isinstance(name, str) and name in LEGAL):
        return
    kind = ValueError if isinstance(name, str) else TypeError
    raise kind(f"{argument}: expected one of {', '.join(map(repr, LEGAL))}; got {name!r}")


class use_backend:
    """``with hivilt.use_backend("cpu"):`` asks for a backend in this thread; nests; "auto" undoes an outer one.

    Obeyed at run time, so it works around a compiled function; inside one, ``backend=`` does.
    """

    def __init__(self, name: str):
        if name is None:
            raise TypeError(f"use_backend: name: expected one of {', '.join(map(repr, LEGAL))}; got None")
        check_name(name, "use_backend: name")
        self.name = name

    def __enter__(self) -> use_backend:
        if torch.compiler.is_compiling():  # a trace would enter it once, while tracing, and forget it
            raise RuntimeError("use_backend: put it around the compiled function, or pass backend= inside")
        _thread.asked = (*_thread.asked, self.name)
        return self

    def __exit__(self, *_: object) -> None:
        _thread.asked = _thread.asked[:-1]


def last_backend() -> str | None:
    """Name of the backend that ran the last hivilt operation of this thread; None before the first."""
    return _thread.ran


def policy(asked: str | None) -> str:
    """What is in force: the argument, else the innermost ``use_backend``, else HIVILT_BACKEND, else "auto"."""
    return asked or (_thread.asked[-1] if _thread.asked else _settings.backend())


def choose(operation: Operation, asked: str | None, args: tuple) -> Row:
    """The row that runs these arguments. ``asked`` is a name, "auto", or None / "" for what is in force."""
    name = policy(asked)
    if name == "auto":
        row = operation.ladder(probe(args))[0]
        if row.why_not(*args) is not None:
            row = _second_choice(operation, args)
    else:
        check_name(name)
        row = operation.rows[name]
        reason = row.why_not(*args)
        if reason is not None:
            raise BackendError(f"{operation.public}: backend {name!r} cannot run this call: {reason}")
    if _settings.log_dispatch():
        print(f"hivilt: {operation.public} {_describe(probe(args))} -> {row.name}", file=sys.stderr)
    _thread.ran = row.name
    return row


def probe(args: tuple) -> Any:
    """The tensor that tells where a call runs: the first argument, or the first of the list that it is."""
    return args[0][0] if isinstance(args[0], list | tuple) else args[0]


def _second_choice(operation: Operation, args: tuple) -> Row:
    reasons = []
    for row in operation.ladder(probe(args)):
        reason = row.why_not(*args)
        if reason is None:
            if row.name == "reference":
                _fall_back(operation, "; ".join(reasons))
            return row
        reasons.append(f"{row.name}: {reason}")
    raise BackendError(f"{operation.public}: no backend can run this call: {'; '.join(reasons)}")


def _fall_back(operation: Operation, reasons: str) -> None:
    if _settings.strict():
        raise BackendError(
            f"{operation.public}: only the reference can run this call and HIVILT_STRICT=1 forbids it: {reasons}"
        )
    if (operation.public, reasons) not in _said:
        _said.add((operation.public, reasons))
        warnings.warn(
            f"hivilt: {operation.public} runs on the PyTorch reference, which is slow ({reasons}). "
            "Said once; python -m hivilt.info shows what was built, backend='reference' asks for it quietly.",
            RuntimeWarning,
            stacklevel=_levels_to_the_caller(),
        )


def _levels_to_the_caller() -> int:
    """How many frames up, from where it is called, the first one outside hivilt stands."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "hivilt":
        frame, level = frame.f_back, level + 1
    return level


def _describe(x: Any) -> str:
    return f"{str(x.dtype)[6:]}{list(x.shape)} on {x.device}"


def explainable(operation: Operation, public: Callable, bind: Callable) -> None:
    """Makes ``explain`` know a public function; ``bind`` turns its arguments into (operator arguments, ...)."""
    _explainers[public.__name__] = (operation, inspect.signature(public), bind)


def explain(op: Callable | str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Prints and returns every backend's verdict on a call of a public operation: None (it can run it) or its reason.

    ``explain("topk_attention", query, key, value, topk=16)``; nothing is computed, a malformed call raises as usual.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _explainers:
        raise ValueError(f"explain: op: expected one of {', '.join(sorted(_explainers))}; got {name!r}")
    operation, signature, bind = _explainers[name]
    call = signature.bind(*args, **kwargs)
    asked = call.arguments.get("backend")
    bound = bind(**call.arguments)[0]
    verdicts = {row: operation.rows[row].why_not(*bound) for row in NAMES}
    wanted = policy(asked)
    willing = [row.name for row in operation.ladder(probe(bound)) if verdicts[row.name] is None]
    runs = (willing or [None])[0] if wanted == "auto" else wanted if verdicts[wanted] is None else None
    print(f"{name}: {_describe(probe(bound))}")
    for row, reason in verdicts.items():
        print(f"  {row:<10}{'can run it' if reason is None else 'no: ' + reason}")
    print(f"  asked for {wanted}: " + (f"{runs} runs" if runs else "raises BackendError"))
    return verdicts
