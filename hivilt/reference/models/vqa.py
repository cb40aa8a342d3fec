"""Visual question answering over frozen encoders, in plain PyTorch: patches and words are encoded, fused, averaged over
the words and classified; only the fusion and the head learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules._checks import check_mask, check_size, check_tensor, refuse
from ..modules.vqa_fusion import MaskedMeanPool


class VQAFusionModel(nn.Module):
    """logits = head(mean over words of fusion(text(input_ids), vision(images))).

    The encoders get no gradient, run without recording one, and stay in eval mode.

    Args:
        vision: module of images [B, c, H, W]; gives tokens [B, N, C_v], or an object with these as its
            ``last_hidden_state`` (Hugging Face).  None: images are passed as tokens that were encoded before.
        text: module called with ``input_ids=`` and ``attention_mask=`` [B, N_t]; gives [B, N_t, C] in either way.
            One that looks only back, such as Llama, wants its padding on the right.  None: as for vision.
        fusion: module of (text, vision, attention_mask) that gives (fused [B, N_t, C], mask [B, N_t], ...) and has C as
            ``text_embed_dim``, such as MultimodalFusion.
        num_answers: classes of the head.
        prefix_tokens: how many tokens of ``vision`` to drop in front, class token and registers.  None: with a
            ``config.patch_size``, as many as there are beyond the patches of the image; else none.

    Parameters: those of ``vision`` and ``text`` (none learns), ``fusion``, and ``head``.
    """

    def __init__(
        self,
        vision: nn.Module | None,
        text: nn.Module | None,
        fusion: nn.Module,
        num_answers: int,
        *,
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__()
        where = "VQAFusionModel"
        for name, encoder in (("vision", vision), ("text", text)):
            if encoder is not None and not isinstance(encoder, nn.Module):
                refuse(TypeError, where, name, "a torch.nn.Module or None", encoder)
        if not isinstance(fusion, nn.Module):
            refuse(TypeError, where, "fusion", "a torch.nn.Module", fusion)
        width = check_size(where, "fusion.text_embed_dim", getattr(fusion, "text_embed_dim", None))
        self.num_answers = check_size(where, "num_answers", num_answers)
        if prefix_tokens is not None and (isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int)):
            refuse(TypeError, where, "prefix_tokens", "an int of at least 0, or None", prefix_tokens)
        if prefix_tokens is not None and prefix_tokens < 0:
            refuse(ValueError, where, "prefix_tokens", "an int of at least 0, or None", prefix_tokens)
        self.prefix_tokens = prefix_tokens
        self.vision, self.text, self.fusion = vision, text, fusion
        self.pool, self.head = MaskedMeanPool(), nn.Linear(width, num_answers)
        for encoder in self._encoders():
            encoder.requires_grad_(False).eval()

    def _encoders(self) -> list[nn.Module]:
        return [encoder for encoder in (self.vision, self.text) if encoder is not None]

    def train(self, mode: bool = True) -> VQAFusionModel:
        super().train(mode)
        for encoder in self._encoders():
            encoder.eval()
        return self

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """[B, c, H, W] to patches [B, N_v, C_v], without class token and registers; worth keeping between epochs."""
        where = "VQAFusionModel"
        if self.vision is None:
            refuse(ValueError, where, "images", "tokens (B, N, C), because vision is None", images)
        check_tensor(where, "images", images, "(B, c, H, W)", 4)
        tokens = _states(where, "vision", self.vision(images))
        patch = getattr(getattr(self.vision, "config", None), "patch_size", None)
        prefix = self.prefix_tokens
        if prefix is None and patch is not None:
            height, width = (patch, patch) if isinstance(patch, int) else patch
            count = (images.shape[2] // height) * (images.shape[3] // width)
            if (prefix := tokens.shape[1] - count) < 0:
                refuse(ValueError, where, "prefix_tokens", f"a number, as vision gives fewer than {count} tokens", None)
        return tokens[:, prefix or 0 :]

    @torch.no_grad()
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, N_t] to words [B, N_t, C]; ids under the mask are read as 0, so they may be anything."""
        where = "VQAFusionModel"
        if self.text is None:
            refuse(ValueError, where, "input_ids", "tokens (B, N, C), because text is None", input_ids)
        check_tensor(where, "input_ids", input_ids, "(B, N)", 2)
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            refuse(TypeError, where, "input_ids", "an integer tensor", input_ids)
        words = None
        if attention_mask is not None:
            words = check_mask(where, "attention_mask", attention_mask, tuple(input_ids.shape))
            input_ids, words = torch.where(words, input_ids, 0), words.long()
        return _states(where, "text", self.text(input_ids=input_ids, attention_mask=words))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Images and questions to answers.

        Args:
            images: [B, c, H, W], or what encode_images gave, [B, N_v, C_v].
            input_ids: integers [B, N_t], or what encode_text gave, [B, N_t, C].
            attention_mask: bool or integer [B, N_t], True or 1 takes part.

        Returns:
            dict with logits [B, num_answers], fused [B, N_t, C] and mask bool [B, N_t].

        Raises:
            ValueError, TypeError: an argument that does not fit.
        """
        where = "VQAFusionModel"
        if not isinstance(images, Tensor) or images.dim() not in (3, 4):
            refuse(_kind(images), where, "images", "a tensor (B, c, H, W) or (B, N, C)", images)
        if not isinstance(input_ids, Tensor) or input_ids.dim() not in (2, 3):
            refuse(_kind(input_ids), where, "input_ids", "a tensor (B, N) or (B, N, C)", input_ids)
        if images.shape[0] != input_ids.shape[0]:
            refuse(ValueError, where, "input_ids", f"the batch of images, {images.shape[0]}", input_ids)
        vision = images if images.dim() == 3 else self.encode_images(images)
        text = input_ids if input_ids.dim() == 3 else self.encode_text(input_ids, attention_mask)
        fused, mask = self.fusion(text, vision, attention_mask)[:2]
        return {"logits": self.head(self.pool(fused, mask)), "fused": fused, "mask": mask}


def _kind(x: object) -> type[Exception]:
    return ValueError if isinstance(x, Tensor) else TypeError


def _states(where: str, name: str, output: object) -> Tensor:
    """The tokens of an encoder's output."""
    return check_tensor(where, f"output of {name}", getattr(output, "last_hidden_state", output), "(B, N, C)", 3)
