"""The folder of a hosted model: by the rules of Cog's static parser, typed, pinned, written whole or not at all."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cog_rules import Broken, read
from PIL import Image

from flux_engine import OutputError, Predictor, RequestCancelled, hub
from flux_engine.cli import cog, main
from flux_engine.fetch import AT_ONCE, together
from flux_engine.predictor import Hosted
from flux_engine.replicate.hosting import Hosting, generate
from flux_engine.replicate.pinned import pins, python
from flux_engine.replicate.schema import Schema
from flux_engine.replicate.schemas import AS_OF, SCHEMAS

ALL = [*SCHEMAS.values(), *AS_OF.values()]
RICH = Hosting(models={"dev": 'a "b" c'}, lora="owner/name", quantization="fp8", compile="default", requirements=["x"])

# ---- the static rules ----


@pytest.mark.parametrize("schema", ALL, ids=lambda schema: schema.name)
def test_the_inputs_can_be_read_from_the_source_alone(schema: Schema) -> None:
    for hosting in (Hosting(), RICH):
        reading = read(generate(schema, hosting)["predict.py"], "Predictor")
        said = schema.openapi()["components"]["schemas"]
        assert reading.inputs == said["Input"]
        assert list(reading.inputs["properties"]) == list(said["Input"]["properties"])
        assert reading.output == said["Output"]
        for name, enum in reading.enums.items():
            assert enum == said[name]


GOOD = """
from typing import Optional
from cog import BasePredictor, Input, Path
from elsewhere import SIZES, Base
WORDS = "said once"
NAMES = ["a", "b"]
TABLE = {"c": "d"}


class Predictor(BasePredictor):
    def predict(self, text: str = Input(description=WORDS, default="a", choices=NAMES + list(TABLE.keys())),
                number: int = Input(ge=0, le=3, default=1), seed: Optional[int] = Input(default=None),
                image: Path = Input(description="x")) -> list[Path]:
        return []
"""


def test_what_the_rules_allow() -> None:
    reading = read(GOOD, "Predictor")
    assert reading.inputs["required"] == ["image"]
    assert reading.enums["text"]["enum"] == ["a", "b", "c"]
    assert reading.inputs["properties"]["seed"]["nullable"]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("class Predictor(BasePredictor)", "class Model(BasePredictor)", "no class Predictor in this file"),
        ("(BasePredictor):\n    def predict", "(Base):\n    def other", "must define run"),
        ("image: Path = Input(description=\"x\")", "**inputs", "name no inputs"),
        ("        return []", "        return eval('[]')", "eval"),
        ("        return []", "        self.predict.__signature__ = None", "__signature__"),
        ("choices=NAMES + list(TABLE.keys())", "choices=SIZES", "SIZES is not known"),
        ("choices=NAMES + list(TABLE.keys())", "choices=tuple(NAMES)", "no literal"),
        ("choices=NAMES + list(TABLE.keys())", "choices=[\"x\"]", "the default is no choice"),
        ("description=WORDS", "description=f'{WORDS}'", "no literal"),
        ("default=1", "default_factory=int", "takes no default_factory"),
        ("seed: Optional[int]", "seed: int", "makes it required"),
        ("seed: Optional[int] = Input(default=None)", "seed: int | None = None", "no type of an input"),
        ("number: int", "number: complex", "no type of an input"),
        ("ge=0, le=3, default=1", "choices=NAMES", "choices of int"),
        ("-> list[Path]", "-> Optional[Path]", "no type of an output"),
        ("-> list[Path]", "", "no type of an output"),
    ],
)  # fmt: skip
def test_each_rule_is_looked_at(old: str, new: str, why: str) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(Broken, match=re.escape(why)):
        read(GOOD.replace(old, new), "Predictor")


def test_every_generated_file_is_typed(tmp_path: Path) -> None:
    """All of them in one run of pyright, against the real cog."""
    for schema in ALL:
        folder = tmp_path / schema.name.replace("@", "-").replace(".", "-")
        folder.mkdir()
        (folder / "predict.py").write_text(generate(schema, Hosting(models="demo-dev"))["predict.py"])
    # Cog's own documentation has setup() without the `weights` of its base class.
    settings: dict[str, Any] = {"typeCheckingMode": "standard", "reportIncompatibleMethodOverride": "none"}
    settings["extraPaths"] = [str(Path(__file__).parent.parent)]
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    done = subprocess.run([*command, "--outputjson"], capture_output=True, text=True, check=False, timeout=300)
    told = json.loads(done.stdout)
    assert told["summary"]["filesAnalyzed"] == len(ALL)
    assert [one["message"] for one in told["generalDiagnostics"]] == []


# ---- the rest of the folder ----


def test_what_the_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "model"
    command = ["cog", "init", "flux-finetune", str(folder), "--lora", "demo-dev-zorblin", "--compile"]
    assert main([*command, "--model", "dev=demo-dev", "--model", "schnell=demo-schnell", "--quantization", "int8"]) == 0
    told = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(told) == sorted(path for path in folder.rglob("*") if path.is_file())
    source = (folder / "predict.py").read_text()
    for text in (
        '"flux-finetune",',
        'model={"dev": "demo-dev", "schnell": "demo-schnell"},',
        'lora="demo-dev-zorblin",',
        'quantization="int8",',
        'compile="default",',
        'compile_cache="compiled",',
        "Optional[Path]",
    ):
        assert text in source, text
    assert "Optional[Secret]" in generate(SCHEMAS["flux-dev-lora"], Hosting())["predict.py"]
    assert "safety" not in source.replace("disable_safety_checker", "")
    config = yaml.safe_load((folder / "cog.yaml").read_text())
    assert config["build"]["gpu"] is True and config["build"]["python_version"] == python()
    assert config["build"]["python_requirements"] == "requirements.txt"
    assert config["predict"] == "predict.py:Predictor"
    published = SCHEMAS["flux-finetune"].openapi()
    assert json.loads((folder / "openapi_schema.json").read_text()) == published
    checked_by = json.loads((folder / ".cog" / "openapi_schema.json").read_text())
    inputs = checked_by["components"]["schemas"]["Input"]["properties"]
    assert {name for name, one in inputs.items() if one["type" if "type" in one else "allOf"][-1] == "null"} == {
        one.name for one in SCHEMAS["flux-finetune"].inputs if one.optional
    }
    for one in inputs.values():
        if one.get("nullable"):
            one["type"] = one["type"][0]
    assert checked_by == published


def test_requirements_are_exact(tmp_path: Path) -> None:
    for name, there, away in (
        (
            "flux-schnell",
            ["torch", "transformers", "huggingface-hub"],
            ["diffusers", "opencv-python-headless", "pytest"],
        ),
        ("sdxl-controlnet", ["diffusers", "opencv-python-headless", "torch"], ["cog"]),
    ):
        assert main(["cog", "init", name, str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "requirements.txt").read_text().splitlines()
        assert re.fullmatch(r"flux-engine(\[preprocess\])?(==| @ ).+", lines[0])
        assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines[1:]), lines
        names = [line.partition("==")[0] for line in lines[1:]]
        assert names == sorted(names) and len(set(names)) == len(names)
        assert set(there) <= set(names) and not set(away) & set(names)
    assert not any("+" in line for line in pins()[1:])  # a build of torch that only this machine has


def test_where_the_library_came_from_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import metadata

    real = metadata.distribution

    class Installed:
        version = "1.2.3"
        requires = ()

        def __init__(self, said: object) -> None:
            self.said = said

        def read_text(self, name: str) -> str | None:
            return None if self.said is None else json.dumps(self.said)

    for said, line in (
        (None, "flux-engine==1.2.3"),
        ({"url": "file:///somewhere", "dir_info": {"editable": True}}, "flux-engine==1.2.3"),
        ({"url": "https://x.org/f.whl", "archive_info": {}}, "flux-engine @ https://x.org/f.whl"),
        (
            {"url": "https://x.org/f", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "flux-engine @ git+https://x.org/f@abc",
        ),
        ({"url": "file:///somewhere", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "flux-engine==1.2.3"),
    ):
        found = Installed(said)
        monkeypatch.setattr(metadata, "distribution", lambda n, f=found: f if n == "flux-engine" else real(n))
        assert pins()[0] == line
        assert main(["cog", "init", "flux-dev", str(tmp_path / "x"), "--force"]) == 0
        assert ("say --requirement" in capsys.readouterr().err) == (
            said is not None and said["url"].startswith("file:")
        )
    there = ["--force", "--requirement", "flux-engine @ https://y.org/g"]
    assert main(["cog", "init", "flux-dev", str(tmp_path / "x"), *there]) == 0
    assert (tmp_path / "x" / "requirements.txt").read_text().startswith("flux-engine @ https://y.org/g\n")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["flux-schnel"], "did you mean 'flux-schnell'"),
        (["flux-dev", "--model", "demo-dex"], "did you mean 'demo-dev'"),
        (["flux-dev", "--lora", "demo-dev-haze"], "takes no LoRA"),
        (["flux-dev", "--quantization", "int3"], "int3"),
        (["flux-dev", "--model", "demo-dev", "--model", "demo-schnell"], "takes it once"),
        (["flux-finetune", "--model", "dev=demo-dev", "--model", "x=demo-dev"], "dev=MODEL"),
    ],
)
def test_what_cannot_be_hosted_is_refused(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cog", "init", args[0], str(tmp_path / "x"), *args[1:]]) in (1, 2)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "b.py").write_text("old")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="not empty"):
        cog.write_folder(tmp_path, {"b.py": "new"})
    (tmp_path / "c").mkdir()  # a folder stands where the last file would go, and has something in it
    (tmp_path / "c" / "x").write_text("x")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "c.py":
            raise OSError(errno.ENOSPC, "no room")
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        for texts in ({"a/a.py": "1", "b.py": "2", "c.py": "3"},):
            with pytest.raises(OutputError, match="no room"):
                cog.write_folder(tmp_path, texts, force=True)
            with pytest.raises(OutputError, match="no room"):
                cog.write_folder(tmp_path / "new", texts)
    (tmp_path / "c" / "x").unlink()
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()
    cog.write_folder(tmp_path, {"a/a.py": "1", "b.py": "2"}, force=True)
    assert (tmp_path / "b.py").read_text() == "2" and (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="is no folder"):
        cog.write_folder(tmp_path / "mine.txt", {})


# ---- what runs in it ----


class Told:
    """Stands for a host's scope."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def record_metric(self, name: str, value: float) -> None:
        self.metrics[name] = value


class Cancelled(BaseException):
    """What a host raises."""


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Hosted:
    folder = tmp_path_factory.mktemp("hosted")
    one = Hosted(Predictor("flux-schnell", model="demo-schnell", output_dir=folder, say=lambda line: None))
    one.setup()
    return one


SMALL = {"prompt": "a red circle", "megapixels": "0.25", "num_inference_steps": 1, "output_format": "png"}


def test_a_hosted_predictor_predicts_and_tells_metrics(hosted: Hosted, tmp_path: Path) -> None:
    told = Told()
    [path] = hosted.predict(told, seed=1, **SMALL)
    other = Predictor("flux-schnell", model="demo-schnell", output_dir=tmp_path, say=lambda line: None)
    alone = other.predict(seed=1, **SMALL)
    assert isinstance(alone, list) and path.read_bytes() == alone[0].read_bytes()
    assert told.metrics["image_count"] == 1 and told.metrics["timing.denoise"] > 0


def test_files_of_old_predictions_go(hosted: Hosted) -> None:
    paths = [hosted.predict(Told(), seed=seed, **SMALL)[0] for seed in range(4)]
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_errors_are_the_predictors_own(hosted: Hosted) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        hosted.predict(Told(), **SMALL | {"num_inference_steps": 9})


def test_a_host_cancels_by_raising_anywhere_in_the_waiting_thread(hosted: Hosted) -> None:
    """As Cog does it: an exception set for the thread from outside. The work stops, and the next one is right."""
    import ctypes

    [right] = hosted.predict(Told(), seed=5, **SMALL)
    expected = right.read_bytes()
    ended: list[BaseException] = []
    began = threading.Event()
    hosted.predictor.say = lambda line: began.set()

    def run() -> None:
        try:
            hosted.predict(Told(), prompt="a red circle", num_outputs=4, seed=1)
        except BaseException as error:  # noqa: BLE001  looked at below
            ended.append(error)

    for _ in range(3):
        began.clear()
        thread = threading.Thread(target=run)
        thread.start()
        assert began.wait(60)
        asked = time.perf_counter()
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled))
        thread.join(60)
        assert not thread.is_alive() and time.perf_counter() - asked < 30
        assert type(ended.pop()) is Cancelled
        [path] = hosted.predict(Told(), seed=5, **SMALL)
        assert path.read_bytes() == expected
        with Image.open(path) as picture:
            assert picture.size == (128, 128)


# ---- weights come several at once ----


def test_calls_are_made_at_the_same_time_and_answered_in_order() -> None:
    meeting = threading.Barrier(AT_ONCE, timeout=20)  # broken unless so many are there at once

    def call(number: int) -> int:
        meeting.wait()
        return number

    assert together([lambda n=n: call(n) for n in range(2 * AT_ONCE)]) == list(range(2 * AT_ONCE))
    assert together([lambda: 3]) == [3] and together([]) == []


def test_the_first_error_is_told_at_once_and_nothing_more_begins() -> None:
    release, begun = threading.Event(), []

    def slow() -> None:
        begun.append(1)
        release.wait(20)

    def wrong() -> None:
        raise RequestCancelled("no")

    began = time.perf_counter()
    with pytest.raises(RequestCancelled):
        together([slow, wrong, *[slow] * 20])
    assert time.perf_counter() - began < 5
    release.set()
    time.sleep(0.1)
    assert len(begun) <= AT_ONCE


def test_the_files_of_a_manifest_are_fetched_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The largest first, and each verified."""
    meeting, order = threading.Barrier(AT_ONCE, timeout=20), []
    names = {f"part{n}": n + 1 for n in range(AT_ONCE)}

    def fetch(repository: str, file: str, *, revision: str, offline: bool) -> Path:
        order.append(file)
        meeting.wait()
        path = tmp_path / "snapshots" / "commit" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * names[file])
        return path

    monkeypatch.setattr(hub, "fetch", fetch)
    files = {name: hub.WeightFile(None, "a/b", name, "main", size, None) for name, size in names.items()}
    manifest = replace(hub.find("demo-schnell"), files=files)
    assert list(manifest.obtain()) == list(names)
    wrong = replace(files["part0"], bytes=99)
    with pytest.raises(Exception, match="has 1 bytes, not 99"):
        replace(manifest, files=files | {"part0": wrong}).obtain()
