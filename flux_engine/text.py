"""Prompts to what the transformer reads: T5's tokens and CLIP's pooled vector.

The networks and tokenizers are transformers' own. Every prompt is encoded alone, so its encoding does not depend on
what else is in the batch, and is kept in a small cache.
Shapes: B batch, L tokens, D width, P pooled width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
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

Key = TypeVar("Key")


@dataclass(frozen=True)
class TextCond:
    """Encoded prompts."""

    tokens: Tensor
    """(B, L, D): T5's last hidden states; or those before the last of both CLIPs, side by side."""
    pooled: Tensor
    """(B, P): CLIP's pooled output, or its projection."""

    @staticmethod
    def cat(parts: Sequence[TextCond]) -> TextCond:
        return TextCond(torch.cat([p.tokens for p in parts]), torch.cat([p.pooled for p in parts]))


class Cache(Generic[Key]):
    """The encodings of the prompts that were used last."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Key, TextCond] = OrderedDict()

    def get(self, key: Key, make: Callable[[], TextCond]) -> TextCond:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = make()
        if self.size:
            self._kept[key] = made
            if len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        self._kept.clear()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def load_clip(
    files: Mapping[str, Path],
    part: str,
    kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """One of transformers' text models, from the files of a part. Of several in a file it is the one that is as wide as
    the part's config says."""
    config = read_config(CLIPTextConfig, files[f"{part}/config.json"])

    def stored(name: str) -> str:
        # Published files say `text_model.` before every name; newer versions of transformers do not.
        return name if name.startswith("text_projection.") else f"text_model.{name.removeprefix('text_model.')}"

    with WeightSource.open(files[part]) as file:
        source = pick(file, "clip", width=config.hidden_size)
        check_depth(config, source)
        clip = load_module(lambda: kind(config), source, dtype=dtype, device=device, rename=stored)
    positions = torch.arange(config.max_position_embeddings, device=device)
    for name, _ in list(clip.named_buffers()):  # the one buffer that no file stores
        parent, _, leaf = name.rpartition(".")
        clip.get_submodule(parent).register_buffer(leaf, positions[None], persistent=False)
    return clip


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
        self._cache: Cache[str] = Cache(cache_size)

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
        clip = load_clip(files, "text_encoder", CLIPTextModel, dtype=dtype, device=device)
        t5_config = read_config(T5Config, files["text_encoder_2/config.json"])
        with WeightSource.open(files["text_encoder_2"]) as file:
            source = pick(file, "t5")
            check_depth(t5_config, source)
            t5 = load_module(
                lambda: T5EncoderModel(t5_config),
                source,
                dtype=dtype,
                device=device,
                tied={"encoder.embed_tokens.weight": "shared.weight"},
            )
        return cls(
            load_tokenizer(CLIPTokenizer, files["tokenizer"], clip.config.vocab_size),
            clip,
            load_tokenizer(T5Tokenizer, files["tokenizer_2"], t5_config.vocab_size),
            t5,
            max_sequence_length=max_sequence_length,
            cache_size=cache_size,
        )

    def encode(self, prompts: Sequence[str]) -> TextCond:
        """Encode prompts, a row for each. What is over T5's limit is not read; `tokens_over` tells."""
        return TextCond.cat([self._cache.get(prompt, lambda p=prompt: self._encode_one(p)) for prompt in prompts])

    def tokens_over(self, prompt: str) -> int:
        """By how many T5 tokens a prompt is over the limit; 0 if it fits.

        CLIP reads 77 tokens at most and adds only the pooled vector; what it leaves out is no loss to report.
        """
        return max(0, len(self.t5_tokenizer(prompt).input_ids) - self.max_sequence_length)

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


def read_config(kind: type[Config], path: Path) -> Config:
    """An encoder's config. Raises WeightsError for what is none."""
    try:
        return kind.from_json_file(path)
    except Exception as error:  # noqa: BLE001  of many types, and none that they share
        raise WeightsError(f"{path} cannot be used: {_short(error)}") from None


def check_depth(config: CLIPTextConfig | T5Config, source: WeightSource) -> None:
    """Raises WeightsError if a config asks for more layers than there are tensors: making them would take for ever."""
    if config.num_hidden_layers > len(source.recipes):
        raise WeightsError(
            f"the config asks for {config.num_hidden_layers:,} layers, more than {source.path} has tensors"
        )


def load_tokenizer(kind: type[PreTrainedTokenizerBase], folder: Path, pieces: int) -> PreTrainedTokenizerBase:
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
