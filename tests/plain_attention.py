"""What tests of hivilt.nn.MultiheadAttention compare with: torch's module with the same weights, and top-k attention
written out in float64 from a module's weights."""

import copy
import math

import torch
from torch import nn

from hivilt.nn import MultiheadAttention

INF = float("inf")
B, L, S, E, H = 3, 9, 13, 32, 4

CONSTRUCTIONS = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "kdim-vdim": {"kdim": 20, "vdim": 28, "batch_first": True},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True, "batch_first": True},
    "all-extras": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 20, "vdim": 28},
}


def pair(dtype=torch.float32, **options) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same weights, biases not zero."""
    ours = MultiheadAttention(E, H, dtype=dtype, **options)
    torchs = nn.MultiheadAttention(
        E, H, dtype=dtype, **{k: v for k, v in options.items() if k not in ("topk", "axis", "select")}
    )
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "bias" in name:
                parameter.normal_()
    torchs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), torchs.eval()


def tokens(module, batch=B, queries=L, keys=S, dtype=torch.float32):
    x = [torch.randn(batch, n, c, dtype=dtype) for n, c in ((queries, E), (keys, module.kdim), (keys, module.vdim))]
    return x if module.batch_first else [t.transpose(0, 1).contiguous() for t in x]


def mask_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A random mask in torch's convention; no row ignores everything."""
    keep_one = torch.arange(shape[-1]) == 0
    ignore = (torch.rand(shape) < 0.4) & ~keep_one
    if kind == "bool":
        return ignore
    if kind == "infinite":
        return torch.where(ignore, -INF, torch.randn(shape))
    return torch.randn(shape)


def close(a, b, dtype=torch.float32):
    """Within the rounding of a few float operations on numbers of size one to ten."""
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def plain_topk(module, query, key, value, topk, axis="keys", select="scores", keep=None, bias=None):
    """Top-k attention written out in float64 from the module's weights; keep, bias broadcast to [B, H, L, S']."""
    m = copy.deepcopy(module).double()
    q, k, v = ((x if m.batch_first else x.transpose(0, 1)).double() for x in (query, key, value))
    raw_q, raw_k = q, k
    E = m.embed_dim
    weights = (
        m.in_proj_weight.chunk(3)
        if m.in_proj_weight is not None
        else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    )
    q, k, v = (x @ w.mT for x, w in zip((q, k, v), weights, strict=True))
    if m.in_proj_bias is not None:
        q, k, v = (x + b for x, b in zip((q, k, v), m.in_proj_bias.chunk(3), strict=True))
    more = 0
    if m.bias_k is not None:
        k, v, more = (
            torch.cat([k, m.bias_k.expand(len(k), 1, E)], 1),
            torch.cat([v, m.bias_v.expand(len(v), 1, E)], 1),
            1,
        )
        raw_k = torch.cat([raw_k, m.bias_k.expand(len(k), 1, E)], 1) if select == "raw" else raw_k
    if m.add_zero_attn:
        k, v, raw_k, more = (*(nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v, raw_k)), more + 1)
    q, k, v = (x.unflatten(-1, (m.num_heads, m.head_dim)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(m.head_dim)
    if bias is not None:
        scores = scores + nn.functional.pad(bias.double(), (0, more))
    valid = (
        torch.ones_like(scores, dtype=torch.bool)
        if keep is None
        else nn.functional.pad(keep, (0, more), value=True).expand_as(scores)
    )
    valid = valid & (scores != -INF)
    rated = (raw_q @ raw_k.mT)[:, None].expand_as(scores) if select == "raw" else scores
    dim = -1 if axis == "keys" else -2
    rated = rated.masked_fill(~valid, -INF)
    best = rated.sort(stable=True, dim=dim, descending=True).indices.narrow(dim, 0, min(topk, rated.shape[dim]))
    kept = torch.zeros_like(valid).scatter_(dim, best, True) & valid
    p = torch.where(kept.any(-1, keepdim=True), scores.masked_fill(~kept, -INF).softmax(-1).nan_to_num(0.0), 0.0)
    out = (p @ v).transpose(1, 2).flatten(2) @ m.out_proj.weight.mT
    if m.out_proj.bias is not None:
        out = out + m.out_proj.bias
    return (out if m.batch_first else out.transpose(0, 1)), p
