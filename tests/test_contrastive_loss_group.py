"""The contrastive loss of a batch spread over two gloo processes: that of the whole batch, and its gradients."""

import contrast_ranks
import plain_contrastive_loss as plain
import pytest
import torch

import hivilt
from hivilt.testing import UNIT

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    started = contrast_ranks.LossRanks(2, tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


def test_equals_one_process_with_the_whole_batch(ranks):
    """The same loss everywhere; gradients, averaged over ranks, are those of float64 on the concatenated batch."""
    answers = ranks.run("losses")
    for name, settings in contrast_ranks.CASES.items():
        x = plain.call(seed=3, **settings)
        first, second = (answer[name] for answer in answers)
        assert torch.equal(first["loss"], second["loss"]), name
        joined = {side: torch.cat([first[side], second[side]]) / 2 for side in "xy"}
        joined |= {n: (first[n] + second[n]) / 2 for n in ("loss", "logit_scale", "logit_bias") if n in first}
        # A rank's part of the gradient of y travels in y's own type.
        plain.close(x, joined, name, 2 * UNIT[x["x"].dtype])
        one = plain.gradients(hivilt.losses.contrastive_loss, x)
        torch.testing.assert_close(first["loss"], one["loss"])
    frozen = torch.cat([answer["frozen"]["x"] for answer in answers]) / 2
    x = plain.call(11, 6, seed=3)
    torch.testing.assert_close(frozen.double(), plain.truth(x)["x"], rtol=1e-4, atol=1e-6)


EXPECTED = {
    "channels": ("ValueError", "channels"), "dtype": ("ValueError", "dtype"), "shape": ("ValueError", "y: expected"),
    "rank": ("ValueError", "x: expected"), "kind": ("ValueError", "kind"), "unknown kind": ("ValueError", "kind"),
    "symmetric": ("ValueError", "symmetric"), "scale": ("ValueError", "scale"), "gradient": ("ValueError", "records"),
    "labels": ("ValueError", "labels"), "empty": ("ValueError", "x: expected"),
    "no tensor": ("TypeError", "x: expected"),
}  # fmt: skip


def test_a_rank_that_differs_is_told_to_all(ranks):
    first, second = ranks.run("refusals")
    assert first == second and set(first) == set(EXPECTED)
    for name, (kind, text) in EXPECTED.items():
        assert first[name][0] == kind and text in first[name][1], (name, first[name])
        assert "contrastive_loss: " in first[name][1] and "rank 1" in first[name][1]


def test_averaged_gradients_are_those_of_one_process(ranks):
    first, second = ranks.run("data_parallel")
    model = contrast_ranks.Towers().double()
    x, y, scale = model(*(t.double() for t in contrast_ranks.batch()))
    loss = plain.formula(x, y, scale)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name].double(), parameter.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["loss"].double(), loss.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [3, "world", [0, 1]], ids=str)
def test_a_group_that_is_none(group):
    with pytest.raises(TypeError, match=r"contrastive_loss: group: expected a torch\.distributed process group"):
        hivilt.losses.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, group=group)
