"""Cross-attention that keeps the projected keys and values of earlier calls, in plain PyTorch.

For decoding: query after query attends to the same image, whose keys and values need projecting once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_choice, check_mask, check_size, check_tensor, refuse
from ._inner import PLAIN_TENSORS, Inner, why_changed
from .topk_attention import MultiheadAttention


class Print(NamedTuple):
    """What a tensor held at some time: two equal prints, the same values."""

    root: weakref.ref  # the tensor, or the one it is a view of; weak, so that an address used again is not mistaken
    version: int | None  # counts what was written; None: not counted, ``copy`` then holds the values
    layout: tuple
    copy: Tensor | None

    def holds(self, x: Tensor) -> bool:
        if self.layout != layout_of(x) or x.is_inference() != (self.copy is not None):
            return False
        if self.copy is not None:
            return torch.equal(self.copy, x)
        return self.root() is root_of(x) and self.version == x._version


class Entry(NamedTuple):
    """Projected keys and values [B, H, N, D], and what they were made of."""

    prints: tuple[Print, ...]
    autocast: tuple
    k: Tensor
    v: Tensor


class CachedCrossAttention(nn.Module):
    """attn(query, key, value), which projects the keys and values of a ``cache_key`` once.

    Args:
        hidden_dim: C of all three.
        num_heads: divides hidden_dim.
        max_entries: how many keys and values are kept; beyond that the longest unused goes.
        compat: None, or "seed": the layer as first written, which keeps the unprojected key and value of a name's
            first call, any number of them, and serves these whatever later calls pass.

    Parameters: ``attn``.

    Entries are never stale: one is used for the same tensors, or the same views of them, as long as neither they nor
    the parameters were written to since, and under the same autocast; else it is made anew.  Written to means what
    torch counts (``Tensor._version``); a write through ``.data`` or a NumPy array is not counted, so clear_cache() goes
    with it.  Inference tensors count nothing: of them copies are kept, and compared.

    Nothing is cached in training, where a gradient is wanted, under torch.compile and torch.func, or where ``attn``
    was replaced or hooked.  Copies, pickles and the state_dict do not carry the cache, and ``.to()`` clears it.
    """

    attention: Callable[..., nn.Module] = MultiheadAttention

    def __init__(self, hidden_dim: int, num_heads: int, max_entries: int = 8, *, compat: str | None = None) -> None:
        super().__init__()
        where = "CachedCrossAttention"
        check_size(where, "hidden_dim", hidden_dim)
        if hidden_dim % check_size(where, "num_heads", num_heads):
            refuse(ValueError, where, "num_heads", f"a divisor of hidden_dim = {hidden_dim}", num_heads)
        self.hidden_dim, self.max_entries = hidden_dim, check_size(where, "max_entries", max_entries)
        self.compat = None if compat is None else check_choice(where, "compat", compat, ("seed",))
        self.attn = self.attention(hidden_dim, num_heads, batch_first=True)
        self.cache: dict[Hashable, Entry | tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache_key: Hashable | None = None,
        use_cache: bool = True,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends to key and value, projected now or before.

        Args:
            query: [B, N_q, C]; key, value: [B, N, C].
            cache_key: the name of key and value in the cache; None: nothing is kept.
            use_cache: False neither reads nor writes the cache.
            key_mask: bool or integer [B, N], True or 1 takes part; of this call alone.  What other keys hold does not
                matter; a sample without a key gives ``attn.out_proj.bias``.

        Returns:
            [B, N_q, C].

        Raises:
            ValueError, TypeError: an argument that does not fit.

        Cost beside attention and the projections of query and result: 4 B N C C flops, where the entry holds none.
        """
        where = "CachedCrossAttention"
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_tensor(where, name, x, "(B, N, C)", 3)
            if x.shape[2] != self.hidden_dim or x.shape[0] != query.shape[0]:
                refuse(ValueError, where, name, f"shape ({query.shape[0]}, N, {self.hidden_dim})", x)
        if value.shape[1] != key.shape[1]:
            refuse(ValueError, where, "value", f"{key.shape[1]} tokens, as key has", value)
        if key_mask is not None:
            key_mask = check_mask(where, "key_mask", key_mask, tuple(key.shape[:2]))
        try:
            hash(cache_key)
        except TypeError:
            refuse(TypeError, where, "cache_key", "something hashable", cache_key)
        if self.compat == "seed" and cache_key is not None and use_cache:
            key, value = self.cache.setdefault(cache_key, (key, value))
            use_cache = False
        if cache_key is None or not use_cache or not self._may_cache(query, key, value):
            return self.attn(query, key, value, None if key_mask is None else ~key_mask, need_weights=False)[0]
        k, v = self._projected(cache_key, key, value)
        attn, E = self.attn, self.hidden_dim
        b_q = None if attn.in_proj_bias is None else attn.in_proj_bias[:E]
        q = self._split(F.linear(query, attn.in_proj_weight[:E], b_q))
        masks = {"attn_mask": None, "key_mask": key_mask, "query_mask": None}
        out = attn._attend(q, k, v, dropout_p=0.0, **masks)
        return F.linear(out.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)

    def clear_cache(self) -> None:
        self.cache.clear()

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, max_entries={self.max_entries}"

    def _may_cache(self, *tensors: Tensor) -> bool:
        attn = self.attn
        if self.training or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        if not isinstance(attn, MultiheadAttention) or type(attn).forward is not MultiheadAttention.forward:
            return False
        parts = [Inner("attn", attn, (type(attn),)), Inner("attn.out_proj", attn.out_proj, (type(attn.out_proj),))]
        if why_changed(parts) or (attn.topk is not None and attn.select == "raw"):
            return False
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
            return False
        parameters = list(attn.parameters())
        if any(p.is_inference() for p in parameters) or any(type(x) not in PLAIN_TENSORS or x.is_meta for x in tensors):
            return False
        return not (torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *parameters)))

    def _projected(self, cache_key: Hashable, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        attn, E = self.attn, self.hidden_dim
        sources = [x for x in (attn.in_proj_weight, attn.in_proj_bias, key, value) if x is not None]
        kind = key.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        # Taken out and put back last: the order of the dict is that of use. Each step is one, so threads may meet here.
        entry = self.cache.pop(cache_key, None)
        fits = entry is not None and entry.autocast == autocast and len(entry.prints) == len(sources)
        if not (fits and all(p.holds(x) for p, x in zip(entry.prints, sources, strict=True))):
            prints = tuple(print_of(x) for x in sources)  # before they are read: a write meanwhile then shows
            weight = attn.in_proj_weight
            bias = (None,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.split(E)
            if value is key:
                both = None if bias[0] is None else attn.in_proj_bias[E:]
                k, v = F.linear(key, weight[E:], both).split(E, -1)
            else:
                k, v = F.linear(key, weight[E : 2 * E], bias[1]), F.linear(value, weight[2 * E :], bias[2])
            k, v = (self._split(x).contiguous() for x in (k, v))
            entry = Entry(prints, autocast, k, v)
        self.cache[cache_key] = entry
        for oldest in list(self.cache)[: -self.max_entries]:
            self.cache.pop(oldest, None)
        return entry.k, entry.v

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, H, N, D]."""
        return x.unflatten(-1, (self.attn.num_heads, self.attn.head_dim)).transpose(1, 2)

    def _apply(self, fn: Callable, recurse: bool = True) -> CachedCrossAttention:
        self.clear_cache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}


def root_of(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def layout_of(x: Tensor) -> tuple:
    return tuple(x.shape), x.stride(), x.storage_offset(), x.data_ptr(), x.dtype, x.device


def print_of(x: Tensor) -> Print:
    inference = x.is_inference()
    version, copy = (None, x.clone()) if inference else (x._version, None)
    return Print(weakref.ref(root_of(x)), version, layout_of(x), copy)
