"""torch.nn.MultiheadAttention that may keep only the best keys, in plain PyTorch: dense with topk=None, else
hivilt.reference.topk_attention between the projections.

Parameters, initialisation and state_dict are torch's by inheritance.  Masks keep torch's convention here (True =
ignore) and are inverted once, never expanded to L x S copies.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..topk_attention import allowed, pairs, topk_attention
from ._checks import check_dropout, check_size, refuse
from ._inner import Inner, why_changed

INF = float("inf")
AXES = ("keys", "queries")
SELECT = ("scores", "raw")
NAME = "MultiheadAttention"
LINEARS = torch.nn.modules.linear.NonDynamicallyQuantizableLinear, torch.nn.Linear  # what out_proj is built as


def check_options(topk: Any, axis: Any, select: Any, where: str = NAME) -> None:
    """Raises ValueError or TypeError, naming the option, unless all three are legal."""
    if topk is not None:
        if isinstance(topk, bool | Tensor) or not hasattr(topk, "__index__"):
            refuse(TypeError, where, "topk", "an int of at least 1 or None", topk)
        if operator.index(topk) < 1:
            refuse(ValueError, where, "topk", "at least 1", topk)
    for name, x, legal in (("axis", axis, AXES), ("select", select, SELECT)):
        if not isinstance(x, str):
            refuse(TypeError, where, name, " or ".join(map(repr, legal)), x)
        if x not in legal:
            refuse(ValueError, where, name, " or ".join(map(repr, legal)), x)


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention in which a query may keep only its ``topk`` best keys.

    Args:
        embed_dim ... dtype: as in torch.nn.MultiheadAttention, same defaults.
        topk: how many to keep; None is dense attention with torch's own results, errors and mask rules.
        axis: "keys": each query keeps its best keys.  "queries": each key keeps its best queries, and a query may
            keep none; its output is then ``out_proj.bias``, as for a query whose keys are all masked.
        select: "scores": by the attention scores, head by head.  "raw": by the dot products of the unprojected query
            and key, one set for all heads; needs kdim == embed_dim and masks without a head axis.  Keys that
            ``add_bias_kv`` appends are then rated by ``bias_k`` itself.

    Keys that ``add_bias_kv`` and ``add_zero_attn`` append compete like any other and are never masked.
    """

    # Defaults on the class, so that an instance of torch.nn.MultiheadAttention becomes one of ours by its class alone.
    topk: int | None = None
    axis: str = "keys"
    select: str = "scores"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        topk: int | None = None,
        axis: str = "keys",
        select: str = "scores",
    ) -> None:
        check_options(topk, axis, select)
        check_size(NAME, "embed_dim", embed_dim)
        if embed_dim % check_size(NAME, "num_heads", num_heads):
            refuse(ValueError, NAME, "num_heads", f"a divisor of embed_dim = {embed_dim}", num_heads)
        check_dropout(NAME, dropout)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                check_size(NAME, name, width)
        if select == "raw" and kdim not in (None, embed_dim):
            refuse(ValueError, NAME, "kdim", f"embed_dim = {embed_dim}, because select='raw' compares both", kdim)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.topk, self.axis, self.select = topk, axis, select

    def extra_repr(self) -> str:
        options = f", axis={self.axis!r}, select={self.select!r}" if self.topk is not None else ""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, topk={self.topk}{options}"

    # torch.nn.TransformerEncoderLayer asks its attention this before it computes the whole layer, dense, without
    # calling forward. A selecting attention answers False and so is called; a dense one may well be left out.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.topk is None and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, same: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = same

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention.forward, save that ``need_weights`` is False unless asked for.

        Args:
            query: [L, B, E], with batch_first [B, L, E], unbatched [L, E]; key, value: the same with S tokens and
                kdim, vdim channels.
            key_padding_mask: bool (True = ignore) or float (added to the scores) [B, S], unbatched [S].
            need_weights: also return the probabilities, a dense tensor: zero where a pair was not kept.
            attn_mask: bool (True = ignore) or float (added) [L, S] or [B * H, L, S]; here also [B, L, S] and
                [B, 1 or H, L, S].  Three dimensions are read as [B * H, L, S] where both readings fit, as torch does.
            average_attn_weights: mean of the probabilities over the heads, [B, L, S], or each head's, [B, H, L, S].
            is_causal: a promise that attn_mask is the causal mask.  Dense calls then build it anew, as torch does.
            query_padding_mask: bool [B, L], unbatched [L], True = ignore: such a query keeps nothing, takes no slot
                from another (axis="queries") and gives ``out_proj.bias``.

        Returns:
            (output, probabilities or None).  Keys and queries under a bool padding mask may hold anything, NaN
            included: it reaches neither results nor gradients.

        Raises:
            ValueError, TypeError: a malformed call, with ``topk``.  Without it: torch's own exceptions.

        Cost beside the projections: 4 B L S E flops; memory O(B H L S) with topk, which is computed in float64 here.
        """
        masks = key_padding_mask, attn_mask, query_padding_mask
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                refuse(TypeError, NAME, name, "a tensor", x)
        if query.is_nested or key.is_nested or value.is_nested:
            if self.topk is None:
                return super().forward(
                    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                )
            return self._forward_nested(query, key, value, masks, need_weights)
        malformed = self._malformed(query, key, value, *masks, need_weights, is_causal)
        if not malformed and (need_weights or torch.is_grad_enabled()):
            query, key, value = self._blank(query, key, value, key_padding_mask, query_padding_mask)
        weights_of_torch = need_weights and self.topk is None and query_padding_mask is None
        if weights_of_torch:  # which reads the weight of out_proj and does not call it
            weights_of_torch = not why_changed([Inner("out_proj", self.out_proj, LINEARS)])
        if weights_of_torch or (malformed and self.topk is None):
            if attn_mask is not None and not malformed:
                attn_mask = self._in_torch_shape(attn_mask, query, key)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if malformed:
            kind, *rest = malformed
            refuse(kind, NAME, *rest)

        batched, batch_first = query.dim() == 3, self.batch_first or query.dim() == 2
        q, k, v = self._project(query, key, value)  # [B, L, H, D], [B, S, H, D], views of what the matmuls wrote
        raw_query, raw_key = (self._batch_first(x) for x in (query, key))
        B, L = q.shape[:2]
        S = k.shape[1]
        attn_mask, key_mask = self._merge_masks(attn_mask, key_padding_mask, q)
        if is_causal and self.topk is None and key_padding_mask is None and not need_weights:
            S_all = S + (self.bias_k is not None) + bool(self.add_zero_attn)
            attn_mask = torch.ones(L, S_all, dtype=torch.bool, device=q.device).tril()[None, None]
            k, v, raw_key, _, key_mask = self._append(k, v, raw_key, None, key_mask)
        else:
            k, v, raw_key, attn_mask, key_mask = self._append(k, v, raw_key, attn_mask, key_mask)
        query_mask = None
        if query_padding_mask is not None:
            query_mask = ~(query_padding_mask if batched else query_padding_mask[None])

        call = {"attn_mask": attn_mask, "key_mask": key_mask, "query_mask": query_mask}
        if self.topk is not None and self.select == "raw":
            dtype = torch.promote_types(raw_query.dtype, raw_key.dtype)
            call["select_query"], call["select_key"] = raw_query.detach().to(dtype), raw_key.detach().to(dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = self._with_weights(q, k, v, call, dropout_p)
            if average_attn_weights:
                weights = weights.mean(1)
            weights = weights if batched else weights.squeeze(0)
        else:
            out = self._attend(q, k, v, dropout_p=dropout_p, **call)
        # out is stored token by token: with batch_first merging its heads moves nothing.
        if batch_first:
            out = out.transpose(1, 2).reshape(B, L, self.embed_dim)
        else:
            out = out.permute(2, 0, 1, 3).reshape(L, B, self.embed_dim)
        out = self.out_proj(out)  # called, unlike in torch's: hooks fire, and another layer in its place computes
        return out if batched else out.squeeze(0), weights

    # The projections.

    def _blank(self, query, key, value, key_padding_mask, query_padding_mask) -> list[Tensor]:
        """Zeros in place of padding, which in the gradients of the projections, and where torch makes the weights,
        meets factors of 0: NaN would stay NaN.  Inputs that are one tensor under one mask stay one."""
        blanked: dict[tuple[int, int], Tensor] = {}
        masks = query_padding_mask, key_padding_mask, key_padding_mask
        for x, padding in zip((query, key, value), masks, strict=True):
            if padding is not None and padding.dtype == torch.bool and (id(x), id(padding)) not in blanked:
                rows = padding if self.batch_first or x.dim() == 2 else padding.T
                blanked[id(x), id(padding)] = torch.where(rows[..., None], 0.0, x)
        return [blanked.get((id(x), id(m)), x) for x, m in zip((query, key, value), masks, strict=True)]

    def _batch_first(self, x: Tensor) -> Tensor:
        """[B, T, C] of any input layout."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One matmul for all that share their input, as torch does, but without the copy that separates them."""
        E, b = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if b is None else b.split(E)
            projected = [F.linear(x, w, c) for x, w, c in zip((query, key, value), weights, biases, strict=True)]
        elif key is not value:
            weights, biases = self.in_proj_weight.split(E), (None,) * 3 if b is None else b.split(E)
            projected = [F.linear(x, w, c) for x, w, c in zip((query, key, value), weights, biases, strict=True)]
        elif query is key:
            projected = F.linear(query, self.in_proj_weight, b).split(E, -1)
        else:
            w_q, w_kv = self.in_proj_weight.split([E, 2 * E])
            b_q, b_kv = (None, None) if b is None else b.split([E, 2 * E])
            projected = [F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).split(E, -1)]
        return tuple(self._batch_first(x).unflatten(-1, (self.num_heads, self.head_dim)) for x in projected)

    def _append(self, k, v, raw_key, attn_mask, key_mask):
        """The keys of add_bias_kv and add_zero_attn at the end; no mask reaches them."""
        B, _, H, D = k.shape
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).view(1, 1, H, D).expand(B, 1, H, D)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).view(1, 1, H, D).expand(B, 1, H, D)], 1)
            if self.select == "raw":
                raw_key = torch.cat([raw_key, self.bias_k.to(raw_key.dtype).expand(B, 1, H * D)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
            raw_key = F.pad(raw_key, (0, 0, 0, 1))
        more = (self.bias_k is not None) + bool(self.add_zero_attn)
        if more and attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, more), value=True if attn_mask.dtype == torch.bool else 0.0)
        if more and key_mask is not None:
            key_mask = F.pad(key_mask, (0, more), value=True)
        return k, v, raw_key, attn_mask, key_mask

    # The masks.

    def _malformed(
        self, query, key, value, key_padding_mask, attn_mask, query_padding_mask, need_weights, is_causal
    ) -> tuple | None:
        """(exception, argument, expected, got) of the first argument that does not fit, or None."""
        rank = query.dim()
        if rank not in (2, 3):
            return ValueError, "query", "3 dimensions, or 2 when unbatched", query
        batch = () if rank == 2 else (query.shape[0 if self.batch_first else 1],)
        L, S = (x.shape[1 if rank == 3 and self.batch_first else 0] for x in (query, key))
        for name, x, tokens, width in (
            ("query", query, L, self.embed_dim),
            ("key", key, S, self.kdim),
            ("value", value, S, self.vdim),
        ):
            shape = (*batch, tokens, width) if self.batch_first or rank == 2 else (tokens, *batch, width)
            if tuple(x.shape) != shape:
                return ValueError, name, f"shape {shape}", x
        for name, mask, tokens in (
            ("key_padding_mask", key_padding_mask, S),
            ("query_padding_mask", query_padding_mask, L),
        ):
            if mask is None:
                continue
            floats = name == "key_padding_mask"
            if not is_mask(mask, floats):
                return TypeError, name, "a bool" + (" or floating point" if floats else "") + " tensor", mask
            if tuple(mask.shape) != (*batch, tokens):
                return ValueError, name, f"shape {(*batch, tokens)}", mask
        if attn_mask is None:
            return (ValueError, "attn_mask", "the causal mask, because is_causal=True", None) if is_causal else None
        if not is_mask(attn_mask):
            return TypeError, "attn_mask", "a bool or floating point tensor", attn_mask
        B, H = batch[0] if batch else 1, self.num_heads
        legal = [(L, S), (B * H, L, S), (B, L, S), (B, 1, L, S), (B, H, L, S)]
        if is_causal and self.topk is None and key_padding_mask is None and not need_weights:
            return None  # torch does not look at the mask then
        if tuple(attn_mask.shape) not in legal:
            return ValueError, "attn_mask", "a shape among " + ", ".join(map(str, dict.fromkeys(legal))), attn_mask
        per_head = attn_mask.dim() > 2 and self._four(attn_mask, B).shape[1] > 1
        if self.topk is not None and self.select == "raw" and per_head:
            return ValueError, "attn_mask", "no head axis, because select='raw' selects once for all heads", attn_mask
        return None

    def _four(self, attn_mask: Tensor, B: int) -> Tensor:
        """[1 or B, 1 or H, L, S], a view."""
        if attn_mask.dim() == 4:
            return attn_mask
        if attn_mask.dim() == 2:
            return attn_mask[None, None]
        if attn_mask.shape[0] == B * self.num_heads:
            return attn_mask.unflatten(0, (B, self.num_heads))
        return attn_mask.unsqueeze(1)

    def _in_torch_shape(self, attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """[L, S] as it is, everything else as [B * H, L, S]."""
        if attn_mask.dim() == 2:
            return attn_mask
        B = self._batch_first(query).shape[0]
        return self._four(attn_mask, B).expand(B, self.num_heads, -1, -1).flatten(0, 1)

    def _merge_masks(self, attn_mask, key_padding_mask, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(attn_mask [1 or B, 1 or H, 1 or L, S], key_mask [B, S]) where True takes part.

        A bool padding mask stays apart and a bool mask stays bool; only two masks that add must become one tensor.
        """
        if attn_mask is not None:
            attn_mask = self._four(attn_mask, q.shape[0])
            if attn_mask.is_floating_point():
                attn_mask = as_bias(attn_mask, q.dtype)
        if key_padding_mask is not None and key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
            key_mask = None if key_padding_mask is None else ~key_padding_mask
            return ~attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask, key_mask
        padding = as_bias(key_padding_mask, q.dtype)[:, None, None, :]
        if attn_mask is None:
            return padding, None
        return torch.where(attn_mask, -INF, padding) if attn_mask.dtype == torch.bool else attn_mask + padding, None

    # What happens between the projections.

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
        """[B, H, L, D] of q [B, H, L, D], k, v [B, H, S, D], or a tuple with what return_lse, return_indices ask for.

        ``call``: attn_mask, key_mask, query_mask and, with select="raw", select_query and select_key, all as in
        hivilt.reference.topk_attention; dropout_p.
        """
        if self.topk is None and not call.get("return_lse"):
            return dense_attention(q, k, v, **call)
        if call.get("dropout_p"):
            call["seed"] = torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
        return topk_attention(q, k, v, self.topk, axis=self.axis, **call)

    def _with_weights(self, q, k, v, call: dict, dropout_p: float) -> tuple[Tensor, Tensor]:
        """Output [B, H, L, D] and probabilities [B, H, L, S]: exp(s - lse) on kept pairs, 0 elsewhere."""
        masks = call["attn_mask"], call["key_mask"], call["query_mask"]
        if call["key_mask"] is not None:  # what padding holds must not matter in the dense products below
            hidden = ~call["key_mask"][:, None, :, None]
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        if self.topk is None:
            out, lse = self._attend(q, k, v, return_lse=True, **call)
            kept = allowed(*masks)
        else:
            out, lse, indices = self._attend(q, k, v, return_lse=True, return_indices=True, **call)
            kept = pairs(indices, (*q.shape[:3], k.shape[2]), self.axis)
        with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):  # meta knows no autocast
            scores = (q.to(lse.dtype) * self.head_dim**-0.5) @ k.to(lse.dtype).mT
            if masks[0] is not None and masks[0].is_floating_point():
                scores = scores + torch.where(masks[0] == -INF, 0.0, masks[0])
            weights = scores - lse[..., None]
            if kept is not True:
                weights = torch.where(kept, weights, -INF)
            weights = weights.exp()
            if dropout_p > 0.0:  # then the weights returned are those that made the output, as torch has it
                weights = F.dropout(weights, dropout_p)
                out = (weights @ v.to(weights.dtype)).to(out.dtype)
        return out, weights.to(out.dtype)

    def _forward_nested(self, query, key, value, masks, need_weights) -> tuple[Tensor, None]:
        """Nested self-attention, which torch.nn.TransformerEncoder makes of padded batches: padded for the operator."""
        if query is not key or key is not value or query.layout is not torch.strided or not self.batch_first:
            refuse(TypeError, NAME, "query", "dense tensors, or one nested (strided) tensor for all three", query)
        if need_weights or any(mask is not None for mask in masks):
            refuse(ValueError, NAME, "query", "no masks and need_weights=False beside a nested tensor", query)
        lengths = torch.tensor([x.shape[0] for x in query.unbind()], device=query.device)
        padded = query.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1], device=query.device) >= lengths[:, None]
        out, _ = self.forward(padded, padded, padded, padding, query_padding_mask=padding)
        return torch._nested_tensor_from_mask(out, ~padding, mask_check=False), None


def is_mask(x: Any, floats: bool = True) -> bool:
    return isinstance(x, Tensor) and (x.dtype == torch.bool or (floats and x.is_floating_point()))


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask in a type that the operator takes beside queries of ``dtype``."""
    return mask if mask.dtype in (torch.float32, dtype) else mask.float()


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """torch's own attention under hivilt's masks, True takes part: what keys under key_mask hold does not matter, and a
    query that may look at nothing gives 0 and no gradient, whatever kernel torch chooses."""
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    grouped = key.shape[1] != query.shape[1]
    keep = allowed(attn_mask, key_mask, query_mask)
    if keep is True:
        return F.scaled_dot_product_attention(query, key, value, None, dropout_p, scale=scale, enable_gqa=grouped)
    some = keep.any(-1, keepdim=True)
    mask = keep | ~some  # an empty row looks everywhere and its result is thrown away: a softmax of nothing is NaN
    if attn_mask is not None and attn_mask.is_floating_point():
        mask = torch.where(some, torch.where(keep, attn_mask, -INF), 0.0).to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=grouped)
    return torch.where(some, out, 0.0)
