"""Every layout of every argument, the upstream gradient included, gives the bits of the contiguous call."""

import pytest
import torch
from guard_pages import survives

import hivilt
import hivilt.testing as t

op = hivilt.ops.topk_attention
SHAPES = {"odd": (2, 4, 2, 9, 13, 7, 5), "ones": (1, 2, 1, 1, 33, 16, 16), "tile": (2, 2, 2, 17, 32, 8, 8)}
ARGUMENTS = [
    "query",
    "key",
    "value",
    "attn_mask",
    "key_mask",
    "query_mask",
    "select_query",
    "select_key",
    "grad_out",
    "grad_lse",
]


def run(x: dict, backend: str) -> list[torch.Tensor]:
    x = dict(x)
    upstream = [x.pop("grad_out"), x.pop("grad_lse")]
    x = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
    floats = ("query", "key", "value", "attn_mask")
    leaves = [x[n].requires_grad_() for n in floats if n in x and x[n].is_floating_point()]
    out, lse, *rest = op(**x, return_lse=True, return_indices=x["topk"] is not None, backend=backend)
    return [out, lse, *rest, *torch.autograd.grad([out, lse], leaves, upstream)]


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("topk, axis, select", [(None, "keys", 0), (4, "keys", 0), (3, "queries", 0), (4, "keys", 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_sweep(where, shape, topk, axis, select, dtype):
    backend, device = where
    sizes = SHAPES[shape]
    B, H, _, Q, N, _, E = sizes
    for mask in ("float", "bool"):
        x = t.case(2, dtype, shape=sizes, topk=topk, axis=axis, select=select, mask=mask, scale=None, fill="normal",
                   mask_shape=(B, 1 if select else H, Q, N), key_mask=True, query_mask=True,
                   layout=("contiguous",) * 3).inputs(device)  # fmt: skip
        x |= {"grad_out": torch.randn(B, H, Q, E).to(device, dtype), "grad_lse": torch.randn(B, H, Q, device=device)}
        plain = run(x, backend)
        for name in ARGUMENTS if mask == "float" else ["attn_mask"]:
            for layout, view in t.layouts(x[name]) if name in x else ():
                same = torch.equal(view, x[name])
                want = plain if same else run(x | {name: view.clone(memory_format=torch.contiguous_format)}, backend)
                for a, b in zip(run(x | {name: view}, backend), want, strict=True):
                    assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"{name} as {layout}: strides {view.stride()}"


def test_all_arguments_at_once(where):
    """Every argument in a different strange layout."""
    backend, device = where
    names = list(t.LAYOUTS)
    for case in t.cases(60, seed=12):
        x = case.inputs(device)
        B, H, _, Q, _, _, E = case.shape
        x |= {"grad_out": torch.randn(B, H, Q, E, device=device), "grad_lse": torch.randn(B, H, Q, device=device)}
        strange = {
            n: t.relayout(v, names[(case.seed * 7 + 5 * i) % len(names)]) if isinstance(v, torch.Tensor) else v
            for i, (n, v) in enumerate(x.items())
        }
        plain = {
            n: v.clone(memory_format=torch.contiguous_format) if isinstance(v, torch.Tensor) else v
            for n, v in strange.items()
        }
        for a, b in zip(run(strange, backend), run(plain, backend), strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), str(case)


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_broadcast_upstream_gradient(where, axis):
    """sum() hands back a gradient of stride 0 in every dimension."""
    backend, device = where
    for topk in (None, 3):
        x = t.case(2, torch.float32, shape=SHAPES["odd"], topk=topk, axis=axis, mask="", select=0).inputs(device)
        leaves = [x[n].requires_grad_() for n in ("query", "key", "value")]
        by_sum = torch.autograd.grad(op(**x, backend=backend).sum(), leaves)
        out = op(**x, backend=backend)
        by_ones = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert all(torch.equal(a, b) for a, b in zip(by_sum, by_ones, strict=True))


def test_output_layout_is_token_major(where):
    """Heads lie beside each other per token, so merging them after attention costs nothing."""
    backend, device = where
    for topk, axis in ((None, "keys"), (3, "keys"), (3, "queries")):
        x = t.case(2, torch.float32, shape=SHAPES["odd"], topk=topk, axis=axis, mask="", select=0).inputs(device)
        out = op(**x, backend=backend)
        assert out.transpose(1, 2).is_contiguous()


def test_result_shares_no_memory(where):
    """Outputs never alias inputs or each other, not even when attention is the identity."""
    backend, device = where
    for topk in (None, 1):
        q = torch.ones(1, 1, 1, 4, device=device)
        out, lse = op(q, q, q, topk, return_lse=True, backend=backend)
        assert len({x.untyped_storage().data_ptr() for x in (q, out, lse)}) == 3
        assert torch.equal(out, q)


GUARDED = """
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case in t.cases(70, dtype, seed=21):
        x = guard(case.inputs())
        leaves = [x[n].requires_grad_() for n in ("query", "key", "value")]
        out, lse = hivilt.ops.topk_attention(**x, return_lse=True, backend=backend)
        grads = [t.guarded(torch.randn_like(out), at), t.guarded(torch.randn_like(lse), at)]
        torch.autograd.grad([out, lse], leaves, grads)
        if case.topk is not None:
            x.pop("value")
            x = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
            indices = hivilt.ops.topk_select(**x, backend=backend)
            y = {n: x[n] for n in ("query", "key", "axis")} | {"value": leaves[2].detach()}
            hivilt.ops.selected_attention(**y, indices=t.guarded(indices, at), backend=backend)
        count += 1
"""


@pytest.mark.kernels
@pytest.mark.parametrize("at", ["end", "start"])
def test_nothing_is_read_outside_a_tensor(where, at):
    """Each input ends at (then starts at) a page that faults when touched; 210 cases, forward and backward."""
    survives(GUARDED, 210, where, at)
