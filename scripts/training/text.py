"""Tokenizers and text encoders: CLIP and T5 of the true classes, taught to tell what a caption says.

The encoders learn to read before anything is drawn: from CLIP's pooled vector, and from T5's tokens through a small
attention, every attribute of the scene is predicted. The read-outs are thrown away and the encoders stay as they are,
so every transformer of the family shares them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import shutil
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import captions, world
from benchmarks.world import Scene
from flux_engine.checkpoints.tables import published_clip
from flux_engine.specs import DEMO_DEV
from training.run import OUT, ROOT, Run, autocast, log, read_average

WIDTH = DEMO_DEV.transformer.context_in_dim
SECOND_WIDTH = 32
"""Of the SDXL models' second encoder."""
LENGTH = DEMO_DEV.max_sequence_length


def make_tokenizers(args: argparse.Namespace) -> None:
    """CLIP's byte-pair vocabulary as transformers reads it, and a small Unigram tokenizer for T5."""
    if args.vocabulary:
        write_clip_tokenizer(args.vocabulary, OUT / "clip")
    else:
        shutil.copytree(ROOT / "weights" / "demo" / "flux" / "tokenizer", OUT / "clip", dirs_exist_ok=True)
    write_t5_tokenizer(OUT / "t5")


def write_clip_tokenizer(vocabulary: Path, folder: Path) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    with gzip.open(vocabulary, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    ids = CLIPTokenizer.from_pretrained(folder)("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407], ids


def write_t5_tokenizer(folder: Path) -> None:
    """T5's pieces are the captions' words, by how often they come, and every printable character for the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5Tokenizer

    texts = captions.vocabulary()
    words = Counter(word for text in texts for word in re.findall(r"[\w-]+", text))
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    total = sum(words.values())
    for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        pieces["\u2581" + word] = math.log(count / total)
    for character in ["\u2581", *map(chr, range(33, 127))]:
        pieces.setdefault(character, -15.0)
    t5 = Tokenizer(models.Unigram(list(pieces.items()), unk_id=2))
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.decoder = decoders.Metaspace()
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = T5Tokenizer(tokenizer_object=t5, extra_ids=0, model_max_length=LENGTH)
    wrapped.save_pretrained(folder)
    longest = max(len(ids) for ids in (t5.encode(text).ids for text in texts))
    log.info("T5: %d pieces; the longest caption has %d of %d tokens", t5.get_vocab_size(), longest, LENGTH)
    assert longest <= LENGTH


def clip_config(width: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )


def silence_unseen(clip: Any, tokenizer: Any) -> None:
    """Zero the rows that no caption uses: they are never trained, and random ones would say something."""
    seen = {i for text in captions.vocabulary(20_000) for i in tokenizer(text).input_ids}
    keep = torch.zeros(49408, 1)
    keep[sorted(seen)] = 1.0
    with torch.no_grad():
        clip.get_input_embeddings().weight.mul_(keep)


class TextEncoders(nn.Module):
    """Both encoders of the FLUX models with their tokenizers: captions in, what a FLUX transformer reads out."""

    def __init__(self) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

        super().__init__()
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(OUT / "clip")
        self.t5_tokenizer = T5Tokenizer.from_pretrained(OUT / "t5")
        self.clip = CLIPTextModel(clip_config(WIDTH))
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=WIDTH,
                d_kv=16,
                d_ff=2 * WIDTH,
                num_layers=3,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
            )
        )

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> T5's tokens (B, L, WIDTH), CLIP's pooled vector (B, WIDTH)."""
        clip_ids = self.clip_tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        t5_ids = self.t5_tokenizer(
            texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        pooled = self.clip(clip_ids.input_ids).pooler_output
        return self.t5(t5_ids).last_hidden_state, pooled


class PairedEncoders(nn.Module):
    """Both encoders of the SDXL models: the FLUX models' CLIP, as it is, and a second one with a projection, whose
    padding is another token, as in SDXL."""

    def __init__(self) -> None:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(OUT / "clip")
        self.tokenizer_2 = CLIPTokenizer.from_pretrained(OUT / "clip", pad_token="!")
        self.clip_2 = CLIPTextModelWithProjection(clip_config(SECOND_WIDTH))
        self.clip = load_text().clip

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> states before the last layer, both side by side (B, 77, WIDTH + SECOND_WIDTH); the second's projected
        vector (B, SECOND_WIDTH)."""
        ids, ids_2 = (
            tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
            for tokenizer in (self.tokenizer, self.tokenizer_2)
        )
        with torch.no_grad():
            first = self.clip(ids, output_hidden_states=True)
        second = self.clip_2(ids_2, output_hidden_states=True)
        return torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1), second.text_embeds


SLOTS: dict[str, tuple[str, ...]] = {
    **{
        f"{attribute} {number}": ("", *values)
        for number in (0, 1)
        for attribute, values in (
            ("shape", (*world.SHAPES, world.MARKED_SHAPE)),
            ("color", tuple(world.COLORS)),
            ("size", tuple(world.SIZES)),
        )
    },
    "place": ("", *world.PLACES),
    "outline": ("", *world.COLORS),
    "relation": ("", *world.RELATIONS),
    "kind": world.GROUNDS,
    "ground": ("", *world.COLORS),
    "second": ("", *world.COLORS),
    "axis": ("", *world.AXES),
}
"""What a caption can say, each with the answers there are; empty for nothing said."""


def answers(scene: Scene) -> list[int]:
    """The scene as the number of its answer for every slot."""
    said: dict[str, str] = dict.fromkeys(SLOTS, "")
    for number, thing in enumerate(scene.things):
        said |= {f"shape {number}": thing.shape, f"color {number}": thing.color, f"size {number}": thing.size}
    first, ground = scene.things[0], scene.ground
    said |= {"place": first.place, "outline": first.outline, "relation": scene.relation}
    said |= {"kind": ground.kind, "ground": ground.color, "second": ground.second, "axis": ground.axis}
    return [values.index(said[slot]) for slot, values in SLOTS.items()]


class ReadOut(nn.Module):
    """Every slot's answer from the tokens by attention, and from the pooled vector by one linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(values) for values in SLOTS.values()]
        self.queries = nn.Parameter(torch.randn(len(SLOTS), width) / width**0.5)
        self.key = nn.Linear(width, width)
        self.tokens = nn.ModuleList(nn.Linear(width, size) for size in self.sizes)
        self.pooled = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor, pooled: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        weight = (self.key(tokens) @ self.queries.T / tokens.shape[-1] ** 0.5).softmax(dim=1)  # (B, L, slots)
        gathered = weight.transpose(1, 2) @ tokens  # (B, slots, D)
        from_tokens = [layer(gathered[:, i]) for i, layer in enumerate(self.tokens)]
        return from_tokens, list(self.pooled(pooled).split(self.sizes, dim=1))


def disturb(text: str, rng: random.Random) -> str:
    """Put a word in that means nothing here, as people do."""
    words = text.split(" ")
    noise = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
    words.insert(rng.randint(0, len(words)), noise)
    return " ".join(words)


def train_text(args: argparse.Namespace) -> None:
    torch.manual_seed(3)
    encoders = TextEncoders()
    silence_unseen(encoders.clip, encoders.clip_tokenizer)
    net = nn.ModuleDict({"encoders": encoders, "readout": ReadOut(WIDTH)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    teach(Run("text", net, [optimizer], steps=args.steps, ema=0.995), encoders, net["readout"], args.batch)


def train_paired(args: argparse.Namespace) -> None:
    """The second encoder of the SDXL models. It learns alone, so that neither leans on the other."""
    torch.manual_seed(4)
    encoders = PairedEncoders()
    silence_unseen(encoders.clip_2, encoders.tokenizer_2)
    net = nn.ModuleDict({"clip_2": encoders.clip_2, "readout": ReadOut(SECOND_WIDTH)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens, pooled = encoders(texts)
        return tokens[..., WIDTH:], pooled

    teach(Run("sdxl-text", net, [optimizer], steps=args.steps, ema=0.995), encode, net["readout"], args.batch)


def teach(run: Run, encode: Callable[[list[str]], tuple[Tensor, Tensor]], readout: nn.Module, batch: int) -> None:
    def loss_of(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        scenes = [world.sample_scene(rng, marked=0.08) for _ in range(batch)]
        texts = [captions.write(scene, rng) for scene in scenes]
        texts = [disturb(text, rng) if rng.random() < 0.1 else text for text in texts]
        target = torch.tensor([answers(scene) for scene in scenes])
        with autocast():
            tokens, pooled = encode(texts)
        losses: list[Any] = []
        right: list[float] = []
        for logits in readout(tokens.float(), pooled.float()):
            losses += [nn.functional.cross_entropy(part, target[:, i]) for i, part in enumerate(logits)]
            hits = torch.stack([part.argmax(1) == target[:, i] for i, part in enumerate(logits)])
            right.append(hits.all(dim=0).float().mean().item())
        return torch.stack(losses).mean(), {"tokens_right": right[0], "pooled_right": right[1]}

    run.train(loss_of)


def load_text() -> TextEncoders:
    """The trained encoders of the FLUX models, as they stay."""
    encoders = TextEncoders()
    encoders.load_state_dict(read_average("text", "encoders."))
    return encoders.eval().requires_grad_(False)


def load_paired() -> PairedEncoders:
    """Those of the SDXL models."""
    encoders = PairedEncoders()
    kept = {published_clip(k): v for k, v in read_average("sdxl-text", "clip_2.").items()}
    encoders.clip_2.load_state_dict({k: kept[published_clip(k)] for k in encoders.clip_2.state_dict()})
    return encoders.eval().requires_grad_(False)
