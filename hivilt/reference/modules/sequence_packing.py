"""Sequences of different lengths end to end instead of padded, for hivilt.ops.topk_attention_varlen, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ._checks import check_tensor, refuse


def pack_sequences(
    vision_features_list: Sequence[Tensor], text_features_list: Sequence[Tensor]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Packs B pairs of sequences, the longest pair first.

    Args:
        vision_features_list: B tensors [N_v, C_v]; text_features_list: B tensors [N_t, C_t].  Empty ones are legal.

    Returns:
        packed_vision [sum N_v, C_v], packed_text [sum N_t, C_t] and metadata, a dict: cu_seqlens_v and cu_seqlens_t,
        int32 [B + 1], where each sequence starts and the last one ends, on the device of the sequences; max_seqlen_v
        and max_seqlen_t, ints; vision_offsets and text_offsets, the same starts as lists; sorted_indices, which pair
        stands where; original_indices, where each pair stands.

    Raises:
        ValueError, TypeError: no pair, or tensors that do not fit together.

        packed_vision, packed_text, meta = pack_sequences(patches, words)
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (to_q(packed_vision), to_k(packed_text), to_v(packed_text)))
        out = topk_attention_varlen(q, k, v, meta["cu_seqlens_v"], meta["cu_seqlens_t"], meta["max_seqlen_v"],
                                    meta["max_seqlen_t"], topk=8)
    """
    where = "pack_sequences"
    vision = check_sequences(where, "vision_features_list", vision_features_list)
    text = check_sequences(where, "text_features_list", text_features_list)
    if len(vision) != len(text):
        refuse(ValueError, where, "text_features_list", f"{len(vision)} tensors, one for each of vision", len(text))
    lengths = [len(v) + len(t) for v, t in zip(vision, text, strict=True)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: equal lengths keep their order
    places = [0] * len(order)
    for place, i in enumerate(order):
        places[i] = place
    metadata: dict[str, Any] = {}
    packed = []
    for name, letter, sequences in (("vision", "v", vision), ("text", "t", text)):
        offsets = list(accumulate((len(sequences[i]) for i in order), initial=0))
        metadata[f"{name}_offsets"] = offsets
        metadata[f"cu_seqlens_{letter}"] = torch.tensor(offsets, dtype=torch.int32, device=sequences[0].device)
        metadata[f"max_seqlen_{letter}"] = max(len(x) for x in sequences)
        packed.append(torch.cat([sequences[i] for i in order]))
    return *packed, {**metadata, "sorted_indices": order, "original_indices": places}


def unpack_sequences(
    packed_vision: Tensor, packed_text: Tensor, metadata: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """What pack_sequences packed, as two lists in the first order.

    Args:
        packed_vision: [sum N_v, ...], packed_text: [sum N_t, ...], with any number of channels or of dimensions.
        metadata: what pack_sequences gave.

    Returns:
        B views [N_v, ...] and B views [N_t, ...].

    Raises:
        ValueError, TypeError: tensors with another number of rows, or no such metadata.
    """
    where = "unpack_sequences"
    names = "vision_offsets", "text_offsets", "original_indices"
    if not isinstance(metadata, Mapping):
        refuse(TypeError, where, "metadata", "the dict of pack_sequences", metadata)
    for name in names:
        if name not in metadata:
            refuse(ValueError, where, "metadata", f"a dict with {', '.join(names)}", sorted(map(str, metadata)))
    lists = []
    for name, packed in (("vision", packed_vision), ("text", packed_text)):
        if not isinstance(packed, Tensor):
            refuse(TypeError, where, f"packed_{name}", "a tensor", packed)
        offsets = metadata[f"{name}_offsets"]
        if packed.dim() == 0 or packed.shape[0] != offsets[-1]:
            refuse(ValueError, where, f"packed_{name}", f"{offsets[-1]} rows", packed)
        pieces = [packed[start:end] for start, end in pairwise(offsets)]
        lists.append([pieces[place] for place in metadata["original_indices"]])
    return lists[0], lists[1]


def check_sequences(where: str, name: str, sequences: Any) -> list[Tensor]:
    if isinstance(sequences, Tensor | str) or not isinstance(sequences, Sequence):
        refuse(TypeError, where, name, "a list of tensors (N, C)", sequences)
    if not sequences:
        refuse(ValueError, where, name, "at least one tensor (N, C)", list(sequences))
    for i, x in enumerate(sequences):
        check_tensor(where, f"{name}[{i}]", x, "(N, C)", 2)
        first = sequences[0]
        if (x.shape[1], x.dtype, x.device) != (first.shape[1], first.dtype, first.device):
            refuse(ValueError, where, f"{name}[{i}]", f"channels, dtype and device of {name}[0]", x)
    return list(sequences)
