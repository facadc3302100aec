"""Pictures as prompts: FLUX.1 Redux, which adds what SigLIP sees in a picture to T5's tokens.

The vision tower is transformers' own. Every picture is encoded alone, so its tokens do not depend on what else is in
the batch, and is kept in a small cache.
Shapes: B batch, N pictures, L tokens of one, D width of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from flux_engine.checkpoints.detect import pick
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.settings import read_json
from flux_engine.checkpoints.source import WeightSource
from flux_engine.errors import WeightsError
from flux_engine.models.redux import ReduxAdapter
from flux_engine.params import ReduxParams
from flux_engine.text.encoders import Cache, TextCond, check_depth, place_positions, said_of

SO400M: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
"""google/siglip-so400m-patch14-384, which Redux was trained with: for files that come without a config."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a picture to the numbers a vision tower reads: stretched to its size, whatever the shape, and normalised."""

    height: int
    width: int
    resample: Image.Resampling = Image.Resampling.BICUBIC
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def read(cls, path: Path) -> Preprocessing:
        """Of a `preprocessor_config.json`; what it does not say is SigLIP's.

        Raises WeightsError for what is none, or asks for other steps.
        """
        said = read_json(path)
        for step, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True),
                             ("do_center_crop", False), ("do_pad", False)):  # fmt: skip
            if said.get(step) is (not wanted):
                raise WeightsError(f"{path} says {step}: {said[step]}, which is not how SigLIP reads pictures")
        try:
            read = cls(
                height=int(said["size"]["height"]),
                width=int(said["size"]["width"]),
                resample=Image.Resampling(said.get("resample", cls.resample)),
                rescale=float(said.get("rescale_factor", cls.rescale)),
                mean=tuple(map(float, said.get("image_mean", cls.mean))),
                std=tuple(map(float, said.get("image_std", cls.std))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} cannot be used: {said_of(error)}") from None
        if len(read.mean) != 3 or len(read.std) != 3 or 0 in read.std:
            raise WeightsError(f"{path} cannot be used: it has to give three means and three deviations other than 0")
        return read

    def __call__(self, picture: Image.Image) -> Tensor:
        """(1, 3, H, W), float32."""
        stretched = picture.convert("RGB").resize((self.width, self.height), self.resample)
        # As transformers does it: rounded to float32 after each step.
        pixels = torch.from_numpy(np.array(stretched)).double().mul(self.rescale).float()
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)[None].contiguous()


class Redux:
    """SigLIP's vision tower and the adapter behind it."""

    def __init__(
        self, tower: SiglipVisionModel, adapter: ReduxAdapter, preprocessing: Preprocessing, *, cache_size: int = 8
    ) -> None:
        self.tower, self.adapter, self.preprocessing = tower, adapter, preprocessing
        self._cache: Cache[str, Tensor] = Cache(cache_size)

    @classmethod
    def load(cls, files: Mapping[str, Path], *, dtype: torch.dtype, device: torch.device, cache_size: int = 8) -> Redux:
        """Read `adapter` and `image_encoder`, files or folders, as `Manifest.obtain` gives them. Configs are optional:
        `image_encoder/config.json`, or the folder's, and `feature_extractor/preprocessor_config.json`.

        Raises WeightsError for what is not whole, or does not fit together.
        """
        # As with the other text encoders: nothing says that float16 is wide enough, and it is computed once.
        dtype = torch.float32 if dtype == torch.float16 else dtype
        with WeightSource.open(files["adapter"]) as file:
            source = pick(file, "redux")
            params = ReduxParams.from_shapes(source.shapes)
            adapter = load_module(lambda: ReduxAdapter(params), source, dtype=dtype, device=device)
        tower = _load_tower(files, dtype=dtype, device=device)
        if tower.config.hidden_size != params.in_dim:
            raise WeightsError(
                f"{files['adapter']} adapts what is {params.in_dim} wide, and {files['image_encoder']} is "
                f"{tower.config.hidden_size} wide: they do not belong together"
            )
        said = files.get("feature_extractor/preprocessor_config.json")
        side, patch = _sides(tower.config)
        preprocessing = Preprocessing.read(said) if said else Preprocessing(height=side, width=side)
        if {preprocessing.height // patch, preprocessing.width // patch} != {side // patch}:
            raise WeightsError(
                f"{said} makes pictures {preprocessing.width}x{preprocessing.height}, and {files['image_encoder']} "
                f"reads {side}x{side}"
            )
        return cls(tower, adapter, preprocessing, cache_size=cache_size)

    @property
    def text_dim(self) -> int:
        """The width of the text it was made for."""
        return self.adapter.params.text_dim

    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, L, D): every picture's tokens, 729 of them for the published tower."""
        return torch.cat([self._cache.get(_key(one), lambda one=one: self._encode_one(one)) for one in pictures])

    def _encode_one(self, picture: Image.Image) -> Tensor:
        pixels = self.preprocessing(picture).to(self.tower.device, self.tower.dtype)
        return self.adapter(self.tower(pixels).last_hidden_state)


def mix(text: TextCond, tokens: Tensor, strength: float = 1.0) -> TextCond:
    """Prompts with pictures behind them. tokens (N, L, D), as `Redux.encode` gives them.

    Every prompt gets all N pictures, one after another in their order, each times `strength`; where the rows of a batch
    have pictures of their own, mix row by row and `TextCond.cat`. CLIP's pooled vector has no part in it. (diffusers'
    pipeline has `prompt_embeds_scale`, which scales the text as well, and adds up several pictures with their texts.)
    Raises WeightsError for tokens made for text of another width.
    """
    if tokens.shape[-1] != text.tokens.shape[-1]:
        raise WeightsError(
            f"the picture's tokens are {tokens.shape[-1]} wide and the prompt's {text.tokens.shape[-1]}: this Redux "
            "adapter was made for another model"
        )
    behind = tokens.to(text.tokens).flatten(0, 1) * strength
    return TextCond(torch.cat((text.tokens, behind.expand(len(text.tokens), -1, -1)), dim=1), text.pooled)


def _load_tower(files: Mapping[str, Path], *, dtype: torch.dtype, device: torch.device) -> SiglipVisionModel:
    weights = files["image_encoder"]
    beside = weights / "config.json"
    path = files.get("image_encoder/config.json", beside if beside.is_file() else None)
    config = _tower_config(path, vision_use_head=False)  # Redux reads the last states, which the head would pool
    with WeightSource.open(weights) as file:
        source = pick(file, "siglip")
        check_depth(config, source)
        tower = load_module(
            lambda: SiglipVisionModel(config),
            source,
            dtype=dtype,
            device=device,
            rename=lambda name: name.removeprefix("vision_model."),
        )
    side, patch = _sides(config)
    place_positions(tower, (side // patch) ** 2, device)
    return tower


def _tower_config(path: Path | None, **changed: Any) -> SiglipVisionConfig:
    """A vision tower's config, or the part about it in that of a whole SigLIP."""
    said = read_json(path) if path else SO400M
    try:
        config = SiglipVisionConfig(**{**said.get("vision_config", said), **changed})
        _sides(config)
        return config
    except Exception as error:  # noqa: BLE001  of many types, and none that they share
        raise WeightsError(f"{path} cannot be used: {said_of(error)}") from None


def _sides(config: SiglipVisionConfig) -> tuple[int, int]:
    """Of the square picture that is read, and of a patch."""
    side, patch = config.image_size, config.patch_size
    if not (isinstance(side, int) and isinstance(patch, int) and 0 < patch <= side):
        raise ValueError(f"image_size is {side} and patch_size {patch}, where squares are read")
    return side, patch


def _key(picture: Image.Image) -> str:
    """The same for the same pixels."""
    picture = picture.convert("RGB")
    return hashlib.sha256(b"%dx%d " % picture.size + picture.tobytes()).hexdigest()
