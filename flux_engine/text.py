"""Prompts to what the transformer reads: T5's tokens and CLIP's pooled vector.

The networks and tokenizers are transformers' own. Every prompt is encoded alone, so its encoding does not depend on
what else is in the batch, and is kept in a small cache.
Shapes: B batch, L tokens, D width, P pooled width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError

Config = TypeVar("Config", CLIPTextConfig, T5Config)
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Files that a tokenizer's pieces are in."""


@dataclass(frozen=True)
class TextCond:
    """Encoded prompts."""

    tokens: Tensor
    """T5's last hidden states (B, L, D)."""
    pooled: Tensor
    """CLIP's pooled output (B, P)."""

    @staticmethod
    def cat(parts: Sequence[TextCond]) -> TextCond:
        return TextCond(torch.cat([p.tokens for p in parts]), torch.cat([p.pooled for p in parts]))


class FluxTextEncoder:
    """CLIP and T5 as FLUX uses them: CLIP's pooled output, T5's tokens padded to a fixed length without a mask.

    Source: black-forest-labs/flux, src/flux/modules/conditioner.py.
    """

    def __init__(
        self,
        clip_tokenizer: PreTrainedTokenizerBase,
        clip: CLIPTextModel,
        t5_tokenizer: PreTrainedTokenizerBase,
        t5: T5EncoderModel,
        *,
        max_sequence_length: int,
        cache_size: int = 64,
    ) -> None:
        self.clip_tokenizer, self.clip = clip_tokenizer, clip
        self.t5_tokenizer, self.t5 = t5_tokenizer, t5
        self.max_sequence_length = max_sequence_length
        self.cache_size = cache_size
        self._cache: OrderedDict[str, TextCond] = OrderedDict()

    @classmethod
    def load(
        cls,
        files: Mapping[str, Path],
        *,
        max_sequence_length: int,
        dtype: torch.dtype,
        device: torch.device,
        cache_size: int = 64,
    ) -> FluxTextEncoder:
        """Read both encoders and their tokenizers: four folders as Hugging Face repositories hold them.

        Raises WeightsError for what is not whole.
        """
        # float16 overflows inside T5, which was trained in bfloat16 (huggingface/candle issue 2480).
        dtype = torch.float32 if dtype == torch.float16 else dtype
        with WeightSource.open(files["text_encoder"]) as file:
            source = pick(file, "clip")
            clip_config = _config(CLIPTextConfig, files["text_encoder/config.json"], source)
            # Published files say `text_model.` before every name; newer versions of transformers do not.
            clip = load_module(
                lambda: CLIPTextModel(clip_config),
                source,
                dtype=dtype,
                device=device,
                rename=lambda name: f"text_model.{name.removeprefix('text_model.')}",
            )
        positions = torch.arange(clip_config.max_position_embeddings, device=device)
        for name, _ in list(clip.named_buffers()):  # the one buffer that no file stores
            parent, _, leaf = name.rpartition(".")
            clip.get_submodule(parent).register_buffer(leaf, positions[None], persistent=False)
        with WeightSource.open(files["text_encoder_2"]) as file:
            source = pick(file, "t5")
            t5_config = _config(T5Config, files["text_encoder_2/config.json"], source)
            t5 = load_module(
                lambda: T5EncoderModel(t5_config),
                source,
                dtype=dtype,
                device=device,
                tied={"encoder.embed_tokens.weight": "shared.weight"},
            )
        return cls(
            _tokenizer(CLIPTokenizer, files["tokenizer"], clip_config.vocab_size),
            clip,
            _tokenizer(T5Tokenizer, files["tokenizer_2"], t5_config.vocab_size),
            t5,
            max_sequence_length=max_sequence_length,
            cache_size=cache_size,
        )

    def encode(self, prompts: Sequence[str]) -> TextCond:
        """Encode prompts, a row for each. What is over T5's limit is not read; `tokens_over` tells."""
        return TextCond.cat([self._lookup(prompt) for prompt in prompts])

    def tokens_over(self, prompt: str) -> int:
        """By how many T5 tokens a prompt is over the limit; 0 if it fits.

        CLIP reads 77 tokens at most and adds only the pooled vector; what it leaves out is no loss to report.
        """
        return max(0, len(self.t5_tokenizer(prompt).input_ids) - self.max_sequence_length)

    def _lookup(self, prompt: str) -> TextCond:
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        cond = self._encode_one(prompt)
        if self.cache_size:
            self._cache[prompt] = cond
            if len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return cond

    def _encode_one(self, prompt: str) -> TextCond:
        # CLIP reads from left to right, so padding behind the end-of-text token cannot change what is pooled there.
        clip_ids = self.clip_tokenizer(
            prompt,
            max_length=self.clip.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        t5_ids = self.t5_tokenizer(
            prompt,
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        pooled = self.clip(clip_ids.to(self.clip.device)).pooler_output
        tokens = self.t5(t5_ids.to(self.t5.device)).last_hidden_state
        return TextCond(tokens, pooled)


def _config(kind: type[Config], path: Path, source: WeightSource) -> Config:
    """An encoder's config. Raises WeightsError for what is none, or asks for more layers than there are tensors."""
    try:
        config = kind.from_json_file(path)
    except Exception as error:  # noqa: BLE001  of many types, and none that they share
        raise WeightsError(f"{path} cannot be used: {_short(error)}") from None
    if config.num_hidden_layers > len(source.recipes):  # making them would take for ever
        raise WeightsError(f"{path} asks for {config.num_hidden_layers:,} layers, more than {source.path} has tensors")
    return config


def _tokenizer(kind: type[PreTrainedTokenizerBase], folder: Path, pieces: int) -> PreTrainedTokenizerBase:
    """Raises WeightsError for a folder without a vocabulary, of which transformers makes a tokenizer that knows no
    word, and for one that cannot be read or has more pieces than the encoder.
    """
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        raise WeightsError(f"{folder} is not a tokenizer: it lacks {' or '.join(map(' and '.join, VOCABULARIES))}")
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  the same
        raise WeightsError(f"{folder} cannot be read as a tokenizer: {_short(error)}") from None
    if len(tokenizer) > pieces:
        raise WeightsError(f"{folder} has {len(tokenizer):,} pieces, and its text encoder {pieces:,}")
    return tokenizer


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
