"""Tuning is opt-in: it writes a file of the user's that lookups prefer, and nothing else reads or writes one."""

import json
import os

import pytest
import torch

pytest.importorskip("triton")
import hivilt
from hivilt.triton_kernels import configs, launch

KEY = ("dense_forward", "bfloat16", 64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configs.forget()
    yield tmp_path / "hivilt" / "triton.json"
    configs.forget()


def test_every_kernel_has_a_configuration_on_every_part():
    for part in (*configs.LIMITS, "sm_89", "sm_103", "sm_120", "gfx950"):
        for kernel in configs.KERNELS:
            for dtype in configs.DTYPES:
                for width in (1, 64, 65, 128, 200, 256):
                    config = configs.lookup(part, kernel, dtype, width)
                    assert all(v in legal or v == 0 for v, legal in zip(config, configs.LEGAL.values(), strict=True))


def test_user_file_is_preferred_and_undone_by_deleting_it(own_cache):
    shipped = configs.lookup("sm_90", *KEY)
    mine = configs.Config(32, 32, 4, 1)
    own_cache.parent.mkdir()
    own_cache.write_text(configs.dump({"sm_90": {KEY: mine}}))
    configs.forget()
    assert configs.lookup("sm_90", *KEY) == mine and configs.lookup("sm_80", *KEY) == shipped
    own_cache.unlink()
    configs.forget()
    assert configs.lookup("sm_90", *KEY) == shipped


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"sm_90": 3}',
        '{"sm_90": {"dense_forward": [64, 64, 8, 2]}}',
        '{"sm_90": {"dense_forward/bfloat16/64": [64, 64, 8]}}',
        '{"sm_90": {"dense_forward/bfloat16/64": [65, 64, 8, 2]}}',
        '{"sm_90": {"dense_forward/bfloat16/64": [64, 64, true, 2]}}',
        '{"sm_90": {"other/bfloat16/64": [64, 64, 8, 2]}}',
    ],
)
def test_malformed_user_file_raises(text):
    with pytest.raises(ValueError, match=r"triton\.json"):
        configs.parse(text)


@pytest.mark.skipif(not (launch.INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
def test_tuning_writes_what_is_faster(own_cache, monkeypatch):
    from hivilt import tune

    found = tune.tune((1, 1, 40, 48, 16), 5, "bf16", calls=1, steps=2)
    assert {key[0] for key in found} >= {"dense_query_gradient", "dense_key_gradient"}
    part, _ = launch.part_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    best = configs.Config(32, 32, 4, 1)
    tune.save(part, {KEY: (best, 1.0, 2.0), ("delta", "bfloat16", 64): (configs.Config(32, 0, 4, 1), 1.0, 1.0)})
    assert list(json.loads(own_cache.read_text())[part]) == ["dense_forward/bfloat16/64"]
    assert configs.lookup(part, *KEY) == best
    assert os.listdir(own_cache.parent) == ["triton.json"]


def test_shipped_table_is_not_touched_by_calls(own_cache):
    x = torch.randn(1, 1, 8, 8)
    hivilt.ops.topk_attention(x, x, x, 2)
    assert not own_cache.exists()
