"""One server for a long time: every picture right, and no memory that is not given back."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cogs import Receiver, Server, data_uri, decoded, receiving, serving
from PIL import Image

from flux_engine import Predictor
from flux_engine.cli import main
from flux_engine.hub import weights_folder

pytestmark = pytest.mark.full
log = logging.getLogger(__name__)

COUNT, FIRST = 200, 20
GROWTH = 1.05
RATIOS = ["1:1", "16:9", "2:3", "9:21"]
COLOURS = ["red", "green", "blue", "yellow", "purple"]
"""As many prompts as the first predictions already bring: an engine remembers 64 of them, encoded, on purpose."""
REFERENCE = {"prompt": "a red circle on a blue background", "seed": 1, "num_inference_steps": 2, "megapixels": "0.25",
             "output_format": "png"}  # fmt: skip


def resident(server: Server) -> int:
    """Bytes of the server and all that it started."""
    root = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in [root, *root.children(recursive=True)])


@pytest.fixture(scope="module")
def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 128), "orange").save(buffer, "PNG")
    return data_uri(buffer.getvalue())


Job = Callable[[int], None]


@pytest.fixture
def jobs(tmp_path: Path, picture: str) -> Iterator[tuple[Server, list[Job]]]:
    """A server, and the kinds of prediction, each of which looks at what it gets."""
    folder = tmp_path / "model"
    assert main(["cog", "init", "flux-dev-lora", str(folder), "--model", "demo-dev"]) == 0
    alone = Predictor("flux-dev-lora", model="demo-dev", output_dir=tmp_path, say=lambda line: None)
    [path] = alone.predict(**REFERENCE)  # pyright: ignore[reportGeneralTypeIssues]
    right = path.read_bytes()
    lora = weights_folder() / "demo" / "loras" / "demo-dev-haze.safetensors"
    drawn = random.Random(0)
    with receiving() as receiver, serving("0.23", folder) as server:

        def predict(**inputs: Any) -> dict[str, Any]:
            status, body = server.predict(**REFERENCE | inputs)
            assert status == 200, body
            return body

        def sized(number: int) -> None:
            asked = {
                "prompt": f"a {COLOURS[number % len(COLOURS)]} circle at the top",
                "seed": number,
                "aspect_ratio": drawn.choice(RATIOS),
                # The largest comes first: what it takes is no growth afterwards.
                "megapixels": "0.25" if number % 10 else "1",
                "num_outputs": drawn.choice([1, 2]) if number % 10 else 2,
                "output_format": drawn.choice(["png", "webp", "jpg"]),
            }
            body, meant = predict(**asked), alone.resolve(REFERENCE | asked)
            found = [Image.open(io.BytesIO(decoded(uri)[1])).size for uri in body["output"]]
            assert found == [(meant["width"], meant["height"])] * asked["num_outputs"]

        def reference(number: int) -> None:
            assert decoded(predict()["output"][0])[1] == right

        def with_lora(number: int) -> None:
            name = data_uri(lora.read_bytes(), "application/octet-stream") if number % 3 == 0 else "demo-dev-haze"
            body = predict(lora_weights=name, lora_scale=drawn.choice([0.5, 1.0]))
            assert body["status"] == "succeeded", body
            assert decoded(body["output"][0])[1] != right

        def from_picture(number: int) -> None:
            body = predict(image=picture, prompt_strength=0.6, seed=number)
            assert Image.open(io.BytesIO(decoded(body["output"][0])[1])).size == (96, 128)

        def cancelled(number: int) -> None:
            cancel_one(server, receiver, f"cancelled-{number}", 0.2 + drawn.random())

        def failed(number: int) -> None:
            body = predict(image=data_uri(b"no picture"))
            assert body["status"] == "failed" and "image" in body["error"]
            assert server.predict(prompt=3)[0] == 422

        yield server, [sized, with_lora, from_picture, reference, sized, cancelled, sized, failed, with_lora, reference]


def cancel_one(server: Server, receiver: Receiver, name: str, seconds: float) -> None:
    """One that would take long, not waited for to its end."""
    asked = REFERENCE | {"num_outputs": 4, "num_inference_steps": 50, "megapixels": "1"}
    assert server.begin(name, receiver.url, asked, webhook_events_filter=["completed"])[0] == 202
    time.sleep(seconds)
    assert server.call("POST", f"/predictions/{name}/cancel")[0] == 200
    assert receiver.ended(name)["status"] == "canceled"


def test_two_hundred_mixed_predictions(jobs: tuple[Server, list[Job]]) -> None:
    server, kinds = jobs
    seen = []
    for number in range(COUNT):
        kinds[number % len(kinds)](number)
        if number + 1 in (FIRST, COUNT):
            time.sleep(1)
        seen.append(resident(server))
    told = ", ".join(f"{size / 2**20:.0f}" for size in seen[FIRST - 1 :: FIRST])
    log.info("MiB after every %d: %s", FIRST, told)
    assert seen[-1] <= GROWTH * seen[FIRST - 1], told
