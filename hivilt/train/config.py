"""The configuration of a training run: what a TOML file may say, and what is said of one that says else."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key."""


def limits(default: Any, low: float, high: float) -> Any:
    """A field with the least and the greatest legal value."""
    return field(default=default, metadata={"limits": (low, high)})


@dataclass(frozen=True)
class Model:
    """``topk``: how many patches a word keeps, 0: all of them."""

    hidden_dim: int = limits(64, 1, 1024)
    num_heads: int = limits(2, 1, 256)
    image_to_text: bool = False
    residual: bool = True
    topk: int = limits(0, 0, 16)


@dataclass(frozen=True)
class Data:
    """Scenes are rendered once, questions about them are new in every step."""

    train_scenes: int = limits(4096, 1, 10**6)
    test_scenes: int = limits(1024, 1, 10**6)
    encoder_steps: int = limits(300, 1, 10**5)


@dataclass(frozen=True)
class Training:
    """AdamW; the rate rises over ``warmup`` steps and falls to 0 along half a cosine.  A step takes its batch in
    ``accumulate`` parts.  Every ``checkpoint_every`` steps, and at the end, the state is written."""

    steps: int = limits(1000, 1, 10**7)
    batch_size: int = limits(128, 1, 10**5)
    accumulate: int = limits(1, 1, 10**4)
    learning_rate: float = limits(4e-3, 0.0, 1.0)
    weight_decay: float = limits(0.01, 0.0, 10.0)
    warmup: int = limits(50, 0, 10**6)
    clip: float = limits(1.0, 1e-6, 1e6)
    checkpoint_every: int = limits(200, 1, 10**7)
    threads: int = limits(1, 1, 256)


@dataclass(frozen=True)
class Config:
    seed: int = limits(0, 0, 2**31 - 1)
    output: str = "runs/shapes"
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load(path: str | Path) -> Config:
    """The configuration of a TOML file; what it leaves out has its default.

    Raises:
        ConfigError: no TOML, an unknown key, a wrong type, a value out of its limits.  OSError: no such file.
        ImportError: Python 3.10 without tomli.
    """
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError:
            raise ImportError("before Python 3.11 hivilt.train needs tomli: pip install 'hivilt[train]'") from None
    text = Path(path).read_bytes()
    try:
        told = tomllib.loads(text.decode())
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{path}: no TOML file: {error}") from None
    return from_dict(told, str(path))


def from_dict(told: dict[str, Any], where: str) -> Config:
    """A checked Config; ``where`` goes in front of messages. Raises ConfigError."""
    config = _build(Config, told, where, "")
    model, training = config.model, config.training
    if model.hidden_dim % model.num_heads:
        expected = f"a divisor of model.hidden_dim = {model.hidden_dim}"
        raise ConfigError(f"{where}: model.num_heads: expected {expected}; got {model.num_heads}")
    if training.batch_size % training.accumulate:
        expected = f"a divisor of training.batch_size = {training.batch_size}"
        raise ConfigError(f"{where}: training.accumulate: expected {expected}; got {training.accumulate}")
    return config


def _build(cls: type, told: Any, where: str, prefix: str) -> Any:
    if not isinstance(told, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.')}: expected a table; got {told!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in told:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {prefix}{close[0]}?)" if close else ""
            raise ConfigError(f"{where}: {prefix}{key}: unknown key{hint}; expected {', '.join(fields)}")
    found = {}
    for key, value in told.items():
        f = fields[key]
        if f.default_factory is not dataclasses.MISSING:
            found[key] = _build(f.default_factory, value, where, f"{prefix}{key}.")
        else:
            found[key] = _value(f, value, f"{where}: {prefix}{key}")
    return cls(**found)


def _value(f: dataclasses.Field, value: Any, where: str) -> Any:
    kind = type(f.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {'an' if kind is int else 'a'} {kind.__name__}; got {value!r}")
    low, high = f.metadata.get("limits", (-math.inf, math.inf))
    if kind in (int, float) and not low <= value <= high:
        raise ConfigError(f"{where}: expected a number from {low:g} to {high:g}; got {value!r}")
    if kind is str and not value:
        raise ConfigError(f"{where}: expected a text that is not empty; got {value!r}")
    return value
