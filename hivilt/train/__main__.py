"""Reads the configuration, trains, writes checkpoints, prints the accuracy of each kind; see hivilt.train."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import __doc__ as about
from . import checkpoint
from .checkpoint import CheckpointError
from .config import Config, ConfigError, load
from .data import generator
from .loop import accuracy, learned, make_pool, rate_at, split, train_step
from .model import build


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hivilt.train", description=about.splitlines()[0])
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder, if any")
    options = parser.parse_args(arguments)
    try:
        run(load(options.config), options.resume)
    except (ConfigError, CheckpointError, OSError, ImportError) as error:
        sys.exit(f"hivilt.train: {error}")


def run(config: Config, resume: bool = False) -> dict[str, float]:
    """Trains as configured, from the checkpoint where there is one and ``resume`` says so; returns the accuracies.

    Raises:
        CheckpointError: the checkpoint is broken, of another configuration, or in the way.  OSError: of the folder.
        ImportError: safetensors or tqdm is missing.
    """
    try:
        import safetensors  # noqa: F401
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f"hivilt.train needs {error.name}: pip install 'hivilt[train]'") from None
    t = config.training
    torch.set_num_threads(t.threads)  # small tensors: more threads mostly wait for each other
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.safetensors"

    model = build(config)
    optimizer = torch.optim.AdamW(learned(model), t.learning_rate, weight_decay=t.weight_decay)
    torch.manual_seed(generator(config.seed, 4).initial_seed())
    first = 0
    if path.exists():
        if not resume:
            raise CheckpointError(f"{path}: there is a checkpoint already; --resume goes on, or choose another output")
        header, tensors = checkpoint.load(path)
        if header["config"] != config:
            raise CheckpointError(f"{path}: it is of another configuration: {difference(header['config'], config)}")
        checkpoint.put_into(path, tensors, model, optimizer)
        first = header["step"]
        print(f"going on after step {first} of {path}")
    else:
        read = model.vision.fit(config.seed, config.data.encoder_steps)
        print(f"the patch encoder reads {read:.1%} of single objects; it is frozen now")
    train = make_pool(model.vision, config.data.train_scenes, config.seed, 6)
    test = make_pool(model.vision, config.data.test_scenes, config.seed, 7)

    model.train()
    bar = tqdm(range(first, t.steps), "training", initial=first, total=t.steps, unit="step")
    for step in bar:
        batches = split(train.batch(t.batch_size, generator(config.seed, 8, step)), t.accumulate)
        loss = train_step(model, optimizer, batches, rate_at(step, t.steps, t.learning_rate, t.warmup), t.clip)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
        done = step + 1
        if done % t.checkpoint_every == 0 and done < t.steps:
            checkpoint.save(path, model, optimizer, done, config)
    results = accuracy(model, test, config.seed)
    if first < t.steps:
        checkpoint.save(path, model, optimizer, t.steps, config, results)
    print(f"accuracy on {len(test.scenes)} new scenes")
    for kind, share in results.items():
        print(f"  {kind:<16}{share:>7.1%}")
    print(f"checkpoint: {path}")
    return results


def difference(old: Config, new: Config) -> str:
    """The first setting that differs."""

    def flat(settings: dict, prefix: str = "") -> dict:
        found = {}
        for key, x in settings.items():
            found |= flat(x, f"{prefix}{key}.") if isinstance(x, dict) else {prefix + key: x}
        return found

    a, b = flat(old.as_dict()), flat(new.as_dict())
    key = next(key for key in a if a[key] != b[key])
    return f"{key} is {a[key]!r} there and {b[key]!r} here"


if __name__ == "__main__":
    main()
