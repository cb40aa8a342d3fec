"""Checkpoints of a training run: one safetensors file with weights, optimizer, random state, step and configuration.

Tensors ``model.<name>``, ``optimizer.<parameter>.<state>`` and ``random``; everything else is JSON in the header.  No
pickle: a file from elsewhere can be refused, but it cannot run anything.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config, ConfigError, from_dict

FORMAT = "hivilt shapes 1"
HEADER = "hivilt"  # the key of our JSON in the header of the file
LARGEST = 2**33  # bytes: no file of ours comes near


class CheckpointError(ValueError):
    """A file that is no usable checkpoint of this program; the message says why."""


def save(path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, step: int,
         config: Config, results: dict[str, float] | None = None) -> None:  # fmt: skip
    """Writes a checkpoint; whatever happens meanwhile, ``path`` holds a whole file, the old one or the new one.

    The new one is written beside it, flushed to the disk, and then takes the name.  Raises OSError.
    """
    from safetensors.torch import save as to_bytes

    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": x.detach().contiguous() for name, x in model.state_dict().items()}
    for p, state in optimizer.state.items():
        for key, x in state.items():
            tensors[f"optimizer.{names[id(p)]}.{key}"] = x.detach().contiguous()
    tensors["random"] = torch.get_rng_state()
    header = {"format": FORMAT, "step": step, "config": config.as_dict(), "results": results}
    path = Path(path)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(to_bytes(tensors, {HEADER: json.dumps(header)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):  # half a file would only keep a full disk full
            os.unlink(new)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name itself must be on the disk too
    finally:
        os.close(folder)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, with ``config`` as a Config, and the tensors of a file, nothing of which has been used yet.

    Raises:
        CheckpointError: a file that is broken or of another kind.  OSError: what the system says.
    """
    from safetensors import SafetensorError, safe_open

    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would wait for its other end
        raise CheckpointError(f"{path}: expected a safetensors file; got something else than a file")
    size = found.st_size
    if size > LARGEST:
        raise CheckpointError(f"{path}: expected at most {LARGEST} bytes; got {size}")
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file; got {error}") from None
    try:
        header = json.loads(told) if told else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else "a header without it"
        raise CheckpointError(f"{path}: expected the format {FORMAT!r}; got {got!r}")
    step, results = header.get("step"), header.get("results")
    try:
        header["config"] = from_dict(header.get("config"), f"{path}: configuration")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if type(step) is not int or not 0 <= step <= header["config"].training.steps:
        raise CheckpointError(f"{path}: expected a step from 0 to {header['config'].training.steps}; got {step!r}")
    if results is not None and not (
        isinstance(results, dict) and all(isinstance(x, float | int) for x in results.values())
    ):
        raise CheckpointError(f"{path}: expected numbers as results; got {results!r}")
    for name, x in tensors.items():
        if x.is_floating_point() and not x.isfinite().all():
            raise CheckpointError(f"{path}: {name}: expected finite numbers; got NaN or infinity")
    return header, tensors


def put_into(path: str | os.PathLike[str], tensors: dict[str, Tensor], model: nn.Module,
             optimizer: torch.optim.Optimizer | None = None) -> None:  # fmt: skip
    """Copies what ``load`` gave into a model and, if wanted, an optimizer and torch's generator.

    Every name, shape and dtype is checked before anything is written.  Raises CheckpointError.
    """
    state = model.state_dict()
    expected = {f"model.{name}": x for name, x in state.items()}
    moments: list[dict[str, str]] = []  # for each parameter of the optimizer, its tensors' names
    if optimizer is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            moments.append({key: f"optimizer.{names[id(p)]}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")})
            expected |= {name: torch.zeros(()) if key == "step" else p for key, name in moments[-1].items()}
        expected["random"] = torch.get_rng_state()
    for name, x in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: {name}: expected in the file; it is not there")
        got = tensors[name]
        if got.shape != x.shape or got.dtype != x.dtype:
            raise CheckpointError(
                f"{path}: {name}: expected {x.dtype} of shape {tuple(x.shape)}; got {got.dtype} of {tuple(got.shape)}"
            )
        if name.endswith((".step", ".exp_avg_sq")) and bool((got < 0).any()):
            raise CheckpointError(f"{path}: {name}: expected no negative numbers; there are some")
    for name in tensors:
        if name not in expected and (optimizer is not None or name.startswith("model.")):
            raise CheckpointError(f"{path}: {name}: expected no such tensor; it is there")
    if optimizer is not None:
        try:
            torch.Generator().set_state(tensors["random"])
        except RuntimeError as error:
            raise CheckpointError(f"{path}: random: expected a state of torch's generator; {error}") from None
        kept = {i: {key: tensors[name].clone() for key, name in keys.items()} for i, keys in enumerate(moments)}
        optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random"])
    model.load_state_dict({name: tensors[f"model.{name}"] for name in state}, strict=True)
