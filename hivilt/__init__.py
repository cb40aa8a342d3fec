"""Fast kernels for hierarchical vision-language transformers in PyTorch.

    hivilt.ops          functions: topk_attention, scale_fusion, token_pool, bank_retrieval, contrastive_loss and what
                        belongs to them
    hivilt.nn           modules that replace plain ones
    hivilt.models       models made of them
    hivilt.losses       contrastive, matching and distillation losses
    hivilt.distributed  a feature bank whose rows are spread over many processes
    hivilt.accelerate   swaps the modules of a model for those; hivilt.restore undoes it
    hivilt.reference    the same mathematics in plain PyTorch

Imports torch and nothing heavier; hivilt.nn and what stands beside it are imported when first used.
"""

from importlib import import_module
from importlib.util import find_spec as _find_spec
from typing import Any

from . import ops, reference
from ._backends import VERSION as __version__
from ._backends import BackendError, explain, last_backend, use_backend
from .ops import selected_attention, topk_attention, topk_attention_varlen, topk_select

_LAZY = {"accelerate": "swap", "restore": "swap", "Report": "swap"}
_ROOMS = (
    "demo", "distributed", "info", "integrations", "losses", "models", "nn", "swap", "testing", "triton_kernels",
)  # fmt: skip

__all__ = [
    "BackendError",
    "Report",
    "__version__",
    "accelerate",
    "explain",
    "last_backend",
    "ops",
    "reference",
    "restore",
    "selected_attention",
    "topk_attention",
    "topk_attention_varlen",
    "topk_select",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    if name in _ROOMS:
        if name == "triton_kernels" and _find_spec(f"{__name__}.{name}") is None:
            raise ImportError(
                "hivilt.triton_kernels is not there: this Python runs in a bare checkout, where the folder "
                "triton_kernels is not mapped into the package. Install it: pip install -e . --no-build-isolation"
            )
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_ROOMS})
