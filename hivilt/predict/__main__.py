"""Prints the answer to a question about an image, or about a scene that is rendered; see hivilt.predict."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..train.checkpoint import CheckpointError
from ..train.data import ANSWERS, generator, make_questions, make_scenes, read, render
from . import __doc__ as about
from .answer import Answerer, read_image, write_image


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hivilt.predict", description=about.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", type=Path, help="a picture of a 4 x 4 grid of cells; it is resized to 64 x 64")
    source.add_argument("--scene", type=int, default=0, metavar="SEED", help="render this scene (default: 0)")
    parser.add_argument("--question", help="such as: what color is the circle")
    parser.add_argument("--out", type=Path, help="write the rendered scene to this file")
    parser.add_argument("--top", type=int, default=3, help="how many answers to print (default: 3)")
    options = parser.parse_args(arguments)
    try:
        predict(options)
    except (CheckpointError, OSError, ValueError, ImportError) as error:
        sys.exit(f"hivilt.predict: {error}")


def predict(options: argparse.Namespace) -> None:
    try:
        import PIL  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(f"hivilt.predict needs {error.name}: pip install 'hivilt[train]'") from None
    if options.image is not None and options.question is None:
        raise ValueError("--question: expected one beside --image; got none")
    answerer = Answerer(options.checkpoint)
    question, truth = options.question, None
    if options.image is not None:
        image = read_image(options.image)
    else:
        g = generator(answerer.config.seed, 9, options.scene)
        scenes = make_scenes(1, g)
        image = render(scenes, g)[0]
        if question is None:
            asked = make_questions(scenes, g)
            question, truth = read(asked.words[0]), ANSWERS[int(asked.answers[0])]
        if options.out is not None:
            write_image(options.out, image)
            print(f"scene {options.scene}: {options.out}")
    answers = answerer.ask(image, question)
    print(f"{question.rstrip(' ?')}?" + (f"  (it is: {truth})" if truth else ""))
    for answer, share in answers[: max(1, options.top)]:
        print(f"  {answer:<10}{share:>7.1%}")


if __name__ == "__main__":
    main()
