"""Argument checks of the feature bank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._bank_reading import INF, unit, wide_dtype
from ._checks import check_size, check_tensor, refuse

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_update(bank: nn.Module, features: Any, slots: Any) -> Tensor:
    """The rows to write, of length 1 if asked for."""
    where, C = "FeatureBank.update", bank.feature_dim
    check_tensor(where, "features", features, "(B, C)", 2)
    if features.dtype not in FLOATS:
        refuse(TypeError, where, "features", "float32, bfloat16, float16 or float64", features)
    if features.shape[1] != C:
        refuse(ValueError, where, "features", f"{C} channels", features)
    check_device(where, bank, "features", features)
    if slots is not None:
        if bank.update_mode != "ema":
            refuse(ValueError, where, "slots", f"None, because update_mode is {bank.update_mode!r}", slots)
        if not isinstance(slots, Tensor) or slots.dtype not in (torch.int32, torch.int64):
            refuse(TypeError, where, "slots", "an int32 or int64 tensor (B,)", slots)
        if tuple(slots.shape) != (features.shape[0],):
            refuse(ValueError, where, "slots", f"shape ({features.shape[0]},)", slots)
        check_device(where, bank, "slots", slots)
        if slots.is_cpu and not torch.compiler.is_compiling():
            outside = slots[(slots < 0) | (slots >= bank.bank_size)]
            if outside.numel():
                refuse(ValueError, where, "slots", f"values from 0 to {bank.bank_size - 1}", int(outside[0]))
    rows = features.detach()
    if bank.normalize:
        rows = unit(rows.to(wide_dtype(rows.dtype, bank.bank.dtype)))
    if bank.on_nonfinite == "raise" and not bool(rows.to(bank.bank.dtype).isfinite().all()):
        expected = f"rows that are finite in {str(bank.bank.dtype)[6:]}, because on_nonfinite is 'raise'"
        raise ValueError(f"{where}: features: expected {expected}; got NaN or infinity")
    return rows


def check_read(bank: nn.Module, query: Any, scale: Any, mask: Any, exclude: Any):
    """query [B, C], scale, mask [M] or [B, M], exclude [B]."""
    where, C, M = "FeatureBank", bank.feature_dim, bank.bank_size
    if not isinstance(query, Tensor):
        refuse(TypeError, where, "query", "a tensor (..., C)", query)
    if query.dtype not in FLOATS:
        refuse(TypeError, where, "query", "float32, bfloat16, float16 or float64", query)
    if query.dim() == 0 or query.shape[-1] != C:
        refuse(ValueError, where, "query", f"shape (..., {C})", query)
    if (query.dtype == torch.float64) != (bank.bank.dtype == torch.float64):
        refuse(TypeError, where, "query", f"float64 exactly when the bank, {bank.bank.dtype}, is", query)
    check_device(where, bank, "query", query)
    lead = tuple(query.shape[:-1])
    scale = bank.scale if scale is None else check_scale(where, scale)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            refuse(TypeError, where, "mask", "a bool tensor (M,) or (..., M)", mask)
        if tuple(mask.shape) not in ((M,), (*lead, M)):
            refuse(ValueError, where, "mask", f"shape {(M,)} or {(*lead, M)}", mask)
        check_device(where, bank, "mask", mask)
        mask = mask.reshape(-1, M) if mask.dim() > 1 else mask
    if exclude is not None:
        if not isinstance(exclude, Tensor) or exclude.dtype not in (torch.int32, torch.int64):
            refuse(TypeError, where, "exclude", "an int32 or int64 tensor (...)", exclude)
        if tuple(exclude.shape) != lead:
            refuse(ValueError, where, "exclude", f"shape {lead}", exclude)
        check_device(where, bank, "exclude", exclude)
        if exclude.is_cpu and not torch.compiler.is_compiling():
            outside = exclude[(exclude < -1) | (exclude >= M)]
            if outside.numel():
                refuse(ValueError, where, "exclude", f"values from -1 to {M - 1}", int(outside[0]))
        exclude = exclude.reshape(-1)
    return query.reshape(-1, C), scale, mask, exclude


def check_device(where: str, bank: nn.Module, name: str, x: Tensor) -> None:
    if x.device != bank.bank.device:
        refuse(ValueError, where, name, f"a tensor on the bank's device, {bank.bank.device}", f"one on {x.device}")


def check_scale(where: str, x: Any) -> float | Tensor:
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            refuse(TypeError, where, "scale", "a floating point tensor", x)
        if x.numel() != 1:
            refuse(ValueError, where, "scale", "a number or a tensor of one element", x)
        return x
    return check_number(where, "scale", x, -INF, INF)


def check_number(where: str, name: str, x: Any, low: float, high: float) -> float:
    if isinstance(x, bool | str | Tensor) or not hasattr(x, "__float__"):
        refuse(TypeError, where, name, "a real number", x)
    try:
        x = float(x)
    except OverflowError:
        refuse(ValueError, where, name, "a number that a float can hold", "a larger one")
    if not (math.isfinite(x) and low <= x <= high):
        expected = "a finite number" if low == -INF else f"a number from {low:g} to {high:g}"
        refuse(ValueError, where, name, expected, x)
    return x


def check_count(where: str, name: str, x: Any) -> int:
    x = check_size(where, name, x)
    if x >= 1 << 31:
        refuse(ValueError, where, name, "an int below 2^31", x)
    return x
