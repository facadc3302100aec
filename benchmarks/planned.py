"""Published models at their true sizes under a plan, dry: what the plan foretells against bytes that are counted.

The networks are made from specs, without numbers, with the small models' tokenizers. What the plan has leave comes and
goes as it would, by the library's own residents; only what is brought are tensors without numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from benchmarks.dry_run import CUDA, Card, PlainSDXL, dry_run, placed
from flux_engine import hub
from flux_engine.errors import OutOfMemory
from flux_engine.families.base import Family, Walk, parts_of
from flux_engine.families.flux import FluxFamily
from flux_engine.footprint import Extent, work_of
from flux_engine.hardware import CARDS
from flux_engine.hardware import Card as Device
from flux_engine.memory import CLIP_LAYERS, T5_BLOCKS, Place, Precompute, Residents, Shelf
from flux_engine.models.flux import Flux
from flux_engine.models.unet import UNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import ClipParams, T5Params
from flux_engine.pipeline import Pipeline
from flux_engine.plan import Plan, plan
from flux_engine.quantization.policy import place as place_linears
from flux_engine.quantization.policy import treatment
from flux_engine.request import Job, Request
from flux_engine.specs import FluxSpec, ModelSpec, SDXLSpec
from flux_engine.staging import Staging
from flux_engine.text.encoders import load_tokenizer, place_positions
from flux_engine.text.flux import FluxTextEncoder
from flux_engine.text.sdxl import Reader, SDXLTextEncoder

CALLS = 2
"""Of the network that are run; the others are like them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Counted:
    """What a dry run under a plan counted."""

    plan: Plan
    peaks: dict[str, int]
    """Stage -> most bytes on the card. Text is read before anything of the network is needed."""
    looping: int
    """Weights on the card in the loop."""
    moved: int
    """Bytes that came for a prompt that followed another one."""

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


class EmptyShelf(Shelf):
    """What it brings has no numbers."""

    def __init__(self, net: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
        self.net, self.names = net, names
        self._dtypes = {name: _kind(name, net.get_parameter(name), dtype) for name in names}
        self._place(self._empty(torch.device("meta")))

    def bring(self, staging: Staging) -> None:
        self._place(self._empty(CUDA))

    def _empty(self, device: torch.device) -> dict[str, Tensor]:
        shapes = {name: self.net.get_parameter(name).shape for name in self.names}
        return {name: torch.empty(shapes[name], dtype=kind, device=device) for name, kind in self._dtypes.items()}


class DryResidents(Residents):
    """On a card that is not there."""

    def _carry(self, part: str) -> None:
        for shelf in self._shelves[part]:
            if shelf.away:
                shelf.bring(Staging(None))
                self.moved += shelf.bytes

    def _fetch_next(self, part: str) -> None:
        """Another thread would not be watched; what is fetched early is what would come next anyway."""


def _kind(name: str, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if parameter.dtype == torch.float32 and not name.endswith("_scale") else parameter.dtype


def family_of(spec: ModelSpec, dtype: str, scheme: str, residents: Residents) -> Family[Any]:
    """A model of these sizes, its networks on the meta device."""
    place = Place(DTYPES[dtype], CUDA, scheme, residents=residents)
    demo = hub.weights_folder() / "demo"
    with torch.device("meta"):
        net: Any = Flux(spec.transformer) if isinstance(spec, FluxSpec) else UNet(_sdxl(spec).unet)
        vae = AutoEncoder(spec.vae)
        if (treat := treatment("flux" if isinstance(spec, FluxSpec) else "unet", scheme)) is not None:
            place_linears(net, treat)
        readers = [_clip(one) for one in spec.encoders if isinstance(one, ClipParams)]
    if isinstance(spec, FluxSpec):
        (t5_params,) = (one for one in spec.encoders if isinstance(one, T5Params))
        with torch.device("meta"):
            t5 = T5EncoderModel(_t5_config(t5_params))
            if (treat := treatment("t5", scheme)) is not None:
                place_linears(t5, treat)
        text = FluxTextEncoder(
            load_tokenizer(CLIPTokenizer, demo / "flux" / "tokenizer", 49408),
            readers[0],
            load_tokenizer(T5Tokenizer, demo / "flux" / "tokenizer_2", 32128),
            t5,
            max_sequence_length=spec.max_sequence_length,
            residents=residents,
        )
        return FluxFamily(spec, net, vae, text, precompute=Precompute(net, place), place=place)
    tokenizer = load_tokenizer(CLIPTokenizer, demo / "flux" / "tokenizer", 49408)
    both = SDXLTextEncoder([Reader(tokenizer, clip) for clip in readers], residents=residents)
    return PlainSDXL(_sdxl(spec), net, vae, both, precompute=Precompute(net, place), place=place)


def _sdxl(spec: ModelSpec) -> SDXLSpec:
    assert isinstance(spec, SDXLSpec)
    return spec


def _clip(params: ClipParams) -> Any:
    config = CLIPTextConfig(
        vocab_size=params.vocabulary,
        hidden_size=params.hidden_size,
        intermediate_size=params.mlp,
        num_hidden_layers=params.layers,
        num_attention_heads=params.hidden_size // 64,
        projection_dim=params.hidden_size,
        max_position_embeddings=params.positions,
    )
    return (CLIPTextModelWithProjection if params.projection else CLIPTextModel)(config)


def _t5_config(params: T5Params) -> T5Config:
    return T5Config(
        vocab_size=params.vocabulary,
        d_model=params.d_model,
        d_kv=params.d_kv,
        d_ff=params.d_ff,
        num_layers=params.layers,
        num_heads=params.heads,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )


def count(spec: ModelSpec, made: Plan, job: Job) -> Counted:
    """Run a job twice, with two prompts, under a plan.

    Raises DryRunError for what a card would refuse.
    """
    residents = DryResidents(made, strict=True)
    family = family_of(spec, made.dtype, made.schemes[0], residents)
    dtype = DTYPES[made.dtype]
    reading = torch.float32 if dtype == torch.float16 and isinstance(spec, FluxSpec) else dtype
    vae_dtype = torch.float32 if dtype == torch.float16 and spec.vae.force_upcast else dtype
    with dry_run() as card:
        for name, network in family.networks().items():
            kind = reading if name.startswith("text_encoder") else vae_dtype if name == "vae" else dtype
            patterns = parts_of(type(network)) if name in ("transformer", "unet") else {"vae": AutoEncoder.blocks}
            if name.startswith("text_encoder"):
                patterns = {"text": T5_BLOCKS if isinstance(network, T5EncoderModel) else CLIP_LAYERS}
            _lay_out(network, patterns, residents, kind, card)
            if isinstance(network, CLIPTextModel | CLIPTextModelWithProjection):
                place_positions(network, network.config.max_position_embeddings, CUDA)
        pipeline = _watched(family, card)
        pipeline.run(job)
        pipeline.run(replace(job, prompts=tuple(f"{prompt} again" for prompt in job.prompts)))
    return Counted(made, pipeline.peaks, pipeline.looping, residents.moved)


def _lay_out(
    network: nn.Module, patterns: dict[str, str], residents: Residents, dtype: torch.dtype, card: Card
) -> None:
    """What leaves on its shelf, the rest on the card."""
    rest = [name for name, _ in network.named_parameters()]
    away: list[str] = []
    for part, pattern in patterns.items():
        names = [name for name in rest if re.fullmatch(pattern, name)]
        rest = [name for name in rest if name not in set(names)]
        if residents.where(part) is not None and names:
            residents.add(part, EmptyShelf(network, names, dtype))
            away += names
    placed(network, dtype, card, without=away)


def _watched(family: Family[Any], card: Card) -> Any:
    """A pipeline that counts the peak of each stage, and runs a few calls of the network."""
    pipeline: Any = Pipeline(family)
    pipeline.peaks = dict.fromkeys(("text", "precompute", "denoise", "autoencoder"), 0)
    pipeline.looping = 0
    encode, statics, decode, denoise = family.encode, family.statics, pipeline._decode, pipeline._denoise

    def measured(stage: str, run: Any) -> Any:
        def measuring(*args: Any) -> Any:
            with card.measured() as peak:
                out = run(*args)
            pipeline.peaks[stage] = max(pipeline.peaks[stage], *peak)
            return out

        return measuring

    def looped(*args: Any) -> Walk:
        forward, last = family.net.forward, list[Any]([None])
        pipeline.looping = sum(
            parameter.nbytes
            for network in family.networks().values()
            for parameter in network.parameters()
            if parameter.device.type == "cuda"
        )

        def few(x: Tensor, call: int, *rest: Any) -> Any:
            if call < CALLS:
                last[0] = forward(x, call, *rest)
            return last[0]

        family.net.forward = few
        try:
            with card.loop():
                return denoise(*args)
        finally:
            del family.net.forward

    object.__setattr__(family, "encode", measured("text", encode))
    object.__setattr__(family, "statics", measured("precompute", statics))
    pipeline._denoise = measured("denoise", looped)
    pipeline._decode = measured("autoencoder", decode)
    return pipeline


def job_of(spec: ModelSpec, extent: Extent) -> Job:
    """A request of this extent."""
    request = Request(
        prompt="a red star",
        width=extent.width,
        height=extent.height,
        num_outputs=extent.pictures,
        num_inference_steps=extent.steps,
        output_type="pt",
        seed=0,
    )
    return request.resolve(spec)


def on(
    spec: ModelSpec, device: Device, scheme: str, *, host_memory: int | None = None, memory: int | None = None
) -> Counted:
    """A picture of the model's own size on a card, or on one of other memory. Raises OutOfMemory for what does not
    fit."""
    extent = Extent.default(spec)
    made = plan(spec, device, precisions=[scheme], host_memory=host_memory, memory=memory, extent=extent)
    return count(spec, made, job_of(spec, extent))


def table(models: Sequence[ModelSpec], host_memory: int) -> Iterator[dict[str, Any]]:
    """Every model in full precision and in 8 bits on every card: what is foretold and what is counted, with what has no
    room leaving, and what it would take with nothing leaving. Cards on which the same happens are run once."""
    done: dict[tuple[Any, ...], Counted] = {}

    def counted(spec: ModelSpec, made: Plan) -> Counted:
        key = (spec.name, made.dtype, made.schemes, *made.leaves.items(), made.by_rows, bool(made.leaves) * made.card)
        if key not in done:
            done[key] = count(spec, made, job_of(spec, Extent.default(spec)))
        return done[key]

    small = replace(CARDS["RTX 4090"], name="12 GB", memory=int(12.6e9))
    for spec in models:
        for card in (small, *CARDS.values()):
            for scheme in ("none", card.best):
                line: dict[str, Any] = {"model": spec.name, "card": card.name, "scheme": scheme}
                whole = counted(spec, plan(spec, card, precisions=[scheme], memory=10**12))
                line |= {
                    "network": whole.plan.sizes["network"],
                    "dtype": whole.plan.dtype,
                    "whole": whole.looping,
                    "whole peak": whole.peak,
                }
                try:
                    found = counted(spec, plan(spec, card, precisions=[scheme], host_memory=host_memory))
                except OutOfMemory as error:
                    yield line | {"refused": str(error)}
                    continue
                line |= {"leaves": dict(found.plan.leaves), "resident": found.looping, "foretold": found.plan.resident}
                line |= {"peak": found.peak, "foretold peak": found.plan.peak, "moved": found.moved}
                yield line | {"autoencoder": "by rows" if found.plan.by_rows else "whole"}


def foretold(counted: Counted, spec: ModelSpec, extent: Extent) -> dict[str, tuple[int, int]]:
    """Stage -> bytes beside the weights that were foretold, and counted; of a model of which nothing leaves."""
    made = counted.plan
    work = work_of(spec, made.dtype, made.schemes[0] != "none", extent)
    weights = made.always + sum(made.sizes.values())
    return {stage: (work[stage], peak - weights) for stage, peak in counted.peaks.items()}
