"""hivilt.accelerate and hivilt.restore: what is swapped, what is left alone and why, and that nothing else changes."""

import copy

import pytest
import torch
from torch import nn

import hivilt

E, H = 32, 4


class CrossModal(nn.Module):
    """Two attentions of which one is shared, one of torch's own layers, and a list."""

    def __init__(self):
        super().__init__()
        self.text_to_image = nn.MultiheadAttention(E, H, batch_first=True)
        self.image_to_text = nn.MultiheadAttention(E, H, kdim=E, vdim=20, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(E, H, 64, batch_first=True, dropout=0.0)
        self.blocks = nn.ModuleList([nn.MultiheadAttention(E, H, batch_first=True), self.text_to_image])
        self.head = nn.Linear(E, 5)

    def forward(self, text, image):
        text = text + self.text_to_image(text, image, image, need_weights=False)[0]
        image = image + self.image_to_text(image, text, text[..., :20], need_weights=False)[0]
        image = self.encoder(image)
        for block in self.blocks:
            text = text + block(text, image, image, need_weights=False)[0]
        return self.head(text.mean(1))


PATHS = ["text_to_image", "image_to_text", "encoder.self_attn", "blocks.0"]


def inputs(dtype=torch.float32):
    return torch.randn(3, 7, E, dtype=dtype), torch.randn(3, 15, E, dtype=dtype)


def paths(entries):
    return [entry.path for entry in entries]


def attentions(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}


def test_every_plain_attention_is_swapped_in_place():
    model = CrossModal()
    before = {path: (id(m), [id(p) for p in m.parameters()]) for path, m in attentions(model).items()}
    state = copy.deepcopy(model.state_dict())
    report = hivilt.accelerate(model)
    assert paths(report.replaced) == PATHS and report.skipped == []
    assert all(type(m) is hivilt.nn.MultiheadAttention for m in attentions(model).values())
    assert before == {path: (id(m), [id(p) for p in m.parameters()]) for path, m in attentions(model).items()}
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    CrossModal().load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(CrossModal().state_dict(), strict=True)


def test_restore_undoes_it_exactly():
    model = CrossModal()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    hivilt.accelerate(model, topk=4, axis="queries", select="raw")
    assert model.text_to_image.topk == 4 and model.text_to_image.select == "raw"
    assert hivilt.restore(model) == PATHS
    after = [(type(m), dict(m.__dict__)) for m in model.modules()]
    for (kind, old), (same, new) in zip(before, after, strict=True):
        assert kind is same and list(old) == list(new) and all(old[name] is new[name] for name in old)
    assert hivilt.restore(model) == []


def test_the_numbers_stay():
    model, x = CrossModal().eval(), inputs()
    expected = model(*x)
    hivilt.accelerate(model)
    torch.testing.assert_close(model(*x), expected, rtol=1e-5, atol=1e-5)
    assert hivilt.last_backend() is not None
    with torch.no_grad():
        torch.testing.assert_close(model(*x), expected, rtol=1e-5, atol=1e-5)
    hivilt.restore(model)
    assert torch.equal(model(*x), expected)


def test_a_training_step_is_as_exact_as_torch():
    """Gradients of the float32 model, before and after, against those of the float64 model."""
    model, target = CrossModal(), torch.randint(5, (3,))
    text, image = inputs()

    def gradients(m, dtype):
        m.zero_grad()
        nn.functional.cross_entropy(m(text.to(dtype), image.to(dtype)), target).backward()
        return [p.grad.double() for p in m.parameters()]

    truth = gradients(copy.deepcopy(model).double(), torch.float64)
    plain = gradients(model, torch.float32)
    hivilt.accelerate(model)
    ours = gradients(model, torch.float32)
    scale = [t.abs().amax() for t in truth]
    error = [max(float((g - t).abs().max() / s) for g, t, s in zip(x, truth, scale, strict=True) if s > 1e-12)
             for x in (plain, ours)]  # fmt: skip
    assert 0 < error[1] <= 2 * error[0] + 1e-7, error


def test_an_optimizer_keeps_training_the_same_parameters():
    model, x = CrossModal(), inputs()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    hivilt.accelerate(model, topk=5)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(*x), torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_root_may_be_the_attention():
    module = nn.MultiheadAttention(E, H)
    report = hivilt.accelerate(module, topk=3)
    assert paths(report.replaced) == [""] and type(module) is hivilt.nn.MultiheadAttention
    assert "(the model itself)" in str(report)
    hivilt.restore(module)
    assert type(module) is nn.MultiheadAttention and "topk" not in module.__dict__


def test_a_second_call_changes_nothing_and_says_so():
    model = CrossModal()
    hivilt.accelerate(model, topk=4)
    report = hivilt.accelerate(model, topk=9)
    assert report.replaced == [] and paths(report.skipped) == PATHS
    assert all("already accelerated (topk=4)" in entry.reason for entry in report.skipped)
    assert model.text_to_image.topk == 4


def test_a_copy_can_be_used_and_restored():
    model, x = CrossModal().eval(), inputs()
    hivilt.accelerate(model, topk=4)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*x), model(*x))
    assert hivilt.restore(twin) == PATHS
    assert type(model.text_to_image) is hivilt.nn.MultiheadAttention
    assert type(twin.text_to_image) is nn.MultiheadAttention


def test_modules_built_by_the_user_are_not_restored():
    model = nn.ModuleList([hivilt.nn.MultiheadAttention(E, H, topk=3), nn.MultiheadAttention(E, H)])
    report = hivilt.accelerate(model)
    assert [entry.reason for entry in report.skipped] == ["already a hivilt module"]
    assert hivilt.restore(model) == ["1"]
    assert type(model[0]) is hivilt.nn.MultiheadAttention and model[0].topk == 3


def test_hooks_fire():
    model, fired = CrossModal(), []
    attention = model.text_to_image
    attention.register_forward_pre_hook(lambda *_: fired.append("pre"))
    attention.register_forward_hook(lambda *_: fired.append("post"))
    attention.register_full_backward_hook(lambda *_: fired.append("backward"))
    attention.in_proj_weight.register_hook(lambda grad: fired.append("grad"))
    hivilt.accelerate(model, topk=3)
    text, image = inputs()
    model(text.requires_grad_(), image).sum().backward()
    assert fired.count("pre") == fired.count("post") == fired.count("backward") == 2 and "grad" in fired


# What is left alone.


class Subclass(nn.MultiheadAttention):
    pass


def replaced_forward(module):
    module.forward = lambda *args, **kwargs: args[0]


def hooked_out_proj(module):
    module.out_proj.register_forward_hook(lambda *_: None)


def pre_hooked_out_proj(module):
    module.out_proj.register_forward_pre_hook(lambda *_: None)


def other_out_proj(module):
    module.out_proj = nn.Sequential(module.out_proj)


def replaced_out_proj_forward(module):
    module.out_proj.forward = lambda x: x


def parametrized(module):
    nn.utils.parametrizations.orthogonal(module, "in_proj_weight")


def parametrized_out_proj(module):
    nn.utils.parametrizations.weight_norm(module.out_proj)


class Marked(torch.Tensor):
    pass


def subclassed_weight(module):
    module.in_proj_weight = nn.Parameter(module.in_proj_weight.detach().as_subclass(Marked))


CHANGES = {
    replaced_forward: "forward was replaced",
    hooked_out_proj: "out_proj carries hooks",
    pre_hooked_out_proj: "out_proj carries hooks",
    other_out_proj: "out_proj was replaced by a Sequential",
    replaced_out_proj_forward: "forward of out_proj",
    parametrized: "parametrized",
    parametrized_out_proj: "out_proj is parametrized",
    subclassed_weight: "in_proj_weight is a Marked",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_module_is_skipped(change):
    model = nn.ModuleDict({"changed": nn.MultiheadAttention(E, H), "plain": nn.MultiheadAttention(E, H)})
    change(model["changed"])
    kind = type(model["changed"])
    report = hivilt.accelerate(model, topk=3)
    assert paths(report.replaced) == ["plain"] and paths(report.skipped) == ["changed"]
    assert CHANGES[change] in report.skipped[0].reason
    assert type(model["changed"]) is kind and "topk" not in model["changed"].__dict__
    hivilt.restore(model)
    assert type(model["changed"]) is kind


def test_subclasses_and_scripts_are_skipped():
    model = nn.ModuleDict(
        {
            "subclass": Subclass(E, H),
            "quantizable": torch.ao.nn.quantizable.MultiheadAttention(E, H),
            "script": torch.jit.script(nn.MultiheadAttention(E, H)),
        }
    )
    kinds = [type(m) for m in model.values()]
    report = hivilt.accelerate(model)
    reasons = {entry.path: (entry.kind, entry.reason) for entry in report.skipped}
    assert set(reasons) == {"subclass", "quantizable", "script"} and report.replaced == []
    assert "subclass" in reasons["subclass"][1] and "Subclass" in reasons["subclass"][0]
    assert "subclass" in reasons["quantizable"][1] and "torch.jit.script" in reasons["script"][1]
    assert kinds == [type(m) for m in model.values()]


def test_raw_selection_skips_keys_of_another_width():
    model = nn.ModuleDict({"wide": nn.MultiheadAttention(E, H, kdim=20), "same": nn.MultiheadAttention(E, H)})
    report = hivilt.accelerate(model, topk=3, select="raw")
    assert paths(report.replaced) == ["same"]
    assert "embed_dim is 32 and kdim 20" in report.skipped[0].reason


def test_filter_and_topk_by_path():
    model = CrossModal()
    report = hivilt.accelerate(model, topk={"blocks.0": 3, "blocks.1": 5}, filter=lambda path, _: "encoder" not in path)
    assert [(e.path, e.reason) for e in report.skipped] == [("encoder.self_attn", "left out by filter")]
    assert [model.text_to_image.topk, model.image_to_text.topk, model.blocks[0].topk] == [5, None, 3]
    hivilt.restore(model)
    hivilt.accelerate(model, topk=lambda path, module: 2 if module.vdim == 20 else None)
    assert [model.text_to_image.topk, model.image_to_text.topk] == [None, 2]


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"topk": 0}, ValueError, "topk: expected at least 1; got 0"),
        ({"topk": 2.0}, TypeError, "topk"),
        ({"topk": True}, TypeError, "topk"),
        ({"axis": "rows"}, ValueError, "axis: expected 'keys' or 'queries'; got 'rows'"),
        ({"select": "best"}, ValueError, "select"),
        ({"filter": "encoder"}, TypeError, "filter"),
        ({"topk": {"blocks.0": 3, "nowhere": 3}}, ValueError, "nowhere"),
        ({"topk": {"blocks.0": 0}}, ValueError, "blocks.0: topk"),
        ({"topk": lambda path, _: -1 if path == "blocks.0" else 3}, ValueError, "blocks.0: topk"),
    ],
    ids=lambda x: str(x).split(" at 0x")[0][:40] if not isinstance(x, type) else None,  # the same in every process
)
def test_a_bad_option_raises_before_anything_changes(options, kind, text):
    model = CrossModal()
    with pytest.raises(kind, match=text):
        hivilt.accelerate(model, **options)
    assert all(type(m) is nn.MultiheadAttention and "topk" not in m.__dict__ for m in attentions(model).values())


def test_only_modules_are_taken():
    for function in (hivilt.accelerate, hivilt.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module; got a list"):
            function([nn.MultiheadAttention(E, H)])


# The report.


def test_the_report_reads_as_a_table():
    model = CrossModal()
    hooked_out_proj(model.blocks[0])
    report = hivilt.accelerate(model, topk=4)
    assert isinstance(report, hivilt.Report)
    lines = str(report).splitlines()
    assert lines[0] == "hivilt.accelerate: 3 replaced, 1 skipped"
    assert any(x.split()[:2] == ["text_to_image", "replaced"] and "shared with blocks.1" in x for x in lines)
    assert any(x.split()[:2] == ["blocks.0", "skipped"] and "hooks" in x for x in lines)
    assert all(entry.kind == "torch.nn.MultiheadAttention" for entry in report.replaced + report.skipped)
    assert any("need_weights=True" in note for note in report.notes) and "need_weights=True" in str(report)
    assert all(len(line) <= 140 for line in lines)


def test_the_report_of_a_model_without_attention():
    report = hivilt.accelerate(nn.Linear(2, 2))
    assert report.replaced == report.skipped == [] and "no torch.nn.MultiheadAttention" in str(report)


def test_the_report_warns_of_torchs_own_layer():
    dense = hivilt.accelerate(CrossModal())
    sparse = hivilt.accelerate(CrossModal(), topk=3)
    assert any("TransformerEncoderLayer" in note for note in dense.notes)
    assert not any("TransformerEncoderLayer" in note for note in sparse.notes)


def test_compiled_and_wrapped_models():
    model, x = CrossModal().eval(), inputs()
    expected = model(*x)
    wrapped = torch.compile(model, backend="eager")
    torch.testing.assert_close(wrapped(*x), expected)
    report = hivilt.accelerate(wrapped, topk=3)
    assert paths(report.replaced)[0] == "_orig_mod.text_to_image"
    torch.testing.assert_close(wrapped(*x), model(*x))
    assert (wrapped(*x) - expected).abs().max() > 1e-3
    hivilt.restore(wrapped)
    torch.testing.assert_close(wrapped(*x), expected)
