"""Answers questions about shapes with a checkpoint of hivilt.train.

    python -m hivilt.predict CHECKPOINT [--image FILE | --scene SEED] [--question TEXT] [--out FILE.png]

Without an image a scene is rendered, and written where ``--out`` says; without a question one about it is asked.
"""

from .answer import Answerer

__all__ = ["Answerer"]
