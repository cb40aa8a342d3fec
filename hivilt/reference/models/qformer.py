"""BLIP-2's querying transformer in plain PyTorch: a few learned queries read an image  (arXiv 2301.12597).

A post-norm BERT of QFormerLayer, of which every second or so lets the queries attend to the image.  With words
beside the queries the same layers serve three objectives, which differ in who sees whom in the self-attention:

    itc  contrastive   "unimodal"       queries see queries, words see words
    itm  matching      "bidirectional"  everyone sees everyone
    itg  generation    "causal"         queries see queries, a word sees the queries and the words up to itself
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules._checks import check_choice, check_dropout, check_mask, check_size, check_tokens, refuse
from ..modules._config import read_config
from ..modules._hugging_face import check_class, without_memory
from ..modules.qformer import QFormerLayer
from ..modules.vision_block import ACTIVATIONS
from .encoders import check_ids, check_range

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "encoder_hidden_size": 1408,
    "cross_attention_frequency": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "num_query_tokens": 32,
    "vocab_size": None,
    "max_position_embeddings": 512,
    "image_text_hidden_size": 256,
    "objectives": ("itc", "itm", "itg"),
    "use_qformer_text_input": False,
    "topk": None,
}
OBJECTIVES = ("itc", "itm", "itg")
PATTERNS = ("unimodal", "bidirectional", "causal")


def attention_pattern(pattern: str, queries: int, words: Tensor) -> Tensor:
    """Who sees whom: bool [B, 1, Q + N, Q + N] for Q queries before N words; words: bool [B, N], True takes part."""
    check_choice("attention_pattern", "pattern", pattern, PATTERNS)
    B, N = words.shape
    total = queries + N
    keys = torch.cat([words.new_ones(B, queries), words], 1)[:, None, None, :]
    place = torch.arange(total, device=words.device)
    is_word = place >= queries
    if pattern == "bidirectional":
        return keys.expand(B, 1, total, total)
    if pattern == "unimodal":
        return keys & (is_word[:, None] == is_word)
    return keys & torch.where(is_word[:, None], place[:, None] >= place, ~is_word)


class TextEmbeddings(nn.Module):
    """``word_embeddings`` + ``position_embeddings``."""

    def __init__(self, vocabulary: int, positions: int, dim: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, dim)
        self.position_embeddings = nn.Embedding(positions, dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(place)


class LanguageHead(nn.Module):
    """BERT's: norm(act(dense(x))) against the word embeddings, which it borrows, plus ``bias``."""

    def __init__(self, dim: int, vocabulary: int, activation: str, eps: float) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps)
        self.act = ACTIVATIONS[activation]()
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.LayerNorm(self.act(self.dense(x))), words, self.bias)


class QFormer(nn.Module):
    """The Q-Former.

    Args:
        config: dict of what differs from DEFAULTS; keywords do the same.  The keys are those of transformers'
            Blip2QFormerConfig, and
            num_query_tokens: learned queries (0: none, the caller passes them);
            vocab_size: None leaves out everything for words: embeddings, their feed-forward parts, objectives;
            image_text_hidden_size: channels of the contrastive features;
            objectives: which heads there are, among 'itc', 'itm' and 'itg';
            topk: how many image tokens each query keeps (None: all).

    Parameters, named as in transformers: ``query_tokens``, ``layernorm``, ``encoder.layer.i`` (QFormerLayer),
    ``embeddings.{word,position}_embeddings``, ``vision_projection``, ``text_projection``, ``itm_head``; ``lm_head``.
    """

    layer: type[nn.Module] = QFormerLayer

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        where = "QFormer"
        c = SimpleNamespace(**read_config(where, config, options, DEFAULTS))
        for name in ("hidden_size", "num_hidden_layers", "cross_attention_frequency", "encoder_hidden_size",
                     "image_text_hidden_size", "max_position_embeddings"):  # fmt: skip
            check_size(where, name, getattr(c, name))
        check_choice(where, "hidden_act", c.hidden_act, tuple(ACTIVATIONS))
        if isinstance(c.objectives, str) or not isinstance(c.objectives, Sequence):
            refuse(TypeError, where, "objectives", "a tuple of names", c.objectives)
        for name in c.objectives:
            check_choice(where, "objectives", name, OBJECTIVES)
        dim, text = c.hidden_size, c.vocab_size is not None
        if text:
            check_size(where, "vocab_size", c.vocab_size)
        self.dim, self.encoder_dim, self.objectives = dim, c.encoder_hidden_size, tuple(c.objectives) if text else ()
        self.query_tokens = None
        if not isinstance(c.use_qformer_text_input, bool):
            refuse(TypeError, where, "use_qformer_text_input", "a bool", c.use_qformer_text_input)
        if c.num_query_tokens != 0:
            count = check_size(where, "num_query_tokens", c.num_query_tokens)
            self.query_tokens = nn.Parameter(torch.randn(1, count, dim) * 0.02)
        self.layernorm = nn.LayerNorm(dim, c.layer_norm_eps)
        self.dropout = nn.Dropout(check_dropout(where, c.hidden_dropout_prob))
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            self.layer(
                dim, c.num_attention_heads, c.intermediate_size,
                None if i % c.cross_attention_frequency else c.encoder_hidden_size,
                text=text or c.use_qformer_text_input, dropout=c.hidden_dropout_prob,
                attn_drop=c.attention_probs_dropout_prob, eps=c.layer_norm_eps, activation=c.hidden_act,
                topk=None if i % c.cross_attention_frequency else c.topk,
            )
            for i in range(c.num_hidden_layers)
        )  # fmt: skip
        if text:
            self.embeddings = TextEmbeddings(c.vocab_size, c.max_position_embeddings, dim)
        if "itc" in self.objectives:
            self.vision_projection = nn.Linear(dim, c.image_text_hidden_size)
            self.text_projection = nn.Linear(dim, c.image_text_hidden_size)
        if "itm" in self.objectives:
            self.itm_head = nn.Linear(dim, 2)
        if "itg" in self.objectives:
            self.lm_head = LanguageHead(dim, c.vocab_size, c.hidden_act, c.layer_norm_eps)

    def forward(self, query: Tensor | None, image: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """What the queries found in the images.

        Args:
            query: [B, Q, C], or [1, Q, C] for all images; None: the model's own.
            image: [B, N, encoder_hidden_size].
            image_mask: bool or integer [B, N], True or 1 takes part; other tokens may hold anything, NaN included.  An
                image without a token that takes part leaves its queries to themselves.

        Returns:
            [B, Q, C].

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        query, image_mask = self._check_image(query, image, image_mask)
        return self._layers(query, image, image_mask, None, query.shape[1])

    def encode(
        self,
        query: Tensor | None,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        pattern: str = "bidirectional",
    ) -> Tensor:
        """Queries and words together.

        Args:
            query, image, image_mask: as in ``forward``.
            input_ids: integers [B, N_t]; attention_mask: bool or integer [B, N_t], True or 1 takes part, others may
                be anything.
            pattern: "unimodal", "bidirectional" or "causal", see attention_pattern.

        Returns:
            [B, Q + N_t, C]; rows of padding are finite and mean nothing.
        """
        check_choice("QFormer", "pattern", pattern, PATTERNS)
        query, image_mask = self._check_image(query, image, image_mask)
        input_ids, words = self._check_text(input_ids, attention_mask)
        B, Q = image.shape[0], query.shape[1]
        if input_ids.shape[0] != B:
            refuse(ValueError, "QFormer", "input_ids", f"the batch of image, {B}", input_ids)
        x = torch.cat([query.expand(B, -1, -1), self.embeddings(input_ids)], 1)
        return self._layers(x, image, image_mask, attention_pattern(pattern, Q, words), Q)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Words alone, [B, N_t] to [B, N_t, C]: what "unimodal" gives for them."""
        input_ids, words = self._check_text(input_ids, attention_mask)
        return self._layers(self.embeddings(input_ids), None, None, attention_pattern("bidirectional", 0, words), 0)

    def itc(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        query: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """For hivilt.losses.itc_loss: features of the queries [B, Q, P] and of the first word [B, P], of length 1.  The
        image and the text of a row need not belong together, nor be equally many."""
        self._check_objective("itc")
        found = self.vision_projection(self.forward(query, image, image_mask))
        text = self.text_projection(self.encode_text(input_ids, attention_mask)[:, 0])
        return F.normalize(found, dim=-1), F.normalize(text, dim=-1)

    def itm(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        query: Tensor | None = None,
    ) -> Tensor:
        """For hivilt.losses.itm_loss: logits [B, Q, 2] of (no match, match); their mean over the queries decides."""
        self._check_objective("itm")
        x = self.encode(query, image, input_ids, attention_mask, image_mask, "bidirectional")
        return self.itm_head(x[:, : x.shape[1] - input_ids.shape[1]])

    def itg(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        query: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, N_t, vocab_size] of the word that follows each word, given the image and the words up to it."""
        self._check_objective("itg")
        x = self.encode(query, image, input_ids, attention_mask, image_mask, "causal")
        return self.lm_head(x[:, x.shape[1] - input_ids.shape[1] :], self.embeddings.word_embeddings.weight)

    def _layers(
        self, x: Tensor, image: Tensor | None, image_mask: Tensor | None, attn_mask: Tensor | None, queries: int
    ) -> Tensor:
        x = self.dropout(self.layernorm(x))
        for layer in self.encoder.layer:
            x = layer(x, image, image_mask, attn_mask, queries)
        return x

    def _check_objective(self, name: str) -> None:
        if name not in self.objectives:
            raise ValueError(
                f"QFormer: {name}: expected a model with vocab_size and the objective {name!r}; got {self.objectives}"
            )

    def _check_image(self, query: Any, image: Any, image_mask: Any) -> tuple[Tensor, Tensor | None]:
        where = "QFormer"
        check_tokens(where, "image", image, "(B, N, C)", self.encoder_dim)
        if image_mask is not None:
            image_mask = check_mask(where, "image_mask", image_mask, tuple(image.shape[:2]))
        if query is None:
            if self.query_tokens is None:
                refuse(ValueError, where, "query", "a tensor, because num_query_tokens is 0", query)
            return self.query_tokens, image_mask
        check_tokens(where, "query", query, "(B, Q, C)", self.dim)
        if query.shape[0] not in (1, image.shape[0]):
            refuse(ValueError, where, "query", f"the batch of image, {image.shape[0]}, or 1", query)
        return query, image_mask

    def _check_text(self, input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
        where = "QFormer"
        if not hasattr(self, "embeddings"):
            refuse(ValueError, where, "input_ids", "no words, because vocab_size is None", input_ids)
        check_ids(where, "input_ids", input_ids)
        limit = self.embeddings.position_embeddings.num_embeddings
        if not 1 <= input_ids.shape[1] <= limit:
            refuse(ValueError, where, "input_ids", f"from 1 to {limit} words", input_ids)
        words = input_ids.new_ones(input_ids.shape, dtype=torch.bool)
        if attention_mask is not None:
            words = check_mask(where, "attention_mask", attention_mask, tuple(input_ids.shape))
            input_ids = torch.where(words, input_ids, 0)
        check_range(where, "input_ids", input_ids, self.embeddings.word_embeddings.num_embeddings)
        return input_ids, words

    @classmethod
    def from_hf(cls, module: nn.Module) -> QFormer:
        """A model that shares the parameters and layers of transformers' Blip2QFormerModel (no queries of its own), or
        of Blip2ForImageTextRetrieval (queries, words, 'itc' and 'itm'; its vision model is left out).

        Raises:
            TypeError: another module.
        """
        retrieves = check_class(cls, module, "Blip2QFormerModel", "Blip2ForImageTextRetrieval") != "Blip2QFormerModel"
        qformer = module.qformer if retrieves else module
        known = {name: getattr(qformer.config, name) for name in DEFAULTS if hasattr(qformer.config, name)}
        known |= {"hidden_act": "gelu", "num_query_tokens": 0}
        if retrieves:
            known |= {"objectives": ("itc", "itm"), "num_query_tokens": module.query_tokens.shape[1],
                      "image_text_hidden_size": module.text_projection.out_features}  # fmt: skip
        else:
            known["vocab_size"] = None
        with without_memory():
            ours = cls(known)
        ours.layernorm = qformer.layernorm
        for own, layer in zip(ours.encoder.layer, qformer.encoder.layer, strict=True):
            for path, part in list(own.named_modules()):
                if isinstance(part, nn.Linear | nn.LayerNorm):
                    own.set_submodule(path, layer.get_submodule(path))
                elif path.startswith("intermediate") and "." not in path:
                    part.act = layer.get_submodule(path).intermediate_act_fn
        if retrieves:
            ours.query_tokens = module.query_tokens
            ours.embeddings.word_embeddings = module.embeddings.word_embeddings
            ours.embeddings.position_embeddings = module.embeddings.position_embeddings
            for name in ("vision_projection", "text_projection", "itm_head"):
                setattr(ours, name, getattr(module, name))
        return ours.train(module.training)
