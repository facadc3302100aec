"""`schema` and `validate`: what published inputs are, and what one would do."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping
from typing import Any

from flux_engine.cli.output import show
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest
from flux_engine.predictor.reading import Reader, reader
from flux_engine.replicate.documentation import markdown, page
from flux_engine.replicate.schema import InvalidInput, Schema
from flux_engine.replicate.schemas import AS_OF, SCHEMAS, find_schema

NAMES = f"one of {', '.join(SCHEMAS)}; or as of a date, as {next(iter(AS_OF))}"
REFUSED = 2
"""The exit code, where standard output tells what is not right."""


def add(commands: Any) -> None:
    """Declare the commands."""
    schema = commands.add_parser("schema", help="show a published input schema")
    schema.add_argument("name", nargs="?", help=NAMES)
    schema.add_argument("--all", action="store_true", help="every one, instead of one by name")
    form = schema.add_mutually_exclusive_group()
    form.add_argument("--openapi", action="store_true", help="as an OpenAPI document")
    form.add_argument("--markdown", action="store_true", help="as a page")
    schema.set_defaults(run=_schema)

    validate = commands.add_parser(
        "validate",
        help="check inputs of a published schema, and say what they would do",
        description="Reads inputs as JSON from standard input, and fetches nothing. Says on standard output "
        '{"ok": true, "resolved": {...}} or {"ok": false, "detail": [...]}, and ends with 2 if not all are right.',
    )
    validate.add_argument("name", help=NAMES)
    add_model(validate)
    validate.add_argument("--local-files", action="store_true", help="texts may be paths, of pictures and LoRAs")
    validate.add_argument(
        "--compat", choices=("published",), help="as the published predictors, also where that is odd"
    )
    validate.add_argument("--jsonl", action="store_true", help="inputs in every line, an answer in every line")
    validate.set_defaults(run=_validate)


def add_model(command: argparse.ArgumentParser) -> None:
    """The option that `models_of` reads."""
    command.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="that draws; CHOICE=MODEL, repeatable, where an input chooses. Default: the published one",
    )


def models_of(schema: Schema, said: list[str]) -> Mapping[str, str] | str | None:
    """What --model says, as `Predictor(model=)`. Raises InvalidRequest for what does not go together."""
    split = {text.partition("=")[0]: text.partition("=")[2] for text in said}
    if said and schema.models and all(choice in schema.models and model for choice, model in split.items()):
        return split
    if len(said) > 1:
        choices = f" as {'=MODEL, '.join(schema.models)}=MODEL" if schema.models else " once"
        raise InvalidRequest(f"--model {said[1]!r}: {schema.name} takes it{choices}", field="model")
    return said[0] if said else None


def _schema(args: argparse.Namespace) -> None:
    if args.all != (args.name is None):
        raise InvalidRequest(f"name a schema, or say --all: {', '.join(SCHEMAS)}")
    if args.all:
        if args.openapi:
            raise InvalidRequest("--openapi is of one schema: name it")
        show(page(SCHEMAS.values()).rstrip() if args.markdown else "\n".join([*SCHEMAS, *AS_OF]))
        return
    schema = find_schema(args.name)
    if args.openapi:
        show(json.dumps(schema.openapi(), indent=2))
    elif args.markdown:
        show(markdown(schema))
    else:
        _table(schema)


def _table(schema: Schema) -> None:
    for one in schema.inputs:
        limits = " | ".join(one.choices)
        if one.ge is not None and one.le is not None:
            limits = f"{one.ge:g} to {one.le:g}"
        default = "required" if one.required else json.dumps(one.default)
        show(f"{one.name:24} {one.type:8} {default:10} {limits}")
        show(f"{'':24} {one.description}")


def _validate(args: argparse.Namespace) -> int:
    read = reader(
        args.name,
        model=models_of(find_schema(args.name), args.model),
        compat=args.compat,
        local_files=args.local_files,
        config=EngineConfig.from_environment(),
    )
    # Bytes that are no UTF-8 come as marks, and are refused like any other text that is no JSON.
    sent = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
    texts = (line for line in sent if line.strip()) if args.jsonl else iter([sent.read()])
    right = True
    for text in texts:
        answer = _answer(read, text)
        right &= answer["ok"]
        show(json.dumps(answer, ensure_ascii=False))
        sys.stdout.flush()
    return 0 if right else REFUSED


def _answer(read: Reader, text: str) -> dict[str, Any]:
    try:
        inputs = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"JSON decode error: {error}"
        return {"ok": False, "detail": [{"type": "json_invalid", "loc": ["body"], "msg": message}]}
    try:
        return {"ok": True, "resolved": read.resolve(inputs)}
    except InvalidInput as error:
        return {"ok": False, "detail": error.detail}
    except InvalidRequest as error:
        return {"ok": False, "detail": [{"type": "value_error", "loc": ["body", "input"], "msg": str(error)}]}
