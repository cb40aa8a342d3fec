"""Settings of a module or model, given as one dict or as keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._checks import refuse

REQUIRED = object()


def read_config(where: str, config: Any, keywords: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Every name of ``known`` with what a keyword says, else config, else its default there; REQUIRED has none.

    An unknown name and a missing one raise ValueError: a misspelt setting is never ignored.
    """
    if config is not None and not isinstance(config, Mapping):
        refuse(TypeError, where, "config", "a dict", config)
    given = {**(config or {}), **keywords}
    for name in given:
        if name not in known:
            refuse(ValueError, where, "config", "names out of " + ", ".join(known), name)
    for name, default in known.items():
        if default is REQUIRED and name not in given:
            refuse(ValueError, where, name, "a value in config", None)
    return {name: given.get(name, default) for name, default in known.items()}
