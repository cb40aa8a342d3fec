"""Tuning is opt-in: it writes a file of the user's that lookups prefer, and nothing else reads or writes one."""

import json
import os
import warnings

import pytest
import torch

pytest.importorskip("triton")
import hivilt
from hivilt import tune
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
                    assert_legal(config)
    for (kernel, _), rows in configs.TILES.items():
        for dtype in configs.DTYPES:
            for channels in (1, 64, 65, 128):
                assert_legal(configs.tile("sm_90", kernel, dtype, channels))
        for tile in rows.values():
            assert_legal(tile)


def assert_legal(config):
    assert all(v in configs.LEGAL[name] or v == 0 for name, v in config._asdict().items())


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
        '{"sm_90": {"dense_forward/bfloat16/64": [0, 64, 8, 2]}}',
        '{"sm_90": {"other/bfloat16/64": [64, 64, 8, 2]}}',
        '{"sm_90": {"fusion/bfloat16/any": [64, 0, 32, 8, 2]}}',
        '{"sm_90": {"fusion/bfloat16/256": [64, 0, 8, 2]}}',
        '{"sm_90": {"fusion/bfloat16/256": [64, 0, 0, 8, 2]}}',
        '{"sm_90": {"rows_product/bfloat16/any": [64, 64, 48, 4, 3]}}',
    ],
)
def test_malformed_user_file_raises(text):
    with pytest.raises(ValueError, match=r"triton\.json"):
        configs.parse(text)


def test_malformed_user_file_breaks_no_call(own_cache):
    own_cache.parent.mkdir()
    own_cache.write_text('{"sm_90": {"fusion/bfloat16/256": [1, 2]}}')
    configs.forget()
    with pytest.warns(RuntimeWarning, match=r"ignored.*triton\.json.*\[1, 2\]"):
        found = configs.tile("sm_90", "fusion", "bfloat16", 192)
    assert found == configs.TILES["fusion", False][256]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert configs.lookup("sm_90", *KEY) == configs.TABLE["sm_90"][KEY]


def test_tiles_of_the_user_reach_the_half_types(own_cache):
    key, mine = ("fusion", "bfloat16", 256), configs.Tile(32, 0, 32, 8, 2)
    single = ("contrast", "float32", configs.ANY)
    own_cache.parent.mkdir()
    own_cache.write_text(configs.dump({"sm_90": {key: mine, single: configs.Tile(16, 64, 16, 4, 2)}}))
    configs.forget()
    shipped = configs.TILES["fusion", False]
    assert configs.tile("sm_90", "fusion", "bfloat16", 192) == configs.tile("sm_90", "fusion", "float16", 65) == mine
    assert configs.tile("sm_90", "fusion", "bfloat16", 64) == shipped[64]
    assert configs.tile("sm_80", "fusion", "bfloat16", 192) == shipped[256]
    assert configs.tile("sm_90", "fusion", "float32", 192) == configs.TILES["fusion", True][256]
    assert configs.tile("sm_90", "contrast", "float32", 3).rows == 16
    assert configs.tile("sm_90", "contrast", "bfloat16", 3) == configs.TILES["contrast", False][configs.ANY]


def test_tiles_of_the_user_that_triton_refuses_are_given_up(own_cache, monkeypatch):
    """A file may be of another version of Triton; whatever else goes wrong is raised as it is."""
    from triton.runtime.errors import OutOfResources

    from hivilt.ops._triton import guarded

    key, mine = ("rows_product", "float32", configs.ANY), configs.Tile(128, 128, 128, 4, 4)
    own_cache.parent.mkdir()
    own_cache.write_text(configs.dump({"sm_90": {key: mine}}))
    configs.forget()

    def run(fault: Exception) -> configs.Tile:
        tile = configs.tile("sm_90", "rows_product", "float32", 8)
        if tile == mine:
            raise fault
        return tile

    with pytest.raises(ValueError, match="of the caller"):
        guarded(run)(ValueError("of the caller"))
    with pytest.warns(RuntimeWarning, match=r"triton\.json are ignored: OutOfResources"):
        found = guarded(run)(OutOfResources(300000, 232448, "shared memory"))
    assert found == configs.TILES["rows_product", True][configs.ANY]
    monkeypatch.setitem(configs.TILES, ("rows_product", True), {configs.ANY: mine})
    configs.tile.cache_clear()
    with pytest.raises(OutOfResources):  # the shipped ones are refused too
        guarded(run)(OutOfResources(300000, 232448, "shared memory"))


def test_candidates_are_steps_around_the_shipped():
    shipped = configs.Tile(64, 0, 32, 8, 2)
    found = list(tune.candidates(shipped))
    assert found[0] == shipped and len(set(found)) == len(found) == 1 + 4 * 2 + 6 * 4
    for tile in found:
        assert tile.cols == 0 and sum(a != b for a, b in zip(tile, shipped, strict=True)) <= 2
        assert configs.parse(configs.dump({"sm_90": {("fusion", "bfloat16", 256): tile}}))


@pytest.mark.skipif(not (launch.INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize(
    "operation, shape, topk, dtype, kernels",
    [
        ("scale_fusion", (1, 20, 2, 4), None, "fp32", {"fusion", "finish_gradient", "interpolate", "rows_product",
                                                       "weight_gradient"}),
        ("interpolate_tokens", (1, 8, 2, 3), None, "bf16", {"interpolate"}),
        ("token_pool", (1, 7, 20), None, "fp32", {"token_scores", "pool", "score_gradient", "pool_gradient",
                                                  "weight_gradient"}),
        ("bank_retrieval", (9, 130, 16), 2, "bf16", {"bank_maxima"}),
        ("contrastive_loss", (5, 12), None, "fp32", {"contrast"}),
    ],
)  # fmt: skip
def test_tuning_knows_every_family(own_cache, operation, shape, topk, dtype, kernels):
    found = tune.tune(shape, topk, dtype, calls=1, steps=1, operation=operation)
    assert {key[0] for key in found} == kernels
    part, _ = launch.part_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    tune.save(part, {key: (best, 1.0, 2.0) for key, (best, *_) in found.items()})
    assert {configs.found(part, key) for key in found} == {best for best, *_ in found.values()}


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["scale_fusion", "--shape", "1,2,3"], "expected B,C,height,width"),
        (["bank_retrieval", "--shape", "1,two,3"], "expected B,M,C; got '1,two,3'"),
        (["contrastive_loss", "--shape", "0,8"], "each at least 1; got 0,8"),
        (["other"], "invalid choice"),
    ],
)
def test_malformed_arguments_are_named(capsys, arguments, text):
    if not (launch.INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU or Triton's interpreter")
    with pytest.raises(SystemExit, match="2"):
        tune.main(arguments)
    assert text in capsys.readouterr().err


@pytest.mark.skipif(not (launch.INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter")
def test_tuning_writes_what_is_faster(own_cache, monkeypatch):
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
