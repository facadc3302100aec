"""Whatever its OpenAPI document allows, and much that it does not, is sent to a served model: no answer is a 5xx."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from cogs import decoded, serving
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from flux_engine import Predictor
from flux_engine.cli import main

pytestmark = pytest.mark.full
log = logging.getLogger(__name__)

CHEAP: dict[str, Any] = {"megapixels": "0.25", "num_outputs": 1, "num_inference_steps": 1}
"""What makes a prediction short, put in the place of values that are allowed: what is not allowed stays."""
EXAMPLES = 120
"""Of each kind."""


def cheaper(body: Any, properties: dict[str, Any]) -> Any:
    """The same, with less to draw."""
    inputs = body.get("input") if isinstance(body, dict) else None
    if not isinstance(inputs, dict):
        return body
    kinds = {"string": str, "integer": int}
    right = {
        name: value
        for name, value in CHEAP.items()
        if name not in inputs or type(inputs[name]) is kinds.get(properties[name].get("type", "string"))
    }
    return body | {"input": inputs | {name: right[name] for name in right if _allowed(inputs.get(name, right[name]))}}


def _allowed(value: Any) -> bool:
    return value in ("1", "0.25") or (isinstance(value, int) and 1 <= value <= 4)


def test_no_answer_is_the_servers_fault(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert main(["cog", "init", "flux-schnell", str(folder), "--model", "demo-schnell"]) == 0
    asked = {"prompt": "a red circle", "seed": 1, "output_format": "png", **CHEAP}
    alone = Predictor("flux-schnell", model="demo-schnell", output_dir=tmp_path, say=lambda line: None)
    [path] = alone.predict(**asked)  # pyright: ignore[reportGeneralTypeIssues]
    with serving("0.23", folder) as server:
        document = server.call("GET", "/openapi.json")[1]
        properties = document["components"]["schemas"]["Input"]["properties"]
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=f"http://127.0.0.1:{server.port}")
        operation = schema["/predictions"]["POST"]
        answers: Counter[str] = Counter()
        failed: list[Any] = []

        def send(case: schemathesis.Case) -> None:
            case.body = cheaper(case.body, properties)
            server.wait_until_idle()
            answer = case.call(timeout=120)
            said = answer.json() if answer.status_code == 200 else {}
            answers[said.get("status", str(answer.status_code))] += 1
            # Of a prompt that says nothing the model may draw what its checker flags.
            if said.get("status") == "failed" and "All generated images contained NSFW" not in said["error"]:
                failed.append((case.body, said["error"]))
            assert answer.status_code < 500, (answer.status_code, answer.text)
            assert answer.status_code in (200, 400, 413, 415, 422), (answer.status_code, answer.text)
            assert said.get("status") in (None, "succeeded", "failed"), said

        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            run = given(case=operation.as_strategy(generation_mode=mode))(send)
            run = settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                database=None,
            )(run)
            run()
            status, body = server.predict(**asked)
            assert status == 200 and decoded(body["output"][0])[1] == path.read_bytes()
        assert server.wait_until_idle() == "READY"
        log.info("answers: %s", dict(answers))
        # The inputs that the schema allows are predicted, and others are refused.
        assert answers["succeeded"] >= EXAMPLES / 4 and answers["422"] >= EXAMPLES / 4, answers
        assert not failed, failed
