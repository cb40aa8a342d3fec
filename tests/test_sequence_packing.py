"""pack_sequences and unpack_sequences: nothing is lost, and packed attention is that of each pair alone."""

import pytest
import torch
from plain_attention import close
from torch import nn

import hivilt
from hivilt.reference.modules import pack_sequences, unpack_sequences

C, H = 16, 4
LENGTHS = [(5, 3), (9, 2), (0, 4), (6, 5), (8, 0), (1, 1)]


def lists(dtype=torch.float32):
    torch.manual_seed(6)
    return [[torch.randn(n, C, dtype=dtype) for n in column] for column in zip(*LENGTHS, strict=True)]


def test_metadata():
    vision, text = lists()
    packed_vision, packed_text, meta = pack_sequences(vision, text)
    assert meta["sorted_indices"] == [1, 3, 0, 4, 2, 5]  # 11, 11, 8, 8, 4, 2 tokens; equal ones keep their order
    assert [meta["sorted_indices"][i] for i in meta["original_indices"]] == list(range(6))
    assert meta["vision_offsets"] == [0, 9, 15, 20, 28, 28, 29] and meta["text_offsets"] == [0, 2, 7, 10, 10, 14, 15]
    for letter, name in (("v", "vision"), ("t", "text")):
        starts = meta[f"cu_seqlens_{letter}"]
        assert starts.dtype == torch.int32 and starts.tolist() == meta[f"{name}_offsets"]
    assert (meta["max_seqlen_v"], meta["max_seqlen_t"]) == (9, 5)
    assert torch.equal(packed_vision[:9], vision[1]) and torch.equal(packed_text[2:7], text[3])


def test_there_and_back():
    vision, text = lists()
    packed_vision, packed_text, meta = pack_sequences(vision, text)
    again = unpack_sequences(packed_vision * 2, packed_text.unflatten(-1, (H, -1))[..., 0], meta)
    assert all(torch.equal(a, 2 * b) for a, b in zip(again[0], vision, strict=True))
    assert all(torch.equal(a, b[:, :: C // H]) for a, b in zip(again[1], text, strict=True))


@pytest.mark.parametrize("topk, axis", [(None, "keys"), (2, "keys"), (3, "queries")])
def test_packed_attention_is_that_of_each_pair(topk, axis):
    vision, text = lists(torch.float64)
    layers = [nn.Linear(C, C, dtype=torch.float64) for _ in range(3)]
    packed_vision, packed_text, meta = pack_sequences(vision, text)
    q, k, v = (
        layer(x).unflatten(-1, (H, -1))
        for layer, x in zip(layers, (packed_vision, packed_text, packed_text), strict=True)
    )
    out = hivilt.topk_attention_varlen(
        *(x.float() for x in (q, k, v)), meta["cu_seqlens_v"], meta["cu_seqlens_t"], meta["max_seqlen_v"],
        meta["max_seqlen_t"], topk, axis=axis,
    )  # fmt: skip
    seen, _ = unpack_sequences(out.flatten(1), packed_text, meta)
    for x, y, ours in zip(vision, text, seen, strict=True):
        expected = torch.zeros(len(x), C, dtype=torch.float64)
        for h in range(H if len(y) else 0):
            a, b, c = (f(z)[:, h * (C // H) : (h + 1) * (C // H)] for f, z in zip(layers, (x, y, y), strict=True))
            s = a @ b.T / (C // H) ** 0.5
            if topk is not None and topk < s.shape[axis == "keys"]:
                bar = s.topk(topk, int(axis == "keys")).values.amin(int(axis == "keys"), keepdim=True)
                s = s.masked_fill(s < bar, -torch.inf)
            expected[:, h * (C // H) : (h + 1) * (C // H)] = s.softmax(1).nan_to_num(0.0) @ c
        close(ours.double(), expected)


def test_gradients_reach_the_sequences():
    vision, text = lists()
    for x in (*vision, *text):
        x.requires_grad_()
    packed_vision, packed_text, meta = pack_sequences(vision, text)
    seen, read = unpack_sequences(packed_vision, packed_text, meta)
    sum((i + 1) * x.sum() for i, x in enumerate((*seen, *read))).backward()
    assert all((x.grad == i + 1).all() for i, x in enumerate((*vision, *text)))


def test_both_rooms_have_them():
    assert hivilt.nn.pack_sequences is pack_sequences and hivilt.nn.unpack_sequences is unpack_sequences


X = [torch.zeros(2, C), torch.zeros(3, C)]
BAD = {
    "type": (lambda: pack_sequences(X[0], X), TypeError, "vision_features_list: expected a list"),
    "empty": (lambda: pack_sequences([], []), ValueError, r"vision_features_list: expected at least one .*; got \[\]"),
    "count": (lambda: pack_sequences(X, X[:1]), ValueError, "text_features_list: expected 2 tensors.*; got 1"),
    "rank": (lambda: pack_sequences([X[0][None]], X[:1]), ValueError, r"vision_features_list\[0\]"),
    "item": (lambda: pack_sequences(X, [X[0], 3]), TypeError, r"text_features_list\[1\]"),
    "width": (
        lambda: pack_sequences(X, [X[0], X[1][:, 1:]]),
        ValueError,
        r"text_features_list\[1\]: expected channels",
    ),
    "dtype": (lambda: pack_sequences([X[0], X[1].double()], X), ValueError, r"vision_features_list\[1\]"),
    "rows": (lambda: unpack_sequences(X[0], X[0], pack_sequences(X, X)[2]), ValueError, "packed_vision: expected 5"),
    "packed": (lambda: unpack_sequences(X, X, pack_sequences(X, X)[2]), TypeError, "packed_vision"),
    "metadata": (lambda: unpack_sequences(X[0], X[0], {"a": 1}), ValueError, "metadata"),
    "metadata-type": (lambda: unpack_sequences(X[0], X[0], None), TypeError, "metadata"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    make, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        make()
