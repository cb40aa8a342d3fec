"""Window attention and Swin's block against attention over the whole image under a mask, written out token by token."""

import pytest
import torch
from multi_scale import as_exact
from parity import check_twins, twins, wide
from torch import nn

import hivilt
from hivilt.reference import modules as plain

C, H = 12, 3
CASES = {
    "fits": ((8, 12), 4, 0),
    "shifted": ((8, 12), 4, 2),
    "padded": ((10, 7), 4, 0),
    "padded-shifted": ((10, 7), 4, 1),
    "wide-window": ((6, 10), (2, 5), (1, 2)),
    "window-as-high": ((4, 9), 4, 2),  # shifts along one axis only
    "small-grid": ((3, 2), 5, 2),
    "one-token": ((1, 1), 4, 3),
    "window-of-one": ((2, 3), 1, 0),
}


def by_hand(module, x, grid, shift):
    """Each token over all tokens of the padded image, in float64: allowed are those of the same window and side."""
    (height, width), (m_h, m_w) = grid, module.window_size
    shift = (shift, shift) if isinstance(shift, int) else shift
    shift = [0 if n <= m else s for s, n, m in zip(shift, grid, (m_h, m_w), strict=True)]
    w_h, w_w = min(m_h, height), min(m_w, width)
    p_h, p_w = -(-height // w_h) * w_h, -(-width // w_w) * w_w
    image = x.new_zeros(x.shape[0], p_h, p_w, C)
    image[:, :height, :width] = x.unflatten(1, grid)
    q, k, v = nn.functional.linear(image, module.qkv.weight, module.qkv.bias).chunk(3, -1)
    places = [(r, c) for r in range(p_h) for c in range(p_w)]

    def side(place):
        """Window, and whether the token came around the edge."""
        rolled = [(place[0] - shift[0]) % p_h, (place[1] - shift[1]) % p_w]
        return rolled[0] // w_h, rolled[1] // w_w, place[0] < shift[0], place[1] < shift[1]

    table = module.relative_position_bias_table
    out = torch.zeros(x.shape[0], height, width, C, dtype=x.dtype)
    for r in range(height):
        for c in range(width):
            rolled = ((r - shift[0]) % p_h, (c - shift[1]) % p_w)
            seen = [(a, b) for a, b in places if side((a, b)) == side((r, c))]
            for h in range(H):
                part = slice(h * C // H, (h + 1) * C // H)
                scores = []
                for a, b in seen:
                    other = ((a - shift[0]) % p_h, (b - shift[1]) % p_w)
                    row = (rolled[0] - other[0] + m_h - 1) * (2 * m_w - 1) + rolled[1] - other[1] + m_w - 1
                    product = (q[:, r, c, part] * k[:, a, b, part]).sum(-1) * (C // H) ** -0.5
                    scores.append(product + table[row, h])
                weights = torch.stack(scores, -1).softmax(-1)
                values = torch.stack([v[:, a, b, part] for a, b in seen], 1)
                out[:, r, c, part] = torch.einsum("bn,bnd->bd", weights, values)
    return nn.functional.linear(out.flatten(1, 2), module.proj.weight, module.proj.bias)


@pytest.mark.parametrize("case", CASES)
def test_equals_attention_written_out(case):
    grid, window, shift = CASES[case]
    reference, ours = twins(plain.WindowAttention, hivilt.nn.WindowAttention, C, H, window)
    nn.init.normal_(reference.relative_position_bias_table)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, grid[0] * grid[1], C)
    truth = by_hand(reference.double(), x.double(), grid, shift)
    torch.testing.assert_close(reference(x.double(), grid, shift), truth, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        as_exact(ours(x, grid, shift), reference.float()(x, grid, shift), truth)


@pytest.mark.parametrize("case", ["shifted", "padded-shifted", "small-grid"])
def test_the_twin_has_the_same_gradients(case):
    grid, window, shift = CASES[case]
    modules = twins(plain.WindowAttention, hivilt.nn.WindowAttention, C, H, window)
    check_twins(*modules, lambda m, x: m(x, grid, shift), [torch.randn(3, grid[0] * grid[1], C)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    """Within the error of the plain module in that type, and a rounding."""
    reference, ours = twins(plain.WindowAttention, hivilt.nn.WindowAttention, 64, 2, 4)
    x = torch.randn(2, 80, 64).to(dtype)
    reference, ours = reference.to(dtype), ours.to(dtype)
    with torch.no_grad():
        theirs, out = reference(x, (8, 10), 2), ours(x, (8, 10), 2)
        as_exact(out, theirs, reference.double()(wide(x), (8, 10), 2))


def test_images_are_independent():
    module = hivilt.nn.WindowAttention(C, H, 4).eval()
    x = torch.randn(3, 70, C)
    with torch.no_grad():
        alone = torch.cat([module(row[None], (10, 7), 2) for row in x])
        torch.testing.assert_close(module(x, (10, 7), 2), alone, rtol=1e-5, atol=1e-6)
        x[1] = torch.nan
        out = module(x, (10, 7), 2)
    torch.testing.assert_close(out[[0, 2]], alone[[0, 2]], rtol=1e-5, atol=1e-6)
    assert out[1].isnan().all()


def test_dropout_acts_in_training_alone():
    for cls in (plain.WindowAttention, hivilt.nn.WindowAttention):
        module, x = cls(C, H, 4, attn_drop=0.5), torch.randn(1, 64, C)
        assert not torch.equal(module(x, (8, 8)), module(x, (8, 8)))
        module.eval()
        assert torch.equal(module(x, (8, 8)), module(x, (8, 8)))


def test_swin_block():
    """The block's two lines, with a window attention that was tested above; nothing shifts on a small grid."""
    reference, ours = twins(plain.SwinBlock, hivilt.nn.SwinBlock, C, H, 4, 2)
    for grid, shift in (((8, 6), 2), ((4, 9), 0)):
        x = torch.randn(2, grid[0] * grid[1], C)
        y = x + reference.attn(reference.norm1(x), grid, shift)
        y = y + reference.mlp.fc2(nn.functional.gelu(reference.mlp.fc1(reference.norm2(y))))
        torch.testing.assert_close(reference(x, grid), y)
    check_twins(reference, ours, lambda m, x: m(x, (10, 9)), [torch.randn(2, 90, C)])


def test_names_are_timms():
    assert list(plain.WindowAttention(C, H).state_dict()) == [
        "relative_position_bias_table", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias",
    ]  # fmt: skip
    assert plain.WindowAttention(C, H, 7).relative_position_bias_table.shape == (169, H)
    assert set(hivilt.nn.SwinBlock(C, H).state_dict()) == {
        *(f"{part}.{x}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
          for x in ("weight", "bias")), "attn.relative_position_bias_table",
    }  # fmt: skip


def test_accelerate_swaps_it_and_restore_undoes_it():
    block, x = plain.SwinBlock(C, H, 4, 2).eval(), torch.randn(1, 70, C)
    expected = block(x, (10, 7))
    report = hivilt.accelerate(block)
    assert [entry.path for entry in report.replaced] == ["attn"]
    assert type(block.attn) is hivilt.nn.WindowAttention
    torch.testing.assert_close(block(x, (10, 7)), expected, rtol=1e-5, atol=1e-6)
    hivilt.restore(block)
    assert type(block.attn) is plain.WindowAttention and torch.equal(block(x, (10, 7)), expected)


def test_compiles_without_a_break():
    block = hivilt.nn.SwinBlock(C, H, 4, 2).eval()
    x = torch.randn(2, 70, C)
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x, (10, 7)), block(x, (10, 7)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call, argument, kind", [
    (lambda m: m(torch.randn(2, 64, C + 1), (8, 8)), "x", ValueError),
    (lambda m: m(torch.randn(64, C), (8, 8)), "x", ValueError),
    (lambda m: m(None, (8, 8)), "x", TypeError),
    (lambda m: m(torch.randn(2, 64, C), (8, 7)), "x", ValueError),
    (lambda m: m(torch.randn(2, 64, C), (8, 8, 1)), "grid", ValueError),
    (lambda m: m(torch.randn(2, 64, C), 8), "grid", TypeError),
    (lambda m: m(torch.randn(2, 64, C), (8, 8), 4), "shift", ValueError),
    (lambda m: m(torch.randn(2, 64, C), (8, 8), -1), "shift", ValueError),
    (lambda m: m(torch.randn(2, 64, C), (8, 8), 1.0), "shift", TypeError),
    (lambda m: m(torch.randn(2, 64, C), (8, 8), True), "shift", TypeError),
    (lambda m: m(torch.randn(2, 64, C), (8, 8), (1, "2")), "shift", TypeError),
    (lambda m: type(m)(C, 5), "num_heads", ValueError),
    (lambda m: type(m)(C, H, 0), "window_size", ValueError),
    (lambda m: type(m)(C, H, (4, 4, 4)), "window_size", ValueError),
    (lambda m: type(m)(C, H, 4, attn_drop=2.0), "dropout", ValueError),
])  # fmt: skip
def test_bad_arguments(call, argument, kind):
    for cls in (plain.WindowAttention, hivilt.nn.WindowAttention):
        with pytest.raises(kind, match=rf"WindowAttention: {argument}: expected .*; got "):
            call(cls(C, H, 4))
