"""What both families' text encoders need: encoded prompts and their cache, and reading transformers' models strictly.

Shapes: B batch, L tokens, D width, P pooled width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    T5Config,
)

from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.source import WeightSource, opened
from flux_engine.checkpoints.tables import published_clip
from flux_engine.errors import WeightsError
from flux_engine.memory import CLIP_LAYERS, Place, load_parts

Config = TypeVar("Config", CLIPTextConfig, T5Config)
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Files that a tokenizer's pieces are in."""

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class TextCond:
    """Encoded prompts."""

    tokens: Tensor
    """(B, L, D): T5's last hidden states; or those before the last of both CLIPs, side by side."""
    pooled: Tensor
    """(B, P): CLIP's pooled output, or its projection."""

    def each(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and pooled vector of every row, each as a batch of one."""
        return zip(self.tokens.split(1), self.pooled.split(1), strict=True)

    def to(self, device: torch.device | str) -> TextCond:
        return TextCond(self.tokens.to(device), self.pooled.to(device))

    @staticmethod
    def cat(parts: Sequence[TextCond]) -> TextCond:
        return TextCond(torch.cat([p.tokens for p in parts]), torch.cat([p.pooled for p in parts]))


class Cache(Generic[Key, Value]):
    """The encodings of the prompts or pictures that were used last."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
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
    place: Place,
) -> Any:
    """One of transformers' text models, from the files of a part. Of several in a file it is the one that is as wide as
    the part's config says."""
    config = read_config(CLIPTextConfig, files[f"{part}/config.json"])
    with opened(files[part], keep=True) as file:
        source = pick(file, "clip", width=config.hidden_size)
        check_depth(config, source)
        parts = {"text": CLIP_LAYERS}
        clip = load_parts(lambda: kind(config), source, place, parts, rename=published_clip, keep=True)
    place_positions(clip, config.max_position_embeddings, place.device)
    return clip


def place_positions(module: nn.Module, count: int, device: torch.device) -> None:
    """The numbers of the positions, the one buffer of transformers' models that no file stores."""
    positions = torch.arange(count, device=device)
    for name, _ in list(module.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent).register_buffer(leaf, positions[None], persistent=False)


def read_config(kind: type[Config], path: Path) -> Config:
    """An encoder's config. Raises WeightsError for what is none."""
    try:
        return kind.from_json_file(path)
    except Exception as error:  # noqa: BLE001  of many types, and none that they share
        raise WeightsError(f"{path} cannot be used: {said_of(error)}") from None


def check_depth(config: CLIPTextConfig | T5Config | SiglipVisionConfig, source: WeightSource) -> None:
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
        raise WeightsError(f"{folder} cannot be read as a tokenizer: {said_of(error)}") from None
    if len(tokenizer) > pieces:
        raise WeightsError(f"{folder} has {len(tokenizer):,} pieces, and its text encoder {pieces:,}")
    return tokenizer


def said_of(error: Exception) -> str:
    """An error in one line, for the message of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
