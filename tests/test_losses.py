"""Matching, distillation and the sum of losses, against formulas written out in float64."""

import math

import plain_contrastive_loss as plain
import pytest
import torch
import torch.nn.functional as F

import hivilt
from hivilt.losses import MultiTaskLoss, distillation_loss, itc_loss, itm_loss

B, K = 6, 5


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return plain.numbers(seed, *shape, dtype=dtype).requires_grad_()


LABELS = torch.tensor([0, 1, 4, 2, 2, 3])


def test_itm_is_the_cross_entropy_of_the_mean_over_queries():
    many, labels = logits(1, B, 3, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    shares = many.mean(1).log_softmax(1)
    expected = -sum(shares[i, label] for i, label in enumerate(labels)) / B
    torch.testing.assert_close(itm_loss(many, labels), expected)
    torch.testing.assert_close(itm_loss(many.mean(1), labels.int()), expected)
    assert itm_loss(many.bfloat16(), labels).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda x: itm_loss(x, labels), many)


def test_itc_is_the_contrast_of_the_nearest_query():
    x = plain.call(7, 5, 4)
    torch.testing.assert_close(itc_loss(x["x"], x["y"], x["logit_scale"]).double(), plain.truth(x)["loss"])
    with pytest.raises(ValueError, match="itc_loss: queries"):
        itc_loss(x["x"][:, 0], x["y"], 1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_hard_distillation(alpha):
    cls, student, teacher = (logits(i, B, K) for i in range(3))
    expected = (1 - alpha) * F.cross_entropy(cls, LABELS) + alpha * F.cross_entropy(student, teacher.argmax(1))
    loss = distillation_loss(cls, student, teacher, LABELS, alpha=alpha)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_soft_distillation(tau):
    """KL(teacher || student), not the other way around; tau^2 and the mean over samples."""
    cls, student, teacher = (logits(i, B, K) for i in range(3))
    p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
    expected = 0.7 * F.cross_entropy(cls, LABELS) + 0.3 * tau**2 * (p * (p / q).log()).sum() / B
    loss = distillation_loss(cls, student, teacher, LABELS.int(), mode="soft", alpha=0.3, tau=tau)
    torch.testing.assert_close(loss, expected.detach())
    assert torch.autograd.grad(loss, teacher, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.gradcheck(
        lambda a, b: distillation_loss(a, b, teacher, LABELS, "soft", 0.3, tau), (cls, student)
    )


def test_defaults_are_halves_and_losses_are_float32():
    cls, student, teacher = (logits(i, B, K, dtype=torch.float16) for i in range(3))
    loss = distillation_loss(cls, student, teacher, LABELS)
    expected = (F.cross_entropy(cls.float(), LABELS) + F.cross_entropy(student.float(), teacher.argmax(1))) / 2
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def outputs(grad: bool = True) -> dict:
    x = plain.call(B, 8)
    found = {"output": plain.numbers(4, B, K), "vision_embed": x["x"], "text_embed": x["y"],
             "itm_logits": plain.numbers(5, B, 2)}  # fmt: skip
    return {n: v.requires_grad_(grad) for n, v in found.items()}


def test_multi_task_is_the_weighted_sum():
    matches = torch.tensor([1, 0, 1, 1, 0, 0])
    loss, out = MultiTaskLoss(0.5, 2.0, 3.0), outputs()
    got = loss(out, LABELS, matches)
    assert set(got) == {"loss", "cls", "contrast", "aux"}
    wide = {n: v.double() for n, v in out.items()}
    torch.testing.assert_close(got["cls"].double(), F.cross_entropy(wide["output"], LABELS))
    torch.testing.assert_close(
        got["contrast"].double(), plain.formula(wide["vision_embed"], wide["text_embed"], 1 / 0.07)
    )
    torch.testing.assert_close(got["aux"].double(), F.cross_entropy(wide["itm_logits"], matches))
    torch.testing.assert_close(got["loss"], 0.5 * got["cls"] + 2.0 * got["contrast"] + 3.0 * got["aux"])
    got["loss"].backward()
    assert loss.logit_scale.grad != 0 and all(v.grad.isfinite().all() and v.grad.any() for v in out.values())


def test_multi_task_without_matching():
    loss, out = MultiTaskLoss(), outputs()
    got = loss({n: v for n, v in out.items() if n != "itm_logits"}, LABELS)
    assert got["aux"] == 0 and torch.equal(got["loss"], got["cls"] + got["contrast"])


def test_logit_scale_is_a_logarithm_that_stays_below_that_of_100():
    loss = MultiTaskLoss()
    assert [n for n, _ in loss.named_parameters()] == ["logit_scale"] == list(loss.state_dict())
    assert loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    with torch.no_grad():
        loss.logit_scale.fill_(9.0)
    x, most = outputs(), math.log(100.0)
    bounded = hivilt.losses.contrastive_loss(x["vision_embed"], x["text_embed"], 100.0)
    torch.testing.assert_close(loss.eval()(x, LABELS)["contrast"], bounded)
    assert loss.logit_scale.item() == 9.0, "evaluation writes nothing"
    loss.train()(x, LABELS)["loss"].backward()
    assert loss.logit_scale.item() == pytest.approx(most)
    assert loss.logit_scale.grad != 0, "the bound must not be a trap"


def test_multi_task_compiles_in_one_graph():
    torch._dynamo.reset()
    loss, out = MultiTaskLoss(), outputs()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(out, LABELS)["loss"], loss(out, LABELS)["loss"])


GOOD = {
    "itm_loss": (itm_loss, {"logits": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64)}),
    "distillation_loss": (
        distillation_loss,
        {n: torch.zeros(4, 3) for n in ("cls_logits", "distillation_logits", "teacher_logits")}
        | {"labels": torch.zeros(4, dtype=torch.int64)},
    ),
    "MultiTaskLoss": (MultiTaskLoss(), {"outputs": outputs(False), "labels": LABELS}),
    "MultiTaskLoss()": (MultiTaskLoss, {}),
}
WRONG = [
    ("itm_loss", "logits", torch.zeros(4, 3)), ("itm_loss", "logits", torch.zeros(4)), ("itm_loss", "logits", None),
    ("itm_loss", "logits", torch.zeros(0, 2)), ("itm_loss", "labels", torch.zeros(4)),
    ("itm_loss", "labels", torch.zeros(3, dtype=torch.int64)), ("itm_loss", "labels", [0, 1, 0, 1]),
    ("itm_loss", "labels", torch.tensor([0, 2, 1, 0])), ("itm_loss", "labels", torch.tensor([0, -100, 1, 0])),
    ("distillation_loss", "labels", torch.tensor([0, 1, 99, 0])), ("MultiTaskLoss", "labels", LABELS - 100),
    ("distillation_loss", "cls_logits", torch.zeros(4)),
    ("distillation_loss", "distillation_logits", torch.zeros(4, 2)),
    ("distillation_loss", "teacher_logits", None), ("distillation_loss", "labels", torch.zeros(4)),
    ("distillation_loss", "mode", "medium"), ("distillation_loss", "mode", None), ("distillation_loss", "alpha", 1.5),
    ("distillation_loss", "alpha", "x"), ("distillation_loss", "tau", 0.0), ("distillation_loss", "tau", float("nan")),
    ("MultiTaskLoss", "outputs", [1]), ("MultiTaskLoss", "outputs", {}), ("MultiTaskLoss", "labels", LABELS[:3]),
    ("MultiTaskLoss", "outputs", {**outputs(False), "text_embed": None}),
    ("MultiTaskLoss()", "lambda_cls", -1.0), ("MultiTaskLoss()", "lambda_aux", "x"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_malformed(case):
    name, argument, value = WRONG[case]
    function, good = GOOD[name]
    with pytest.raises(
        (ValueError, TypeError), match=rf"^{name.removesuffix('()')}: {argument}\b.*: expected .*; got "
    ):
        function(**good | {argument: value})
