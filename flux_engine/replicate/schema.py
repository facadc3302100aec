"""How a published schema is declared; validation and OpenAPI follow from the declaration.

The shapes of the OpenAPI document are those Cog writes (replicate/cog, pkg/schema). Errors are worded as pydantic
words them, because that is what clients of hosted models have seen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flux_engine.errors import InvalidRequest
from flux_engine.references import Bare

SHOWN = 100
"""Most characters of a refused value that an error repeats: pictures are sent as text of megabytes."""


CUSTOM = "custom"
"""What aspect_ratio says where width and height count."""
TYPES: Mapping[str, Mapping[str, Any]] = {
    "uri": {"type": "string", "format": "uri"},
    "secret": {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True},
}


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a schema. The order of a schema's inputs is their published order."""

    name: str
    type: Literal["string", "integer", "number", "boolean", "uri", "secret"]
    """"uri" is a picture: an address or data URI, or the path or open file that a host made of it. "secret" is a text
    that is shown nowhere."""
    description: str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()
    ge: float | None = None
    le: float | None = None
    field: str | None = None
    """The field of Request it fills; None if the predictor itself acts on it."""

    @property
    def optional(self) -> bool:
        """Whether null may be sent for "not given"."""
        return not self.required and self.default is None

    def check(self, value: Any) -> Any:
        """The value as the library takes it. Raises ValueError in pydantic's words."""
        checked = self._typed(value)
        if self.choices and checked not in self.choices:
            listed = ", ".join(f"'{choice}'" for choice in self.choices[:-1])
            raise ValueError(f"Input should be {listed} or '{self.choices[-1]}'")
        if self.ge is not None and checked < self.ge:
            raise ValueError(f"Input should be greater than or equal to {self.ge:g}")
        if self.le is not None and checked > self.le:
            raise ValueError(f"Input should be less than or equal to {self.le:g}")
        return checked

    def _typed(self, value: Any) -> Any:
        # Cog hands over a secret as an object that shows stars, and says it when asked.
        value = getattr(value, "get_secret_value", lambda: value)() if self.type == "secret" else value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        match self.type:
            case "string" | "secret" if isinstance(value, str):
                return value
            case "boolean" if isinstance(value, bool):
                return value
            case "integer" if is_number and math.isfinite(value) and value == int(value):
                return int(value)
            case "number" if is_number and math.isfinite(value):
                return float(value)
            case "uri" if _is_picture(value):
                return value
            case _:
                raise ValueError(f"Input should be a valid {self.type}")

    def openapi(self, order: int) -> dict[str, Any]:
        """The property as Cog writes it."""
        body: dict[str, Any] = {"description": self.description, "x-order": order}
        if self.choices:
            body["allOf"] = [{"$ref": f"#/components/schemas/{self.name}"}]
        else:
            body |= TYPES.get(self.type, {"type": self.type})
            body["title"] = self.name.replace("_", " ").title()
        if not self.required and self.default is not None:
            body["default"] = self.default
        if self.optional:
            body["nullable"] = True
        if self.ge is not None:
            body["minimum"] = self.ge
        if self.le is not None:
            body["maximum"] = self.le
        return body


def _is_picture(value: Any) -> bool:
    """Whether a value can stand for a picture. Nothing is opened or fetched."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, os.PathLike) or callable(getattr(value, "read", None))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


class InvalidInput(InvalidRequest):
    """Inputs that a schema refuses. `detail` lists every problem in the form hosted models answer with."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.detail = [
            {
                "loc": ["body", "input", name],
                "msg": message,
                "type": "value_error.missing" if message == "Field required" else "value_error",
            }
            for name, message in problems.items()
        ]
        super().__init__(
            "; ".join(f"{name}: {message}" for name, message in problems.items()),
            field=next(iter(problems)),
        )


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Inputs that together bring a control picture."""

    image: str
    """The input with the picture."""
    kind: str = ""
    """The kind of control picture, where it is always the same."""
    chosen: str = ""
    """The input that says what makes the control picture, where it is not; "none" is for no control picture."""
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """What that input may say -> the kinds that answer for it, of which the first that is loaded does."""
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """scale, start or end -> the input that says it."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the preprocessor is told."""


@dataclass(frozen=True)
class Stacked:
    """Inputs that together bring a LoRA."""

    weights: str
    """The input that names it."""
    scale: str
    """The input that says how strongly it counts."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """A size after a picture: of a table, the one of the nearest aspect."""

    table: Literal["buckets", "1024 wide"]
    """The sizes that SDXL was taught, or every 64 pixels of height at 1024 of width."""
    image: str = ""
    """The input with the picture, where it is always the same."""
    chosen: str = ""
    """The input that says which, where it is not."""
    images: Mapping[str, str] = field(default_factory=dict[str, str])
    """What that input may say -> the input with the picture; whatever else it says leaves the size alone."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """A published input schema, and what is particular to the models behind it."""

    name: str
    title: str
    inputs: tuple[Input, ...]
    model: str = ""
    """The model that speaks it, where that has another name."""
    models: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the input `model` may say -> the model that then draws, the default first; empty without such an input."""
    controlnets: Mapping[str, str] = field(default_factory=dict[str, str])
    """Kind of control picture -> the ControlNet that is published with it."""
    redux: str | None = None
    """The adapter that is loaded with it."""
    refiner: str | None = None
    """The refiner that is loaded with it."""
    edits: bool = False
    """Whether the model has to be one that changes a picture as the prompt says."""
    always: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of Request that no input fills."""
    needs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Inputs that may be left out by the declaration, and without which there is nothing to do -> why."""
    sizes_without_image: tuple[str, ...] = ()
    """Inputs for the size that count for nothing where a prediction starts from a picture alone: it has its size."""
    with_mask_too: bool = False
    """Whether they also count for nothing where there is a mask beside it."""
    loras: tuple[Stacked, ...] = ()
    """In the order in which they count."""
    bare: Bare = "replicate"
    """Where a LoRA is looked up that is named OWNER/NAME."""
    sizing: Sizing | None = None
    steering: tuple[Steering, ...] = ()
    single: bool = False
    """Whether a prediction is one picture, not a list of them."""
    output_format: str = "png"
    """What files are written as where no input says it."""
    returns_controls: bool = False
    """Whether the pictures that steered come first in the list, as the network saw them."""
    seeds_from_one: bool = False
    """Whether 0, the published default, and anything below it draw a seed."""

    def validate(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every input by name, defaults filled in. Raises InvalidInput listing everything that is wrong.

        Explicit null stands for "not given" where the input is optional.
        """
        values: dict[str, Any] = {}
        problems: dict[str, str] = {}
        for one in self.inputs:
            value = given.get(one.name)
            if one.name not in given or (value is None and one.optional):
                if one.required:
                    problems[one.name] = "Field required"
                values[one.name] = one.default
                continue
            try:
                values[one.name] = one.check(value)
            except ValueError as error:
                shown = "(a secret)" if one.type == "secret" else _shown(value)
                problems[one.name] = f"{error}, not {shown}"
        known = {one.name for one in self.inputs}
        for name in given:
            if name not in known:
                problems[name] = f"Unexpected input; {self.name} takes {', '.join(one.name for one in self.inputs)}"
        if problems:
            raise InvalidInput(problems)
        return values

    def openapi(self) -> dict[str, Any]:
        """The whole OpenAPI document of a server with this schema."""
        enums = {
            one.name: {
                "title": one.name,
                "description": "An enumeration.",
                "type": "string",
                "enum": list(one.choices),
            }
            for one in self.inputs
            if one.choices
        }
        uri = {"type": "string", "format": "uri"}
        schemas: dict[str, Any] = {
            "Input": {
                "title": "Input",
                "type": "object",
                "required": [one.name for one in self.inputs if one.required],
                "properties": {one.name: one.openapi(order) for order, one in enumerate(self.inputs)},
            },
            "Output": {"title": "Output"} | (uri if self.single else {"type": "array", "items": uri}),
            "PredictionRequest": {
                "title": "PredictionRequest",
                "type": "object",
                "properties": {
                    "id": {"title": "Id", "type": "string"},
                    "input": {"$ref": "#/components/schemas/Input"},
                },
            },
            "PredictionResponse": {
                "title": "PredictionResponse",
                "type": "object",
                "properties": {
                    "id": {"title": "Id", "type": "string"},
                    "input": {"$ref": "#/components/schemas/Input"},
                    "output": {"$ref": "#/components/schemas/Output"},
                    "status": {"$ref": "#/components/schemas/Status"},
                    "error": {"title": "Error", "type": "string"},
                    "logs": {"title": "Logs", "type": "string", "default": ""},
                    "metrics": {"title": "Metrics", "type": "object"},
                },
            },
            "Status": {
                "title": "Status",
                "description": "An enumeration.",
                "type": "string",
                "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            },
        }
        body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}}}
        answer = {
            "description": "Successful Response",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionResponse"}}},
        }
        return {
            "openapi": "3.0.2",
            "info": {"title": self.title, "version": "0.1.0"},
            "paths": {
                "/predictions": {
                    "post": {
                        "summary": "Predict",
                        "operationId": "predict_predictions_post",
                        "requestBody": body,
                        "responses": {"200": answer},
                    }
                }
            },
            "components": {"schemas": schemas | enums},
        }
