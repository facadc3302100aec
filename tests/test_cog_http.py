"""Generated folders behind the real cogs: one suite for both, on demo models, without Docker."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cogs import VERSIONS, Receiver, Server, data_uri, decoded, receiving, serving
from PIL import Image

from flux_engine import Predictor
from flux_engine.cli import main

pytestmark = pytest.mark.full

PROGRESS = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)")
"""What the official clients look for in a line of the log."""
SMALL = {"prompt": "a red circle on a blue background", "megapixels": "0.25", "num_inference_steps": 2, "seed": 1}
SLOW = {"prompt": "a red circle", "num_outputs": 4, "num_inference_steps": 50, "seed": 1}
"""Seconds of work."""


@dataclass(frozen=True)
class Ways:
    """What the two cogs do each in its own way; a client of either has to know, and no predictor can change it."""

    fields: frozenset[str]
    """Of an answer. The newer one leaves out what the client itself has sent, and times, of which it measures one."""
    busy: dict[str, str]
    missing: dict[str, Any]
    """How one says that a required input is missing: both after pydantic, the older one by pydantic itself."""
    failed: str
    """What stands before the predictor's own words."""
    coerces: bool
    """Whether "2" is taken for 2: pydantic does, a JSON schema does not."""
    nests: bool
    """Whether "timing.denoise" is an object within an object."""
    cancels_at_once: bool
    """Whether a prediction can be cancelled before it has said anything: the older one loses the signal."""
    traces: bool
    """Whether the log of a failure has its traceback. The newer one answers with no log at all then."""


WAYS = {
    "0.23": Ways(
        fields=frozenset({"id", "output", "status", "logs", "metrics"}),
        busy={"error": "At capacity - all prediction slots busy", "status": "failed"},
        missing={"loc": ["body", "input", "prompt"], "msg": "Field required", "type": "value_error.missing"},
        failed="Prediction failed: Prediction failed: InvalidInput: ",
        coerces=False,
        nests=True,
        cancels_at_once=True,
        traces=False,
    ),
    "0.16": Ways(
        fields=frozenset(
            {"id", "input", "output", "status", "logs", "metrics", "error", "version", "created_at", "started_at",
             "completed_at"}
        ),
        busy={"detail": "Already running a prediction"},
        missing={"loc": ["body", "input", "prompt"], "msg": "Field required", "type": "missing"},
        failed="",
        coerces=True,
        nests=False,
        cancels_at_once=False,
        traces=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as one:
        yield one


@pytest.fixture(scope="module", params=list(VERSIONS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server a cog for all tests: it has to be right after whatever came before."""
    folder = tmp_path_factory.mktemp("dev") / "model"
    assert main(["cog", "init", "flux-dev", str(folder), "--model", "demo-dev"]) == 0
    with serving(request.param, folder) as one:
        yield one


@pytest.fixture
def ways(server: Server) -> Ways:
    return WAYS[server.version]


Draw = Callable[..., bytes]


def drawing(schema: str, model: str, folder: Path) -> Draw:
    """The bytes that the predictor writes in this process."""
    predictor = Predictor(schema, model=model, output_dir=folder, say=lambda line: None)

    def drawn(**inputs: Any) -> bytes:
        [path] = predictor.predict(**inputs)  # pyright: ignore[reportGeneralTypeIssues]
        return path.read_bytes()

    return drawn


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Draw:
    return drawing("flux-dev", "demo-dev", tmp_path_factory.mktemp("drawn"))


def check_right(server: Server, draw: Draw) -> None:
    """The next prediction is what it is in a process of its own."""
    status, body = server.predict(**SMALL, output_format="png")
    assert (status, body["status"]) == (200, "succeeded"), body
    assert decoded(body["output"][0])[1] == draw(**SMALL, output_format="png")


def test_it_gets_ready_and_says_so(server: Server) -> None:
    said = server.health()
    assert said["status"] == "READY" and said["setup"]["status"] == "succeeded"
    status, document = server.call("GET", "/openapi.json")
    assert status == 200 and "prompt" in str(document["components"]["schemas"]["Input"])


@pytest.mark.parametrize(("kind", "sent"), [("png", "image/png"), ("webp", "image/webp"), ("jpg", "image/jpeg")])
def test_a_prediction_is_the_predictors_own(server: Server, ways: Ways, draw: Draw, kind: str, sent: str) -> None:
    status, body = server.predict(**SMALL, output_format=kind)
    assert status == 200 and body["status"] == "succeeded"
    assert set(body) - {"error"} == ways.fields - {"error"}
    [(found, content)] = [decoded(uri) for uri in body["output"]]
    assert found == sent and content == draw(**SMALL, output_format=kind)
    assert Image.open(io.BytesIO(content)).size == (128, 128)


def test_the_log_has_the_seed_and_progress_that_clients_read(server: Server) -> None:
    _, body = server.predict(**SMALL | {"num_inference_steps": 4, "seed": 7})
    lines = body["logs"].split("\n")
    assert "Using seed: 7" in lines
    found = [match for line in lines if (match := PROGRESS.match(line))]
    assert [(int(one[1]), int(one[2]), int(one[3])) for one in found] == [
        (25, 1, 4),
        (50, 2, 4),
        (75, 3, 4),
        (100, 4, 4),
    ]
    assert "Warning" not in body["logs"]


def test_metrics(server: Server, ways: Ways) -> None:
    _, body = server.predict(**SMALL, num_outputs=2)
    metrics = body["metrics"]
    assert metrics["image_count"] == 2 and metrics["predict_time"] > 0
    denoise = metrics["timing"]["denoise"] if ways.nests else metrics["timing.denoise"]
    assert 0 < denoise <= metrics["predict_time"]


def test_a_put_again_is_the_same_prediction(server: Server, receiver: Receiver, draw: Draw) -> None:
    name = f"again-{server.version}"
    first = server.begin(name, receiver.url, SLOW)
    second = server.begin(name, receiver.url, SLOW)
    assert first[0] == second[0] == 202 and first[1]["id"] == second[1]["id"] == name
    assert receiver.ended(name)["status"] == "succeeded"
    time.sleep(1)
    assert [hook["status"] for hook in receiver.of(name)].count("succeeded") == 1
    check_right(server, draw)


def test_another_one_is_refused_while_it_is_busy(server: Server, ways: Ways, receiver: Receiver) -> None:
    name = f"busy-{server.version}"
    assert server.begin(name, receiver.url, SLOW)[0] == 202
    assert server.health()["status"] == "BUSY"
    assert server.call("POST", "/predictions", {"input": SMALL}) == (409, ways.busy)
    assert receiver.ended(name)["status"] == "succeeded"


def test_cancelling_midway_leaves_the_next_one_right(
    server: Server, ways: Ways, receiver: Receiver, draw: Draw
) -> None:
    for number, seconds in enumerate((0, 0.4, 0.8)):
        name = f"cancelled-{number}-{server.version}"
        assert server.begin(name, receiver.url, SLOW)[0] == 202
        if not ways.cancels_at_once:
            receiver.until(name, lambda hook: "Using seed" in (hook.get("logs") or ""))
        time.sleep(seconds)
        assert server.call("POST", f"/predictions/{name}/cancel") == (200, {})
        assert receiver.ended(name)["status"] == "canceled"
        check_right(server, draw)
    assert server.call("POST", "/predictions/nothing/cancel")[0] == 404


@pytest.mark.parametrize(
    ("events", "wanted"),
    [(["completed"], {"succeeded"}), (["start", "completed"], {"starting", "processing", "succeeded"})],
)
def test_webhooks_with_filters(server: Server, receiver: Receiver, events: list[str], wanted: set[str]) -> None:
    name = f"{'-'.join(events)}-{server.version}"
    assert server.begin(name, receiver.url, SMALL, webhook_events_filter=events)[0] == 202
    last = receiver.ended(name)
    assert len(last["output"]) == 1 and "Using seed: 1" in last["logs"]
    time.sleep(1)
    told = [hook["status"] for hook in receiver.of(name)]
    assert len(told) == len(events) and set(told) <= wanted and told.count("succeeded") == 1


def test_logs_come_while_it_runs(server: Server, receiver: Receiver) -> None:
    name = f"logs-{server.version}"
    assert server.begin(name, receiver.url, SLOW, webhook_events_filter=["logs", "completed"])[0] == 202
    receiver.ended(name)
    running = [hook for hook in receiver.of(name) if hook["status"] == "processing"]
    assert running and "Using seed: 1" in running[0]["logs"]


@pytest.mark.parametrize("version", list(VERSIONS))
def test_another_model_and_uploads(version: str, tmp_path: Path, receiver: Receiver) -> None:
    """Files of predictions that are not waited for are uploaded; the newer cog does it for all."""
    assert main(["cog", "init", "flux-schnell", str(tmp_path / "model"), "--model", "demo-schnell"]) == 0
    name, asked = f"upload-{version}", SMALL | {"output_format": "png"}
    expected = drawing("flux-schnell", "demo-schnell", tmp_path / "drawn")(**asked)
    with serving(version, tmp_path / "model", upload=f"{receiver.url}/up/") as server:
        assert server.begin(name, receiver.url, asked)[0] == 202
        output = receiver.ended(name)["output"]
        path, headers, content = receiver.uploads[-1]
        sent = {key.lower(): value for key, value in headers.items()}
        assert path == "/up/out-0.png" and content == expected
        assert sent["content-type"] == "image/png" and sent["x-prediction-id"] == name
        assert output == [f"{receiver.url}/kept/up/out-0.png"]
        [uri] = server.predict(**asked)[1]["output"]
        assert uri.startswith("http" if version == "0.23" else "data:")


def test_what_the_schema_refuses(server: Server, ways: Ways) -> None:
    status, body = server.predict(seed=1)
    assert status == 422
    [detail] = body["detail"]
    assert ways.missing.items() <= detail.items()
    for name, value in (("num_outputs", 9), ("num_outputs", 0), ("aspect_ratio", "1:2"), ("output_quality", "high")):
        status, body = server.predict(**SMALL | {name: value})
        assert status == 422, body
        assert name in [part for detail in body["detail"] for part in detail["loc"]]
    status, body = server.predict(**SMALL | {"num_outputs": "1"})
    assert (status == 200) is ways.coerces, body
    status, body = server.predict(**SMALL | {"image": None, "seed": None})
    assert (status, body["status"]) == (200, "succeeded"), body
    assert server.predict(**SMALL, something="else")[0] == 200
    status, body = server.call("POST", "/predictions", b"{")
    assert status in (400, 422)


def test_pictures_come_in_as_data_and_as_links(server: Server, receiver: Receiver, draw: Draw, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 128), "orange").save(buffer, "PNG")
    receiver.files["/picture.png"] = buffer.getvalue()
    (tmp_path / "picture.png").write_bytes(buffer.getvalue())
    asked = SMALL | {"num_inference_steps": 4, "output_format": "png"}
    expected = draw(**asked, image=tmp_path / "picture.png")
    assert expected != draw(**asked)
    for sent in (data_uri(buffer.getvalue()), f"{receiver.url}/picture.png"):
        status, body = server.predict(**asked, image=sent)
        assert status == 200 and body["status"] == "succeeded", body
        assert decoded(body["output"][0]) == ("image/png", expected)


def test_a_failure_is_said_in_the_predictors_words(server: Server, ways: Ways, draw: Draw, tmp_path: Path) -> None:
    status, body = server.predict(**SMALL, image=data_uri(b"no picture"))
    assert status == 200 and body["status"] == "failed"
    assert body["error"].startswith(f"{ways.failed}image: "), body["error"]
    assert ("Traceback" in body["logs"]) is ways.traces
    (tmp_path / "picture.png").write_bytes(b"")
    status, body = server.predict(**SMALL, image=str(tmp_path / "picture.png"))  # a path on the server's machine
    assert status == 422 or body["status"] == "failed", body
    check_right(server, draw)
