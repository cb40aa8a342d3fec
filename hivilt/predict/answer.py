"""A trained model behind one call: image and question in, answers with their probabilities out."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..train import checkpoint
from ..train.data import ANSWERS, CELL, GRID, write
from ..train.model import attention_shares, build

SIDE = GRID * CELL  # pixels of an image's side


class Answerer:
    """The model of a checkpoint.

    Raises:
        CheckpointError: a file that is no checkpoint of hivilt.train.  OSError: what the system says of it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        header, tensors = checkpoint.load(path)
        self.config, self.step = header["config"], header["step"]
        self.model = build(self.config).eval()
        checkpoint.put_into(path, tensors, self.model)

    @torch.no_grad()
    def ask(self, image: Tensor, question: str) -> list[tuple[str, float]]:
        """Answers to a question about an image [3, 64, 64] from 0 to 1, the most probable first.

        Raises ValueError for a word that the model has never seen.
        """
        words, mask = write(question)
        share = self.model(image[None], words, mask)["logits"][0].softmax(0)
        return [(ANSWERS[i], float(share[i])) for i in share.argsort(descending=True, stable=True).tolist()]

    @torch.no_grad()
    def seen(self, image: Tensor, question: str) -> Tensor:
        """The attention of every word to every cell [heads, words, 16]; 0 where a word did not keep the cell."""
        words, mask = write(question)
        return attention_shares(self.model, image[None], words, mask)[0][0]


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """An image file, resized to 64 x 64, as [3, 64, 64] from 0 to 1. Raises OSError, or ValueError for no image."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path}: expected an image; {error}") from None
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3).permute(2, 0, 1) / 255


def write_image(path: str | os.PathLike[str], image: Tensor) -> None:
    """Writes [3, 64, 64] from 0 to 1 as it is, pixel for pixel. Raises OSError."""
    from PIL import Image

    pixels = (image.permute(1, 2, 0) * 255).round().byte().contiguous()
    Image.frombytes("RGB", (image.shape[2], image.shape[1]), bytes(pixels.flatten().tolist())).save(Path(path))
