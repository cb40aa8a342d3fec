"""hivilt.train and hivilt.predict: scenes and questions are what they say, training learns, a killed run goes on with
the same bits, and broken configurations and checkpoints are refused."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hivilt.models
from hivilt.reference.modules import MultimodalFusion
from hivilt.train import CheckpointError, ConfigError, checkpoint, data
from hivilt.train.config import from_dict, load
from hivilt.train.loop import accumulate_gradient, learned, rate_at, train_step
from hivilt.train.model import PatchEncoder, build

for package in ("safetensors", "tqdm", "PIL"):
    pytest.importorskip(package, reason="pip install 'hivilt[train]'")

from hivilt.predict import Answerer  # noqa: E402
from hivilt.predict.__main__ import main as predict  # noqa: E402
from hivilt.predict.answer import read_image, write_image  # noqa: E402
from hivilt.train.__main__ import main as train  # noqa: E402

CONFIG = """
seed = 5
output = "{output}"
[model]
hidden_dim = 16
topk = 4
[data]
train_scenes = 64
test_scenes = 32
encoder_steps = 3
[training]
steps = 20
batch_size = 16
accumulate = 2
warmup = 4
checkpoint_every = 5
threads = 2
"""


def config_file(folder, name="run"):
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.format(output=folder / name))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a whole run."""
    folder = tmp_path_factory.mktemp("whole")
    train([str(config_file(folder))])
    return folder / "run" / "checkpoint.safetensors"


def answer(scene, words):
    """What a person would answer, from the objects of a scene [(shape, color, column)] and the question alone."""
    shapes, colors = [o[0] for o in scene], [o[1] for o in scene]

    def find(word):
        return next(o for o in scene if word in o[:2])

    if words[:2] == ["what", "color"]:
        return find(words[-1])[1]
    if words[:2] == ["what", "shape"]:
        return find(words[4])[0]
    if words[0] == "how":
        return str(len(scene))
    if "left" in words:
        first, second = (w for w in words if w in data.SHAPES or w in data.COLORS)
        return "yes" if find(first)[2] < find(second)[2] else "no"
    return "yes" if words[3] in shapes + colors else "no"


def test_questions_are_of_the_kinds_asked_for():
    scenes, wanted = data.make_scenes(200, data.generator(1)), torch.arange(200) % len(data.KINDS)
    found = data.make_questions(scenes, data.generator(2), wanted).kinds
    instead = found[found != wanted]  # where all objects of a scene stand in one column
    assert (found == wanted).float().mean() > 0.95 and (instead == data.KINDS.index("count")).all()
    assert (wanted[found != wanted] == data.KINDS.index("left of")).all()


def test_answers_are_what_a_person_would_say():
    scenes = data.make_scenes(400, data.generator(1))
    asked = data.make_questions(scenes, data.generator(2))
    seen = set()
    for i in range(400):
        scene = [
            (data.SHAPES[scenes.shapes[i, j]], data.COLORS and list(data.COLORS)[scenes.colors[i, j]],
             int(scenes.cells[i, j]) % data.GRID)
            for j in range(int(scenes.count[i]))
        ]  # fmt: skip
        words = data.read(asked.words[i]).split()
        assert int(asked.mask[i].sum()) == len(words)
        assert data.ANSWERS[asked.answers[i]] == answer(scene, words), (scene, words)
        seen.add((data.KINDS[asked.kinds[i]], len(words)))
    assert {kind for kind, _ in seen} == set(data.KINDS) and len(seen) >= 9
    yes_no = [float((asked.answers[asked.kinds == k] == data.ANSWERS.index("yes")).float().mean()) for k in (2, 3)]
    assert all(0.35 < share < 0.65 for share in yes_no)


def test_images_show_the_scene():
    """Every object's cell has its colour in the middle, every other cell is gray."""
    scenes = data.make_scenes(64, data.generator(3))
    images = data.render(scenes, data.generator(4))
    assert images.shape == (64, 3, 64, 64) and 0 <= images.min() and images.max() <= 1
    middle = images.unflatten(3, (4, 16)).unflatten(2, (4, 16))[:, :, :, 7:9, :, 7:9].mean((3, 5)).flatten(2).mT
    color = torch.full((64, 16), 6)
    for i in range(64):
        for j in range(int(scenes.count[i])):
            color[i, scenes.cells[i, j]] = scenes.colors[i, j]
    assert torch.equal((color < 6).sum(1), scenes.count)
    palette = torch.tensor(list(data.COLORS.values()))
    near = nn.functional.cosine_similarity(middle[:, :, None] - 0.2, palette - 0.2, dim=-1).argmax(-1)
    there = color < 6
    assert (near[there] == color[there]).float().mean() > 0.9
    spread = middle.max(-1)[0] - middle.min(-1)[0]
    assert spread[~there].max() < 0.1 < spread[there].min()


def test_the_same_seed_gives_the_same_scenes_and_another_does_not():
    a, b, c = (
        data.render(data.make_scenes(2, data.generator(*n)), data.generator(0)) for n in ((1, 2), (1, 2), (2, 1))
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_patch_encoder_learns_to_read_cells():
    torch.manual_seed(0)
    encoder = PatchEncoder()
    assert encoder.fit(0, steps=40, batch=128) > 0.4  # chance is 1 / 30
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 16, 40)


def toy():
    torch.manual_seed(0)
    model = hivilt.models.VQAFusionModel(None, None, MultimodalFusion(16, 8, 2, 32, residual=True), 4)
    patches, words = torch.randn(12, 6, 8), torch.randn(12, 5, 16)
    mask = torch.arange(5) < torch.randint(1, 6, (12, 1))
    return model, (patches, words, mask, torch.randint(4, (12,)))


def test_accumulated_gradient_is_that_of_the_whole_batch():
    model, batch = toy()
    model.double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in batch)
    whole = nn.functional.cross_entropy(model(*batch[:3])["logits"], batch[3])
    expected = torch.autograd.grad(whole, learned(model))
    whole = float(whole.detach())
    parts = list(zip(*(x.split([5, 1, 6]) for x in batch), strict=True))  # of unlike size: each row counts once
    assert accumulate_gradient(model, parts) == pytest.approx(whole, rel=1e-12)
    for p, g in zip(learned(model), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-14)


def test_the_recipe_learns():
    model, batch = toy()
    optimizer = torch.optim.AdamW(learned(model), 1e-2)
    losses = [train_step(model, optimizer, [batch], rate_at(step, 60, 1e-2, 5), clip=1.0) for step in range(60)]
    assert losses[0] > 1.2 and losses[-1] < 0.2


def test_the_rate_rises_and_falls_along_a_cosine():
    rates = [rate_at(step, 100, 2.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[99] < 0.001
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


KILLED = """
import os, signal, sys
from hivilt.train import __main__ as command

names, rename = [], os.replace

def killed(source, target):
    names.append(target)
    if len(names) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = killed
command.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_with_the_same_bits(trained, tmp_path, capsys):
    """Killed between step 10, whose checkpoint it left, and the one of step 15, which never took its name."""
    path = config_file(tmp_path)
    run = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, timeout=200)
    assert run.returncode == -signal.SIGKILL, run.stderr
    found = tmp_path / "run" / "checkpoint.safetensors"
    assert checkpoint.load(found)[0]["step"] == 10
    with pytest.raises(SystemExit, match="--resume goes on"):
        train([str(path)])
    train([str(path), "--resume"])
    assert "going on after step 10" in capsys.readouterr().out
    whole, resumed = checkpoint.load(trained), checkpoint.load(found)
    assert resumed[0]["results"] == whole[0]["results"] and resumed[1].keys() == whole[1].keys()
    assert any(name.startswith("optimizer.") for name in whole[1]) and "random" in whole[1]
    for name, x in whole[1].items():
        assert torch.equal(x, resumed[1][name]), name


def test_another_configuration_does_not_go_on(trained, tmp_path):
    text = CONFIG.format(output=trained.parent).replace("warmup = 4", "warmup = 3")
    (tmp_path / "other.toml").write_text(text)
    with pytest.raises(SystemExit, match=r"training\.warmup is 4 there and 3 here"):
        train([str(tmp_path / "other.toml"), "--resume"])


def test_the_results_are_printed_for_each_kind(tmp_path, capsys):
    train([str(config_file(tmp_path))])
    lines = capsys.readouterr().out.splitlines()
    assert [kind for kind in data.KINDS if any(line.startswith(f"  {kind} ") for line in lines)] == list(data.KINDS)


WRONG = {
    "seeds = 1": "seeds: unknown key (did you mean seed?)",
    "seed = true": "seed: expected an int; got True",
    "seed = -1": "seed: expected a number from 0",
    'output = ""': "output: expected a text",
    "model = 3": "model: expected a table; got 3",
    "[model]\nhiden_dim = 64": "model.hiden_dim: unknown key (did you mean model.hidden_dim?)",
    "[model]\nnum_heads = 3": "model.num_heads: expected a divisor of model.hidden_dim = 64; got 3",
    "[model]\ntopk = 17": "model.topk: expected a number from 0 to 16; got 17",
    "[training]\nlearning_rate = nan": "training.learning_rate: expected a number from 0 to 1; got nan",
    '[training]\nsteps = "many"': "training.steps: expected an int; got 'many'",
    "[training]\naccumulate = 3": "training.accumulate: expected a divisor of training.batch_size = 128; got 3",
    "seed = ": "no TOML file",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_configuration_is_refused_by_its_key(tmp_path, text):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {WRONG[text]}")
    with pytest.raises(SystemExit, match=r"hivilt\.train: "):
        train([str(path)])


def test_integers_are_rates_too_and_bytes_are_no_toml(tmp_path):
    assert from_dict({"training": {"learning_rate": 1}}, "x").training.learning_rate == 1.0
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no TOML file"):
        load(tmp_path / "c.toml")
    with pytest.raises(SystemExit, match="No such file"):
        train([str(tmp_path / "none.toml")])


def rewritten(path, target, change):
    """A copy of a checkpoint with other tensors or another header."""
    from safetensors.torch import save_file

    header, tensors = checkpoint.load(path)
    header = {**header, "config": header["config"].as_dict()}
    change(header, tensors)
    save_file(tensors, target, {checkpoint.HEADER: header if isinstance(header, str) else json.dumps(header)})


CHANGES = {
    "format": (lambda h, t: h.update(format="other"), "expected the format"),
    "step": (lambda h, t: h.update(step=21), "expected a step from 0 to 20; got 21"),
    "step-kind": (lambda h, t: h.update(step="1"), "expected a step"),
    "results": (lambda h, t: h.update(results=[1]), "expected numbers as results"),
    "config": (lambda h, t: h["config"].update(model=7), "configuration: model: expected a table"),
    "config-size": (lambda h, t: h["config"]["model"].update(hidden_dim=10**9), "model.hidden_dim: expected a number"),
    "missing": (lambda h, t: t.pop("model.head.bias"), "model.head.bias: expected in the file"),
    "shape": (lambda h, t: t.update({"model.head.bias": torch.zeros(3)}), "model.head.bias: expected torch.float32 of"),
    "dtype": (lambda h, t: t.update({"model.head.bias": t["model.head.bias"].double()}), "got torch.float64"),
    "more": (lambda h, t: t.update({"model.evil": torch.zeros(3)}), "model.evil: expected no such tensor"),
    "nan": (lambda h, t: t["model.head.bias"].fill_(torch.nan), "model.head.bias: expected finite numbers"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_checkpoint_is_refused(trained, tmp_path, name):
    change, message = CHANGES[name]
    rewritten(trained, tmp_path / "bad.safetensors", change)
    with pytest.raises(CheckpointError) as error:
        Answerer(tmp_path / "bad.safetensors")
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, t: t.update(random=torch.zeros(7, dtype=torch.uint8)), "random: expected torch.uint8"),
        (lambda h, t: t["random"].fill_(255), "random: expected a state of torch's generator"),
        (lambda h, t: t["optimizer.head.bias.exp_avg_sq"].fill_(-1), "expected no negative numbers"),
        (lambda h, t: t.pop("optimizer.head.bias.step"), "optimizer.head.bias.step: expected in the file"),
    ],
    ids=["random-size", "random", "negative", "moment"],
)
def test_nothing_is_written_before_the_whole_file_fits(trained, tmp_path, change, message):
    path = tmp_path / "bad.safetensors"
    rewritten(trained, path, change)
    header, tensors = checkpoint.load(path)
    model = build(header["config"])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer, random = torch.optim.AdamW(learned(model)), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.put_into(path, tensors, model, optimizer)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not optimizer.state and torch.equal(random, torch.get_rng_state())


def test_files_that_are_no_checkpoints_are_refused(trained, tmp_path):
    whole = trained.read_bytes()
    flipped = bytearray(whole)
    flipped[3] ^= 0xFF  # the length of the header
    for i, content in enumerate((b"", b"PK\x03\x04" + bytes(64), whole[:-100], whole[:2000], bytes(flipped))):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="expected a safetensors file"):
            checkpoint.load(path)
        with pytest.raises(SystemExit, match=r"hivilt\.predict: "):
            predict([str(path)])
    with pytest.raises(SystemExit, match="No such file"):
        predict([str(tmp_path / "none")])
    os.mkfifo(pipe := tmp_path / "pipe")
    for path in (pipe, tmp_path):  # reading a pipe would wait for somebody to write
        with pytest.raises(CheckpointError, match="something else than a file"):
            checkpoint.load(path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(trained, tmp_path, monkeypatch, step):
    header, tensors = checkpoint.load(trained)
    model = build(header["config"])
    optimizer = torch.optim.AdamW(learned(model))
    checkpoint.save(tmp_path / "one", model, optimizer, 3, header["config"])
    before = (tmp_path / "one").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, step, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "one", model, optimizer, 4, header["config"])
    assert [path.name for path in tmp_path.iterdir()] == ["one"] and (tmp_path / "one").read_bytes() == before


def test_predict_answers_about_a_scene_and_about_its_image(trained, tmp_path, capsys):
    picture = tmp_path / "scene.png"
    predict([str(trained), "--scene", "3", "--out", str(picture), "--top", "2"])
    first = capsys.readouterr().out.splitlines()
    assert first[0] == f"scene 3: {picture}" and "(it is: " in first[1] and len(first) == 4
    question = first[1].split("?")[0]
    predict([str(trained), "--image", str(picture), "--question", f"{question}?", "--top", "2"])
    second = capsys.readouterr().out.splitlines()
    assert second[0] == f"{question}?" and [x.split()[0] for x in second[1:]] == [x.split()[0] for x in first[2:]]
    shares = [float(x.split()[1].rstrip("%")) for x in second[1:]]
    assert 0 < shares[1] <= shares[0] <= 100


def test_predict_says_which_words_a_question_keeps(trained):
    answerer = Answerer(trained)
    image = data.render(data.make_scenes(1, data.generator(1)), data.generator(2))[0]
    seen = answerer.seen(image, "what color is the circle")
    assert seen.shape == (2, 5, 16) and ((seen > 0).sum(-1) == 4).all()  # topk = 4
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, 5))
    answers = answerer.ask(image, "What color is the circle?")
    assert len(answers) == len(data.ANSWERS) and sum(share for _, share in answers) == pytest.approx(1)
    assert answers == sorted(answers, key=lambda x: -x[1])


def test_predict_refuses_other_words_and_other_files(trained, tmp_path):
    for arguments, message in (
        (["--question", "where is the dog"], "expected words out of .*; got 'where'"),
        (["--question", "?"], "expected 1 to 9 words; got 0"),
        (["--image", str(trained)], "--question: expected one beside --image"),
        (["--image", str(trained), "--question", "how many things"], "expected an image"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict([str(trained), *arguments])


def test_an_image_file_keeps_its_pixels(tmp_path):
    image = (torch.rand(3, 64, 64) * 255).round() / 255
    write_image(tmp_path / "x.png", image)
    torch.testing.assert_close(read_image(tmp_path / "x.png"), image, rtol=0, atol=1e-6)


def test_without_its_packages_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for command, argument in ((train, config_file(tmp_path)), (predict, tmp_path / "x")):
        with pytest.raises(SystemExit, match=r"needs safetensors: pip install 'hivilt\[train\]'"):
            command([str(argument)])


def test_the_example_shows_the_defaults():
    """All but topk: the file stands in the documentation's commands."""
    path = Path(__file__).resolve().parent.parent / "examples" / "shapes.toml"
    found = load(path).as_dict()
    assert found["model"].pop("topk") == 4
    default = from_dict({}, "x").as_dict()
    del default["model"]["topk"]
    assert found == default
    written = [line.split(" = ")[0] for line in path.read_text().splitlines() if " = " in line]
    assert sorted(written) == sorted(
        ["topk", *(key for x in default.values() if isinstance(x, dict) for key in x), "seed", "output"]
    )
