"""What a prediction's inputs mean to a model, as far as that is known without its weights: no torch, and no network
unless a picture is a link."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flux_engine import hub
from flux_engine.addons import ControlNets, Named, controlnet_specs
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest
from flux_engine.lora.finding import refer
from flux_engine.predictor.compat import Compat, as_published, seed_of
from flux_engine.predictor.translation import Translated, Wanted, translate
from flux_engine.references import Reference
from flux_engine.replicate.schema import SHOWN, Input, InvalidInput, Schema
from flux_engine.replicate.schemas import find_schema
from flux_engine.request import Job
from flux_engine.specs import FluxSpec, ModelSpec, refined

Auto = Literal["auto"]
AUTO: Auto = "auto"


@dataclass(frozen=True)
class Understood:
    """Inputs that are right."""

    values: Mapping[str, Any]
    """Of the schema, every default filled in."""
    choice: str
    """Which of the models draws."""
    translated: Translated
    job: Job
    """What would be done."""


@dataclass
class Reader:
    """A schema, and the models that answer it."""

    schema: Schema
    models: Mapping[str, str]
    """What the input `model` may say -> the model; "" where there is no such input."""
    controlnets: ControlNets
    redux: Named | None
    refiner: Named | None
    base_loras: Sequence[Named]
    lora: Reference | None
    """A fine-tune's own."""
    compat: Compat | None
    local_files: bool
    config: EngineConfig
    known: Mapping[str, hub.Manifest]
    specs: dict[str, ModelSpec] = field(default_factory=dict[str, ModelSpec])
    """Of the models, as far as they were asked for."""

    @property
    def first(self) -> str:
        """The model that draws unless an input says otherwise, as `models` has it."""
        return next(iter(self.models))

    def spec(self, choice: str) -> ModelSpec:
        """What a model is, with what goes with it. Raises what `load` does for models that are not there, or do not go
        together."""
        if choice not in self.specs:
            refiner = None if self.refiner is None else self._spec_of(self.refiner, only=["unet"])
            spec = refined(self._spec_of(self.models[choice]), refiner)
            spec = replace(spec, controlnets=tuple(controlnet_specs(self.controlnets, spec, self.known)))
            if self.redux is not None and isinstance(spec, FluxSpec):
                spec = replace(spec, image_prompts=True)
            self.specs[choice] = spec
        return self.specs[choice]

    def _spec_of(self, model: Named, *, only: list[str] | None = None) -> ModelSpec:
        """A manifest tells it at once; of a file or repository the weights have to be looked at."""
        name = os.fspath(model)
        told = hub.spec_of(name, self.known)
        if told is None:
            from flux_engine.assemble import find_model  # needs torch

            told = find_model(name, self.config, only=only).spec
        return told

    def published(self, choice: str) -> ModelSpec | None:
        """What the model is that the schema is published for."""
        return hub.spec_of(published_models(self.schema)[choice], self.known)

    def remarks(self, choice: str) -> list[str]:
        """What whoever put a model behind this schema may not have meant."""
        published, spec = self.published(choice), self.spec(choice)
        if published is None or published.family == spec.family:
            return []
        whose = f"{spec.name} is one of {spec.family}"
        return [f"{self.schema.name} is published for {published.family} models, and {whose}"]

    def read(self, inputs: Mapping[str, Any], *, fetch: bool = True) -> Understood:
        """Whatever can be refused is refused here, and by the names that the schema has. Without `fetch` nothing is
        asked of the network.

        Raises InvalidInput for inputs the schema refuses, InvalidRequest for what the model cannot do.
        """
        values = self.schema.validate(inputs)
        choice = self._choice(values)
        spec = self.spec(choice)
        values["seed"] = seed_of(values["seed"], self.schema, spec, self.compat)
        told = translate(
            self.schema,
            values,
            spec,
            seed=values["seed"],
            own=self.lora is not None,
            local=self.local_files,
            fetch=fetch,
        )
        if self.compat:
            told = replace(told, request=as_published(told.request, spec))
        try:
            return Understood(values, choice, told, told.request.resolve(spec))
        except InvalidRequest as error:
            source = next((one.name for one in self.schema.inputs if one.field == error.field), None)
            if source is None:
                raise
            raise InvalidInput({source: str(error).removeprefix(f"{error.field} ")}) from None

    def _choice(self, values: Mapping[str, Any]) -> str:
        choice = values["model"] if self.schema.models else ""
        if choice not in self.models:
            here = ", ".join(self.models)
            raise InvalidInput(
                {"model": f"{choice!r} is not loaded, only {here}: Predictor({self.schema.name!r}, model={{...}})"}
            )
        return choice

    def resolve(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As `Predictor.resolve`."""
        right = self.read(inputs, fetch=False)
        told, job = right.translated, right.job
        unknown = bool(told.unread) and told.request.width is None and job.inputs.image is not None
        return {
            "schema": self.schema.name,
            "model": job.spec.name,
            "inputs": {
                one.name: shown(one, right.values[one.name])
                for one in self.schema.inputs
                if right.values[one.name] is not None
            },
            "width": None if unknown else job.width,
            "height": None if unknown else job.height,
            "num_outputs": len(job.seeds),
            "seeds": list(job.seeds),
            "num_inference_steps": job.num_inference_steps,
            "guidance_scale": job.guidance_scale if job.spec.guidance_embedded else job.true_cfg_scale,
            "scheduler": job.scheduler,
            "loras": [self._said(one) for one in told.loras],
            "files": self.schema.file_names(right.values, len(job.seeds)),
            "unread": list(told.unread),
            "notes": [*self.remarks(right.choice), *told.notes, *job.notes],
        }

    def _said(self, wanted: Wanted) -> dict[str, Any]:
        """A LoRA: by which input it came, what it is, and how strongly it counts."""
        reference = wanted.reference or self.lora
        assert reference is not None
        parts = {"kind": reference.kind, "name": reference.name, "version": reference.version, "file": reference.file}
        return {
            "input": wanted.input if wanted.reference else None,
            **{name: part for name, part in parts.items() if part},
            "scale": wanted.scale,
            "meaning": reference.describe(),
        }


def reader(
    schema: str,
    *,
    model: Named | Mapping[str, Named] | None = None,
    lora: Named | None = None,
    controlnets: ControlNets | Auto = AUTO,
    redux: Named | Auto | None = AUTO,
    refiner: Named | Auto | None = AUTO,
    base_loras: Sequence[Named] | Auto = AUTO,
    compat: Compat | None = None,
    local_files: bool = False,
    config: EngineConfig,
) -> Reader:
    """Of a schema by name, with what `Predictor` is given. Nothing is looked at but names.

    Raises UnknownSchema, UnknownModel, InvalidRequest, or WeightsError for a path to nothing.
    """
    known = hub.manifests(config.weights)
    declared = find_schema(schema)
    if compat not in (None, "published"):
        raise InvalidRequest(f"compat {compat!r} is neither 'published' nor None", field="compat")
    published = published_models(declared)
    if isinstance(model, Mapping):
        _check_choices(declared, model)
        models = {choice: os.fspath(named) for choice, named in model.items()}
    else:
        models = dict(published) if model is None else {next(iter(published)): os.fspath(model)}
    own = models == published
    nets = declared.controlnets
    read = Reader(
        declared,
        models,
        controlnets=(tuple(nets.values()) if own else tuple(nets)) if controlnets == AUTO else controlnets,
        redux=declared.redux if redux == AUTO else redux,
        refiner=(declared.refiner if own else None) if refiner == AUTO else refiner,
        base_loras=declared.base_loras if base_loras == AUTO else tuple(base_loras),
        lora=None if lora is None else refer(lora, declared.bare),
        compat=compat,
        local_files=local_files,
        config=config,
        known=known,
    )
    for name in (*models.values(), read.refiner):
        if name is not None:
            hub.refer(os.fspath(name), known)
    for name in read.base_loras:
        refer(name)
    if read.lora is not None and not declared.loras:
        takers = "flux-dev-lora, flux-schnell-lora, flux-finetune and sdxl"
        raise InvalidRequest(f"{schema} takes no LoRA: {takers} are among the schemas that do", field="lora")
    return read


def published_models(schema: Schema) -> dict[str, str]:
    """What the input `model` may say -> the model that then draws; "" where there is no such input."""
    return dict(schema.models) or {"": schema.model or schema.name}


def shown(one: Input, value: Any) -> Any:
    """An input's value as it may be told: no secret, and of a picture what kind of thing it is."""
    if one.type == "secret":
        return "(a secret)"
    if one.type != "uri":
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    text = value if isinstance(value, str) else f"({type(value).__name__})"
    return text if len(text) <= SHOWN else f"{text[:40]}... ({len(text):,} characters)"


def _check_choices(schema: Schema, models: Mapping[str, Named]) -> None:
    wrong = [choice for choice in models if choice not in schema.models]
    if wrong or not models:
        said = f"takes models for {', '.join(schema.models)}" if schema.models else "takes one model"
        raise InvalidRequest(f"{schema.name} {said}, not for {', '.join(map(str, wrong)) or 'none'}", field="model")
