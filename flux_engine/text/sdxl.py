"""Prompts to what SDXL's UNet reads: the states before the last layer of two CLIPs, and the second one's pooled vector.

The networks and tokenizers are transformers' own. Every prompt is encoded alone, so its encoding does not depend on
what else is in the batch, and is kept in a small cache.
Shapes: B batch, L tokens (77 for every chunk of a prompt), D width of both encoders together, P pooled width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerBase

from flux_engine.checks import MAX_PROMPT_CHARACTERS
from flux_engine.errors import InvalidRequest, WeightsError
from flux_engine.memory import Place, Residents
from flux_engine.text.encoders import Cache, TextCond, load_clip, load_tokenizer
from flux_engine.text.inversion import token_names
from flux_engine.text.prompts import Piece, weighted

LENGTH = 77
"""Tokens of a chunk, with the one that begins and the one that ends it."""
MAX_WEIGHT = 1_000
"""Of a word, in either direction: more brackets than anyone means would run over."""


@dataclass(frozen=True)
class Reader:
    """One CLIP with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    clip: Any

    @property
    def table(self) -> nn.Embedding:
        return self.clip.get_input_embeddings()

    def tokens(self, pieces: Sequence[Piece], learned: Sequence[str]) -> list[tuple[int, float]]:
        """The pieces' tokens with their weights, without those that begin and end a prompt."""
        first = self.clip.config.vocab_size  # learned tokens stand behind the table as it was
        found: list[tuple[int, float]] = []
        for piece in pieces:
            splitter = "|".join(map(re.escape, learned))
            for part in re.split(f"({splitter})", piece.text) if learned else [piece.text]:
                ids = (
                    [first + learned.index(part)]
                    if part in learned
                    else self.tokenizer(part, verbose=False).input_ids[1:-1]
                )
                found += [(number, piece.weight) for number in ids]
        return found

    def read(self, tokens: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor | None]:
        """One chunk -> the states before the last layer (1, 77, D), the projected vector (1, P) if there is one."""
        config = self.clip.config
        padding = [self.tokenizer.pad_token_id] * (LENGTH - 2 - len(tokens))
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        assert len(tokens) <= LENGTH - 2 <= config.max_position_embeddings
        line = [begin, *(number for number, _ in tokens), end, *padding]
        out = self.clip(torch.tensor([line], device=self.clip.device), output_hidden_states=True)
        states = out.hidden_states[-2]
        projection = getattr(self.clip, "text_projection", None)
        # Where the first end is. transformers takes the highest number for it where a config is as old as SDXL's, and
        # learned tokens have higher ones.
        pooled = None if projection is None else projection(out.last_hidden_state[:, line.index(end)])
        weights = [weight for _, weight in tokens]
        if any(weight != 1.0 for weight in weights):
            # As AUTOMATIC1111: times the weight, and the mean as it was.
            factor = torch.tensor([1.0, *weights, 1.0, *(1.0 for _ in padding)], device=states.device)
            scaled = states.float() * factor[None, :, None]
            states = (scaled * (states.float().mean() / scaled.mean())).to(states.dtype)
            if not states.isfinite().all():
                raise InvalidRequest("a prompt's weights leave nothing of it that is finite", field="prompt")
        return states, pooled


class SDXLTextEncoder:
    """Both CLIPs, or the second alone for the refiner.

    Source: SDXL (arXiv 2307.01952) section 2.2; Stability-AI/generative-models, configs/inference/sd_xl_base.yaml.
    """

    def __init__(self, readers: Sequence[Reader], *, cache_size: int = 64, residents: Residents | None = None) -> None:
        self.readers = tuple(readers)
        self._residents = residents or Residents()
        self._cache: Cache[tuple[str, bool, int], TextCond] = Cache(cache_size)
        self._plain = tuple(reader.table for reader in self.readers)
        self.learned: tuple[str, ...] = ()
        self.words: Mapping[str, str] = {}

    @classmethod
    def load(
        cls,
        files: Mapping[str, Path],
        place: Place,
        *,
        cache_size: int = 64,
    ) -> SDXLTextEncoder:
        """Read both encoders and their tokenizers. Raises WeightsError for what is not whole."""
        readers: list[Reader] = []
        for part, folder, kind in (
            ("text_encoder", "tokenizer", CLIPTextModel),
            ("text_encoder_2", "tokenizer_2", CLIPTextModelWithProjection),
        ):
            clip = load_clip(files, part, kind, place)
            readers.append(Reader(load_tokenizer(CLIPTokenizer, files[folder], clip.config.vocab_size), clip))
        return cls(readers, cache_size=cache_size, residents=place.residents)

    def second(self) -> SDXLTextEncoder:
        """The second encoder alone, sharing its weights."""
        second = SDXLTextEncoder(self.readers[-1:], cache_size=self._cache.size, residents=self._residents)
        second._plain, second.learned, second.words = self._plain[-1:], self.learned, self.words
        return second

    def encode(self, prompts: Sequence[str | None], *, weights: bool = False, chunks: bool = False) -> TextCond:
        """Encode prompts, a row for each; None is zeros. Raises InvalidRequest for weights that cannot be.

        What is over 77 tokens is not read, unless in `chunks`: then all have as many as the longest.
        """
        count = max((self.chunk_count(prompt, weights) for prompt in prompts if prompt), default=1) if chunks else 1
        rows: list[TextCond] = []
        for prompt in prompts:
            text = prompt or ""
            key = (text, weights, count)
            cond = self._cache.get(key, lambda t=text: self._encode_one(t, weights, count).to("cpu"))
            cond = cond.to(self.readers[0].clip.device)
            if prompt is None:
                cond = TextCond(torch.zeros_like(cond.tokens), torch.zeros_like(cond.pooled))
            rows.append(cond)
        return TextCond.cat(rows)

    def clear(self) -> None:
        """Forget what was encoded, because weights changed."""
        self._cache.clear()

    def chunk_count(self, prompt: str, weights: bool) -> int:
        return max(1, -(-max(map(len, self._tokens(prompt, weights))) // (LENGTH - 2)))

    def tokens_over(self, prompt: str, weights: bool = False) -> int:
        """By how many tokens a prompt is over one chunk; 0 if it fits."""
        return max(0, max(map(len, self._tokens(prompt, weights))) - (LENGTH - 2))

    @property
    def width(self) -> int:
        """Of the tokens."""
        return sum(reader.table.embedding_dim for reader in self.readers)

    @property
    def limit(self) -> int:
        """Tokens of a prompt that are read, with the two that begin and end it."""
        return LENGTH

    def widened(self, tables: Sequence[Tensor]) -> list[nn.Embedding]:
        """Each encoder's table with learned tokens (textual inversion, arXiv 2208.01618) behind it, for `learn`.

        `tables` has (n, D) for both encoders. Raises WeightsError if the widths do not fit, or for what is not finite.
        """
        tables = tables[-len(self.readers) :]
        widths = [plain.embedding_dim for plain in self._plain]
        if [table.shape[1] for table in tables] != widths:
            raise WeightsError(
                f"learned tokens are {' and '.join(str(table.shape[1]) for table in tables)} wide; "
                f"this model reads {' and '.join(map(str, widths))}"
            )
        rows = [table.to(plain.weight) for plain, table in zip(self._plain, tables, strict=True)]
        if not all(row.isfinite().all() for row in rows):
            raise WeightsError(
                f"learned tokens have values that are not finite as {str(rows[0].dtype).removeprefix('torch.')}"
            )
        return [
            nn.Embedding.from_pretrained(torch.cat((plain.weight, row)), freeze=True)
            for plain, row in zip(self._plain, rows, strict=True)
        ]

    def learn(self, tables: Sequence[nn.Embedding], words: Mapping[str, str]) -> None:
        """Read `<s0>`, `<s1>`, ... from `tables` that `widened` made, instead of what was learned before.

        `words` says what stands for which of them in a prompt.
        """
        for reader, table in zip(self.readers, tables, strict=True):
            reader.clip.set_input_embeddings(table)
        self.learned = token_names(tables[0].num_embeddings - self._plain[0].num_embeddings)
        self.words = dict(words)
        self._cache.clear()

    def forget(self) -> None:
        """Take the learned tokens away again."""
        for reader, plain in zip(self.readers, self._plain, strict=True):
            reader.clip.set_input_embeddings(plain)
        self.learned, self.words = (), {}
        self._cache.clear()

    def put_words(self, prompt: str) -> str:
        """A prompt with learned tokens in the place of their words. Raises InvalidRequest if it gets too long."""
        for word, tokens in self.words.items():
            length = len(prompt) + prompt.count(word) * (len(tokens) - len(word))
            if length > MAX_PROMPT_CHARACTERS:
                raise InvalidRequest(
                    f"with {tokens[:40]!r} for {word[:40]!r} the prompt has {length:,} characters; "
                    f"at most {MAX_PROMPT_CHARACTERS:,} are read",
                    field="prompt",
                )
            prompt = prompt.replace(word, tokens)
        return prompt

    def plain(self) -> list[Tensor]:
        """Each encoder's table without learned tokens."""
        return [table.weight for table in self._plain]

    def _tokens(self, prompt: str, weights: bool) -> list[list[tuple[int, float]]]:
        """For each encoder."""
        pieces = weighted(prompt) if weights else [Piece(prompt, 1.0)]
        for piece in pieces:
            if not abs(piece.weight) <= MAX_WEIGHT:
                raise InvalidRequest(
                    f"a prompt counts {piece.text[:40]!r} {piece.weight:g} times; at most {MAX_WEIGHT} can be",
                    field="prompt",
                )
        return [reader.tokens(pieces, self.learned) for reader in self.readers]

    def _encode_one(self, prompt: str, weights: bool, chunks: int) -> TextCond:
        room = LENGTH - 2
        rows: list[list[Tensor]] = []
        pooled: Tensor | None = None
        with self._residents.use("text"):
            for reader, tokens in zip(self.readers, self._tokens(prompt, weights), strict=True):
                read = [reader.read(tokens[i * room : (i + 1) * room]) for i in range(chunks)]
                rows.append([states for states, _ in read])
                pooled = read[0][1]  # the last encoder's, of the first chunk
        assert pooled is not None
        return TextCond(torch.cat([torch.cat(row, dim=1) for row in rows], dim=-1), pooled)
