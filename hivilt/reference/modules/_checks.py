"""Argument checks of the plain modules: a refusal names the module, the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse(kind: type[Exception], where: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise kind(f"{where}: {argument}: expected {expected}; got {describe(got)}")


def describe(x: Any) -> str:
    """A short text about an argument, without the data of a tensor."""
    if isinstance(x, Tensor):
        if x.is_nested:
            return f"a nested {str(x.dtype)[6:]} tensor"
        return f"a {str(x.dtype)[6:]} tensor of shape {tuple(x.shape)}"
    if isinstance(x, str | bool | int | float) or x is None:
        return repr(x)
    if isinstance(x, list | tuple) and all(isinstance(item, str | bool | int | float) for item in x):
        return repr(x)
    return f"a {type(x).__name__}"


def check_size(where: str, name: str, x: Any) -> int:
    if type(x) is not int:  # an int, also a traced one, needs no conversion
        if isinstance(x, bool | Tensor) or not hasattr(x, "__index__"):
            refuse(TypeError, where, name, "an int of at least 1", x)
        x = operator.index(x)
    if x < 1:
        refuse(ValueError, where, name, "an int of at least 1", x)
    return x


def check_sizes(where: str, name: str, x: Any, count: int | None = None) -> tuple[int, ...]:
    """A sequence of ``count`` sizes (None: of 1, 2 or 3)."""
    form = "a tuple of 1, 2 or 3 sizes" if count is None else f"{count} sizes"
    if isinstance(x, str | Tensor) or not isinstance(x, Sequence):
        refuse(TypeError, where, name, form, x)
    if len(x) != count if count is not None else not 1 <= len(x) <= 3:
        refuse(ValueError, where, name, form, x)
    return tuple(check_size(where, f"{name}[{i}]", n) for i, n in enumerate(x))


def check_active(where: str, x: Any, num_scales: int) -> int:
    """How many scales a call is about: all by default, else the first ones."""
    if x is None:
        return num_scales
    if check_size(where, "num_scales", x) > num_scales:
        refuse(ValueError, where, "num_scales", f"at most {num_scales}, the scales of the module", x)
    return x


def check_dropout(where: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float):
        refuse(TypeError, where, "dropout", "a number from 0 to 1", x)
    if not 0.0 <= x <= 1.0:
        refuse(ValueError, where, "dropout", "a number from 0 to 1", x)
    return float(x)


def check_flag(where: str, name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        refuse(TypeError, where, name, "a bool", x)
    return x


def check_choice(where: str, name: str, x: Any, legal: Sequence[str]) -> str:
    expected = "one of " + ", ".join(map(repr, legal))
    if not isinstance(x, str):
        refuse(TypeError, where, name, expected, x)
    if x not in legal:
        refuse(ValueError, where, name, expected, x)
    return x


def check_tensor(where: str, name: str, x: Any, form: str, rank: int) -> Tensor:
    if not isinstance(x, Tensor):
        refuse(TypeError, where, name, f"a tensor {form}", x)
    if x.dim() != rank:
        refuse(ValueError, where, name, f"{rank} dimensions {form}", x)
    return x


def check_tokens(where: str, name: str, x: Any, form: str, width: int) -> Tensor:
    """A tensor of rank 3 with so many channels."""
    check_tensor(where, name, x, form, 3)
    if x.shape[2] != width:
        refuse(ValueError, where, name, f"{width} channels", x)
    return x


def check_scales(where: str, name: str, features: Any, widths: Sequence[int | None], rank: int = 3) -> list[Tensor]:
    """One tensor (B, N_s, C_s), or (B, C_s) when rank is 2, per scale; a width of None is not looked at."""
    form = "(B, N, C)" if rank == 3 else "(B, C)"
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        refuse(TypeError, where, name, f"a list of {len(widths)} tensors {form}", features)
    if len(features) != len(widths):
        refuse(ValueError, where, name, f"{len(widths)} tensors, one per scale", len(features))
    for s, (x, width) in enumerate(zip(features, widths, strict=True)):
        check_tensor(where, f"{name}[{s}]", x, form, rank)
        if x.shape[0] != features[0].shape[0]:
            refuse(ValueError, where, f"{name}[{s}]", f"the batch of {name}[0], {features[0].shape[0]}", x)
        if width is not None and x.shape[-1] != width:
            refuse(ValueError, where, f"{name}[{s}]", f"{width} channels", x)
    return list(features)


def check_grids(where: str, name: str, features: Sequence[Tensor], grid_sizes: Any, what: str) -> list[tuple[int, ...]]:
    """A grid per scale that has as many cells as the scale has tokens; left out: a square per scale."""
    counts = [x.shape[1] for x in features]
    if grid_sizes is None:
        for s, (n, x) in enumerate(zip(counts, features, strict=True)):
            if n == 0 or math.isqrt(n) ** 2 != n:
                refuse(ValueError, where, f"{what}[{s}]", f"a square number of tokens, because {name} is None", x)
        sides = [math.isqrt(n) for n in counts]
        if not torch.compiler.is_compiling():
            _warn_if_ambiguous(where, name, tuple(sides))
        return [(side, side) for side in sides]
    if isinstance(grid_sizes, str | Tensor) or not isinstance(grid_sizes, Sequence):
        refuse(TypeError, where, name, f"{len(features)} tuples of sizes, one per scale", grid_sizes)
    if len(grid_sizes) != len(features):
        refuse(ValueError, where, name, f"{len(features)} tuples of sizes, one per scale", len(grid_sizes))
    grids = [check_sizes(where, f"{name}[{s}]", grid) for s, grid in enumerate(grid_sizes)]
    for s, (grid, x) in enumerate(zip(grids, features, strict=True)):
        if len(grid) != len(grids[0]):
            refuse(ValueError, where, f"{name}[{s}]", f"{len(grids[0])} sizes, as {name}[0] has", grid)
        if math.prod(grid) != x.shape[1]:
            refuse(ValueError, where, f"{what}[{s}]", f"{math.prod(grid)} tokens, to go with the grid {grid}", x)
    return grids


_warned: set[tuple[int, ...]] = set()


def _warn_if_ambiguous(where: str, name: str, sides: tuple[int, ...]) -> None:
    """Says once that square numbers of tokens may be images of another shape: 144, 576 and 2304 are all 9 : 16 too."""
    least = min(sides)
    if sides in _warned or all(side == least for side in sides):
        return
    for height in range(least - 1, (least + 1) // 2, -1):  # wider than 1 : 1, narrower than 4 : 1
        if all(side * height % least == 0 and side * least % height == 0 for side in sides):
            _warned.add(sides)
            wide = [(side * height // least, side * least // height) for side in sides]
            warnings.warn(
                f"hivilt: {where} takes scales of {[side * side for side in sides]} tokens as squares; grids of {wide} "
                f"would fit them too: pass {name}=",
                UserWarning,
                stacklevel=4,
            )
            return


def check_mask(where: str, name: str, mask: Any, shape: tuple[int, int]) -> Tensor:
    """The mask as bool, True takes part; integers are read as 0 and not 0."""
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        refuse(TypeError, where, name, "a bool or integer tensor, 1 or True takes part", mask)
    if tuple(mask.shape) != shape:
        refuse(ValueError, where, name, f"shape {shape}", mask)
    return mask if mask.dtype == torch.bool else mask != 0
