"""Prompts to what the transformer reads: T5's tokens and CLIP's pooled vector.

The networks and tokenizers are transformers' own. Every prompt is encoded alone, so its encoding does not depend on
what else is in the batch, and is kept in a small cache.
Shapes: B batch, L tokens, D width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.source import opened
from flux_engine.memory import T5_BLOCKS, Place, Residents, load_parts
from flux_engine.quantization.policy import treatment
from flux_engine.text.encoders import Cache, TextCond, check_depth, load_clip, load_tokenizer, read_config


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
        residents: Residents | None = None,
    ) -> None:
        self.clip_tokenizer, self.clip = clip_tokenizer, clip
        self.t5_tokenizer, self.t5 = t5_tokenizer, t5
        self.max_sequence_length = max_sequence_length
        self._cache: Cache[str, TextCond] = Cache(cache_size)
        self._residents = residents or Residents()

    @classmethod
    def load(
        cls,
        files: Mapping[str, Path],
        place: Place,
        *,
        max_sequence_length: int,
        cache_size: int = 64,
    ) -> FluxTextEncoder:
        """Read both encoders and their tokenizers: four folders as Hugging Face repositories hold them. Of 8 bits is T5
        alone, which is thirty times larger.

        Raises WeightsError for what is not whole.
        """
        # float16 overflows inside T5, which was trained in bfloat16 (huggingface/candle issue 2480).
        if place.dtype == torch.float16:
            place = replace(place, dtype=torch.float32)
        clip = load_clip(files, "text_encoder", CLIPTextModel, place)
        t5_config = read_config(T5Config, files["text_encoder_2/config.json"])
        with opened(files["text_encoder_2"], keep=True) as file:
            source = pick(file, "t5")
            check_depth(t5_config, source)
            t5 = load_parts(
                lambda: T5EncoderModel(t5_config),
                source,
                place,
                {"text": T5_BLOCKS},
                tied={"encoder.embed_tokens.weight": "shared.weight"},
                treat=treatment("t5", place.encoders or place.quantization),
                keep=True,
            )
        return cls(
            load_tokenizer(CLIPTokenizer, files["tokenizer"], clip.config.vocab_size),
            clip,
            load_tokenizer(T5Tokenizer, files["tokenizer_2"], t5_config.vocab_size),
            t5,
            max_sequence_length=max_sequence_length,
            cache_size=cache_size,
            residents=place.residents,
        )

    def encode(self, prompts: Sequence[str]) -> TextCond:
        """Encode prompts, a row for each. What is over T5's limit is not read; `tokens_over` tells."""
        device = self.clip.device
        # What is remembered is on the host: 64 prompts take a quarter of a gigabyte.
        rows = [self._cache.get(prompt, lambda p=prompt: self._encode_one(p).to("cpu")) for prompt in prompts]
        return TextCond.cat([row.to(device) for row in rows])

    def clear(self) -> None:
        """Forget what was encoded, because weights changed."""
        self._cache.clear()

    def tokens_over(self, prompt: str) -> int:
        """By how many T5 tokens a prompt is over the limit; 0 if it fits.

        CLIP reads 77 tokens at most and adds only the pooled vector; what it leaves out is no loss to report.
        """
        return max(0, len(self.t5_tokenizer(prompt, verbose=False).input_ids) - self.max_sequence_length)

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
        with self._residents.use("text"):
            pooled = self.clip(clip_ids.to(self.clip.device)).pooler_output
            tokens = self.t5(t5_ids.to(self.t5.device)).last_hidden_state
        return TextCond(tokens, pooled)
