"""The declarations as pages to read."""

from __future__ import annotations

import json
from collections.abc import Iterable

from flux_engine.replicate.schema import Input, Schema

ABOUT = """\
# The input schemas

Written by `flux-engine schema --all --markdown`. Inputs without a default take null for "not given". A text is taken
for a number or a truth value where it is one. `NAME@2025-01` is a schema as it was published then
(`flux_engine/replicate/dated.py`); `flux-engine schema NAME --openapi` gives any as an OpenAPI document. What
`compat="published"` changes is listed in `flux_engine/predictor/compat.py`.

"""
HEAD = "| input | type | default | what it takes | |\n| --- | --- | --- | --- | --- |"


def markdown(schema: Schema) -> str:
    """A heading and a table of the inputs, in their published order."""
    output = "one picture" if schema.single else "a list of pictures"
    if not any(one.name == "output_format" for one in schema.inputs):
        output += f", {schema.output_format}"
    return "\n".join(
        [f"## {schema.name}", "", f"{schema.title}. Output: {output}.", "", HEAD, *map(_row, schema.inputs)]
    )


def _row(one: Input) -> str:
    default = "required" if one.required else "" if one.default is None else f"`{json.dumps(one.default)}`"
    takes = ", ".join(f"`{choice}`" for choice in one.choices)
    if one.ge is not None and one.le is not None:
        takes = f"{one.ge:g} to {one.le:g}"
    cells = (f"`{one.name}`", "picture" if one.type == "uri" else one.type, default, takes, one.description)
    return f"| {' | '.join(cells)} |"


def page(schemas: Iterable[Schema]) -> str:
    """docs/schemas.md."""
    return ABOUT + "\n\n".join(map(markdown, schemas)) + "\n"
