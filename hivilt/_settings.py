"""The one place that reads HIVILT_* environment variables: which exist, what they may hold, what they hold now.

They are read once, when hivilt is imported; ``refresh()`` reads them again. An unknown name or value raises ValueError.
Stands alone (standard library only), because setup.py runs this file before the package exists.
"""

import difflib
import os

#: name -> (legal values, meaning of an unset variable, what it does)
ALLOWED = {
    "HIVILT_BACKEND": (("auto", "reference", "cpu", "triton", "cuda"), "auto", "backend used where none is asked for"),
    "HIVILT_ISA": (("scalar", "avx2", "avx512", "avx512_bf16"), "best", "highest instruction set the CPU kernels use"),
    "HIVILT_STRICT": (("0", "1"), "0", "1: auto raises BackendError instead of falling back; a failed build fails pip"),
    "HIVILT_LOG": (("dispatch",), "off", "dispatch: print each choice of a backend to stderr"),
    "HIVILT_CUDA": (("auto", "0", "1"), "auto", "build only. 1: fail when the CUDA C++ part is not built"),
}

_now: dict[str, str] = {}


def refresh() -> None:
    """Reads the environment. Raises ValueError, naming variable, expected and got, before anything is changed."""
    found = {}
    for name, value in os.environ.items():
        if not name.startswith("HIVILT_"):
            continue
        if name not in ALLOWED:
            close = difflib.get_close_matches(name, ALLOWED, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"environment variable {name}: expected one of {', '.join(ALLOWED)}; got {name!r}{hint}")
        legal = ALLOWED[name][0]
        if value == "":  # `HIVILT_ISA= python ...` unsets a variable for one command
            continue
        if value not in legal:
            raise ValueError(f"environment variable {name}: expected one of {', '.join(legal)}; got {value!r}")
        found[name] = value
    _now.clear()
    _now.update(found)


def in_force() -> dict[str, str]:
    """The variables that are set, by name."""
    return dict(_now)


def backend() -> str:
    """Backend to use where neither the call nor ``use_backend`` names one; "auto" unless HIVILT_BACKEND is set."""
    return _now.get("HIVILT_BACKEND", "auto")


def isa() -> str | None:
    """Highest instruction set the CPU kernels may use; None is no cap. The C++ library obeys the same variable."""
    return _now.get("HIVILT_ISA")


def strict() -> bool:
    """True when auto must raise BackendError instead of falling back to the reference."""
    return _now.get("HIVILT_STRICT") == "1"


def log_dispatch() -> bool:
    """True when every choice of a backend is to be printed."""
    return _now.get("HIVILT_LOG") == "dispatch"


def interprets() -> bool:
    """True when Triton has been told to run its kernels in its interpreter, on the CPU; Triton's variable, not ours."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cache_folder() -> str:
    """Where files of the user's that can be made again belong."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hivilt")


def cuda() -> str:
    """What the build does about CUDA C++: "auto", "0" or "1"."""
    return _now.get("HIVILT_CUDA", "auto")


refresh()
