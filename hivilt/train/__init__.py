"""Trains visual question answering on rendered shapes.

    python -m hivilt.train CONFIG.toml [--resume]

The scenes are made in code; a frozen patch encoder and frozen word vectors feed a fusion that learns.  The checkpoint,
``<output>/checkpoint.safetensors``, holds everything that a run which was cut off needs to go on with the same bits;
``python -m hivilt.predict`` answers questions with it.
"""

from .checkpoint import CheckpointError
from .config import Config, ConfigError

__all__ = ["CheckpointError", "Config", "ConfigError"]
