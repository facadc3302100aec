"""A published schema -> the files of a folder that Cog builds, serves and pushes: text from data, nothing else.

Cog from 0.17 on reads inputs from the source of `predict.py` without running it, so the signature is written out there,
literally; earlier versions read the same signature while it runs. `openapi_schema.json` says it once more, for builds
that are told to take it, and under `.cog` for servers without a build.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from flux_engine.replicate.schema import Input, Schema

CUDA = "12.4"
"""Of the image that is built upon: it has to have a compiler, for Triton. The libraries that run are torch's own."""
TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "uri": "Path", "secret": "Secret"}
GRAPHS = "compiled"
"""The folder that keeps what torch compiled."""
HUB = "hub"
"""The folder that keeps weights of the Hugging Face hub."""


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """What a hosted model is told beyond its schema."""

    models: Mapping[str, str] | str | None = None
    """As `Predictor(model=)`."""
    lora: str | None = None
    """A fine-tune's own."""
    quantization: str | None = None
    compile: str | None = None
    """As `load` takes them."""
    python: str = "3.12"
    cuda: str = CUDA
    requirements: Sequence[str] = ()
    """The lines of requirements.txt, this library first."""


def generate(schema: Schema, hosting: Hosting) -> dict[str, str]:
    """Path within the folder -> text of the file."""
    published = schema.openapi()
    document = _text(published)
    return {
        "predict.py": predict_py(schema, hosting),
        "cog.yaml": cog_yaml(hosting),
        "requirements.txt": requirements_txt(hosting),
        "openapi_schema.json": document,
        ".cog/openapi_schema.json": _text(with_nulls(published)),
        "README.md": readme_md(schema),
        # Where a login is kept beside the weights, it is no part of an image.
        ".dockerignore": "\n".join((".git", "**/__pycache__", f"{HUB}/token", f"{HUB}/stored_tokens", "")),
        ".gitignore": "\n".join(("__pycache__/", f"{HUB}/", f"{GRAPHS}/", "")),
    }


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def with_nulls(document: Mapping[str, Any]) -> dict[str, Any]:
    """The same document, in which null is a value of optional inputs as JSON Schema says it. Cog from 0.17 on checks
    inputs by that, and knows nothing of `nullable`: it would refuse what clients send for "not given"."""
    copied = deepcopy(dict(document))
    for one in copied["components"]["schemas"]["Input"]["properties"].values():
        if one.get("nullable"):
            one["type"] = [one["type"], "null"]
    return copied


def predict_py(schema: Schema, hosting: Hosting) -> str:
    """The predictor, with its whole signature."""
    names = ["BasePredictor", "Input", "Path", *(["Secret"] if any(i.type == "secret" for i in schema.inputs) else [])]
    optional = "from typing import Optional\n\n" if any(one.optional for one in schema.inputs) else ""
    arguments = "".join(f"                {text},\n" for text in predictor_arguments(schema, hosting))
    signature = "".join(parameter(one) for one in schema.inputs)
    passed = "".join(f"            {one.name}={one.name},\n" for one in schema.inputs)
    output, returned = ("Path", "Path(files[0])") if schema.single else ("list[Path]", "[Path(file) for file in files]")
    return (
        f'"""{schema.title}, with the inputs of {schema.name}. Written by `flux-engine cog init`.\n\n'
        "Cog reads the inputs from this text, so they stand here as they are: nothing of them can be imported.\n"
        '"""\n\n'
        "import warnings\n"
        f"{optional or chr(10)}"
        f"from cog import {', '.join(names)}, current_scope\n\n"
        "import flux_engine\n"
        "from flux_engine.predictor import Hosted\n\n"
        "# What Cog up to 0.16 says into the log of every prediction.\n"
        'warnings.filterwarnings("ignore", message="current_scope is an experimental")\n\n\n'
        "class Predictor(BasePredictor):\n"
        "    def setup(self) -> None:\n"
        '        """Fetch and verify the weights, load the model, compile it, and run it once."""\n'
        "        self.hosted = Hosted(\n"
        "            flux_engine.Predictor(\n"
        f"{arguments}"
        "            )\n"
        "        )\n"
        "        self.hosted.setup()\n\n"
        "    def predict(\n"
        "        self,\n"
        f"{signature}"
        f"    ) -> {output}:\n"
        '        """Make the pictures of one prediction."""\n'
        "        files = self.hosted.predict(\n"
        "            current_scope(),\n"
        f"{passed}"
        "        )\n"
        f"        return {returned}\n"
    )


def predictor_arguments(schema: Schema, hosting: Hosting) -> list[str]:
    """What `flux_engine.Predictor` is given."""
    given: dict[str, object] = {
        "model": dict(hosting.models) if isinstance(hosting.models, Mapping) else hosting.models,
        "lora": hosting.lora,
        "quantization": hosting.quantization,
        "compile": hosting.compile,
        "compile_cache": GRAPHS if hosting.compile else None,
    }
    return [literal(schema.name), *(f"{name}={literal(value)}" for name, value in given.items() if value is not None)]


def parameter(one: Input) -> str:
    """One input in the signature."""
    kind = f"Optional[{TYPES[one.type]}]" if one.optional else TYPES[one.type]
    given: dict[str, object] = {"description": one.description}
    if not one.required:
        given["default"] = one.default
    given |= {name: value for name, value in (("ge", one.ge), ("le", one.le)) if value is not None}
    if one.choices:
        given["choices"] = list(one.choices)
    said = "".join(f"            {name}={literal(value)},\n" for name, value in given.items())
    return f"        {one.name}: {kind} = Input(\n{said}        ),\n"


def literal(value: object) -> str:
    """As it is written in Python."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(literal(each) for each in value) + "]"
    return repr(value)


def cog_yaml(hosting: Hosting) -> str:
    """How Cog builds and serves it."""
    return f"""\
# https://cog.run/yaml
build:
  gpu: true
  # Said, as Cog does not know every version of torch. What runs are the libraries in torch's own package.
  cuda: "{hosting.cuda}"
  python_version: "{hosting.python}"
  python_requirements: requirements.txt
predict: "predict.py:Predictor"
environment:
  # Weights that lie here when the image is built are in it; what is missing is fetched when it starts.
  - HF_HOME=/src/{HUB}
  - FLUX_ENGINE_CACHE=/src/{HUB}/flux-engine
"""


def requirements_txt(hosting: Hosting) -> str:
    """What is installed, exactly. torch's package for Linux is the one with CUDA."""
    return "".join(f"{line}\n" for line in hosting.requirements)


def readme_md(schema: Schema) -> str:
    """What can be done with the folder."""
    return f"""\
# {schema.title}

Serves the inputs of `{schema.name}`. Written by `flux-engine cog init`; predict.py says what is loaded.

    cog build -t my-model         # an image; from Cog 0.17 on COG_OPENAPI_SCHEMA=openapi_schema.json reads no source
    cog predict -i prompt="..."   # one prediction in it
    cog push r8.im/OWNER/NAME

Weights are fetched and verified when the model starts, into `{HUB}`. To have them in the image, fetch them before it is
built (gated ones need HF_TOKEN): `HF_HOME=$PWD/{HUB} flux-engine download MODEL`.

Without Docker, in an environment with flux-engine and cog (activated: Cog starts `python` from PATH):

    COG_PREDICT_TYPE_STUB=predict.py:Predictor PORT=5000 python -m cog.server.http --host 127.0.0.1
    curl -s http://127.0.0.1:5000/predictions -H 'Content-Type: application/json' -d '{{"input": {{...}}}}'
"""
