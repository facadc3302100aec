"""How a published schema is declared; validation and OpenAPI follow from the declaration.

The shapes of the OpenAPI document are those Cog writes (replicate/cog, pkg/schema). What is refused is said as Cog up
to 0.16 answers it, which is pydantic 2's way: `loc`, `msg`, `type`, `input`, `ctx`. Numbers and truth values are taken
from texts as there, because clients send "42".
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flux_engine.errors import InvalidRequest, did_you_mean
from flux_engine.references import Bare

SHOWN = 100
"""Most characters of a refused value that an error repeats: pictures are sent as text of megabytes."""


CUSTOM = "custom"
"""What aspect_ratio says where width and height count."""
TYPES: Mapping[str, Mapping[str, Any]] = {
    "uri": {"type": "string", "format": "uri"},
    "secret": {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True},
}


class Refusal(ValueError):
    """Why a value is refused: pydantic's name for it, its words, and what it was held against."""

    def __init__(self, type: str, message: str, **context: Any) -> None:
        super().__init__(message)
        self.type, self.context = type, context
        self.given: dict[str, Any] = {}
        """The refused value as "input", as far as it may be repeated."""
        self.said = ""
        """The same in words."""

    def of(self, value: Any, secret: bool) -> Refusal:
        """The same, of that value."""
        plain = isinstance(value, int | float | str | None) and len(str(value)) <= SHOWN
        self.said = "(a secret)" if secret else _shown(value)
        self.given = {"input": value if plain and not secret else self.said}
        return self


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise Refusal("string_type", "Input should be a valid string")


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in TRUTHS:
        return TRUTHS[value.strip().lower()]
    if isinstance(value, str):
        raise Refusal("bool_parsing", "Input should be a valid boolean, unable to interpret input")
    raise Refusal("bool_type", "Input should be a valid boolean")


def _whole(value: Any) -> int:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            message = "Input should be a valid integer, unable to parse string as an integer"
            raise Refusal("int_parsing", message) from None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, float):
        raise Refusal("int_type", "Input should be a valid integer")
    if not math.isfinite(value):
        raise Refusal("finite_number", "Input should be a finite number")
    if value != int(value):
        raise Refusal("int_from_float", "Input should be a valid integer, got a number with a fractional part")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Refusal("float_type", "Input should be a valid number")
    try:
        number = float(value)
    except ValueError:
        message = "Input should be a valid number, unable to parse string as a number"
        raise Refusal("float_parsing", message) from None
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise Refusal("finite_number", "Input should be a finite number")
    return number


def _picture(value: Any) -> Any:
    """What can stand for a picture. Nothing is opened or fetched."""
    if isinstance(value, str) and not value.strip():
        raise Refusal("url_parsing", "Input should be a valid URL, input is empty")
    if isinstance(value, str | os.PathLike) or callable(getattr(value, "read", None)):
        return value
    raise Refusal("url_type", "Input should be a URL or a data URI, as a string, or a path object or an open file")


TRUTHS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}
READERS: Mapping[str, Callable[[Any], Any]] = {
    "string": _text, "secret": _text, "boolean": _truth, "integer": _whole, "number": _number, "uri": _picture,
}  # fmt: skip


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
        """The value as the library takes it. Raises Refusal."""
        # Cog hands over a secret as an object that shows stars, and says it when asked.
        value = getattr(value, "get_secret_value", lambda: value)() if self.type == "secret" else value
        checked = READERS[self.type](value)
        if self.choices and checked not in self.choices:
            listed = ", ".join(f"'{choice}'" for choice in self.choices[:-1])
            expected = f"{listed} or '{self.choices[-1]}'"
            raise Refusal("enum", f"Input should be {expected}", expected=expected)
        if self.ge is not None and checked < self.ge:
            raise Refusal("greater_than_equal", f"Input should be greater than or equal to {self.ge:g}", ge=self.ge)
        if self.le is not None and checked > self.le:
            raise Refusal("less_than_equal", f"Input should be less than or equal to {self.le:g}", le=self.le)
        return checked

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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


class InvalidInput(InvalidRequest):
    """Inputs that a schema refuses. `detail` lists every problem as Cog answers with it, status 422."""

    def __init__(self, problems: Mapping[str, str | Refusal] | Refusal) -> None:
        """`problems`: the name of an input and why it is refused; or why all of them are."""
        each = [(None, problems)] if isinstance(problems, Refusal) else list(problems.items())
        self.detail = [_detail(name, problem) for name, problem in each]
        super().__init__("; ".join(_line(name, problem) for name, problem in each), field=each[0][0])


def _detail(name: str | None, problem: str | Refusal) -> dict[str, Any]:
    loc = ["body", "input"] if name is None else ["body", "input", name]
    if not isinstance(problem, Refusal):
        return {"type": "value_error", "loc": loc, "msg": problem}
    context = {"ctx": problem.context} if problem.context else {}
    return {"type": problem.type, "loc": loc, "msg": str(problem)} | problem.given | context


def _line(name: str | None, problem: str | Refusal) -> str:
    text = f"{problem}, not {problem.said}" if isinstance(problem, Refusal) and problem.said else str(problem)
    return text if name is None else f"{name}: {text}"


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
    stand_ins: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of these what cannot be made here -> the preprocessor that is nearest to it."""
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
    agreements: Mapping[str, str] = field(default_factory=dict[str, str])
    """Inputs that have to be true -> why."""
    sizes_without_image: tuple[str, ...] = ()
    """Inputs for the size that count for nothing where a prediction starts from a picture alone: it has its size."""
    with_mask_too: bool = False
    """Whether they also count for nothing where there is a mask beside it."""
    loras: tuple[Stacked, ...] = ()
    """In the order in which they count."""
    base_loras: tuple[str, ...] = ()
    """LoRAs that every prediction has, beside those that it names."""
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
    nothing_left: str = "All generated images contained NSFW content. Try running it again with a different prompt."
    """The error of a prediction whose pictures are all unsafe."""

    def validate(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every input by name, defaults filled in. Raises InvalidInput listing everything that is wrong.

        Explicit null stands for "not given" where the input is optional.
        """
        if not isinstance(given, Mapping):
            message = "Input should be a valid dictionary or object to extract fields from"
            raise InvalidInput(Refusal("model_attributes_type", message))
        values: dict[str, Any] = {}
        problems: dict[str, str | Refusal] = {}
        for one in self.inputs:
            value = given.get(one.name)
            if one.name not in given or (value is None and one.optional):
                if one.required:
                    problems[one.name] = Refusal("missing", "Field required")
                values[one.name] = one.default
                continue
            try:
                values[one.name] = one.check(value)
            except Refusal as refusal:
                problems[one.name] = refusal.of(value, one.type == "secret")
        known = [one.name for one in self.inputs]
        for name in given:
            if name not in known:
                near = self._meant(name, given[name], known)
                message = f"Extra inputs are not permitted{near} {self.name} takes {', '.join(known)}"
                problems[name] = Refusal("extra_forbidden", message)
        if problems:
            raise InvalidInput(problems)
        return values

    def _meant(self, name: object, value: Any, known: list[str]) -> str:
        """What an unknown name may have meant: also a name that the library has for the same thing."""
        if name == "input" and isinstance(value, Mapping):
            return ": send what is inside of it."
        same = next((one.name for one in self.inputs if one.field == name), None)
        if name in ("lora", "loras") and self.loras:
            same = self.loras[0].weights
        if same is None:
            return did_you_mean(str(name)[:SHOWN], known)
        return f"; here it is {same!r}."

    def file_names(self, values: Mapping[str, Any], count: int) -> list[str]:
        """Of so many pictures, in the order in which they are answered."""
        kind = values.get("output_format", self.output_format)
        return [f"output.{kind}"] if self.single else [f"out-{index}.{kind}" for index in range(count)]

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
