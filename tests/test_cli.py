"""The command line, run as a user runs it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flux_engine import OutputError, cli, files
from flux_engine.images import read_parameters


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flux_engine.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_generate_writes_a_picture_and_says_how_long_it_took(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.png"
    done = run("generate", "a red circle", "--seed", "0", "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    for stage in ("import", "load", "encode", "denoise", "decode", "save"):
        assert f"{stage} " in done.stderr.splitlines()[-1]
    with Image.open(out) as image:
        assert image.size == (256, 256)
    text = read_parameters(out)
    assert text is not None
    assert text.startswith("a red circle\nSteps: 4, Sampler: Euler")
    assert "Seed: 0, Size: 256x256, Model: demo-schnell" in text


def test_the_seed_told_is_the_seed_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    assert cli.main(["generate", "x", "--steps", "1", "--output", str(out)]) == 0
    told = capsys.readouterr().err.splitlines()[0].rpartition(" ")[2]
    assert f"Seed: {told}," in (read_parameters(out) or "")


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp", "png"])
def test_formats_and_metadata(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"a.{ending}"
    base = ["generate", "ein grüner Stern", "--seed", "3", "--steps", "1", "--output", str(out), "--json"]
    assert cli.main(base) == 0
    with Image.open(out) as image:
        assert image.format == {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}[ending]
    text = read_parameters(out)
    assert text is not None
    assert text.startswith("ein grüner Stern\nSteps: 1")
    assert cli.main([*base, "--no-metadata"]) == 0
    assert read_parameters(out) is None


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
def test_very_long_prompts_can_be_saved(tmp_path: Path, ending: str) -> None:
    prompt = "a red circle 🎨 " * 5000
    out = tmp_path / f"a.{ending}"
    assert cli.main(["generate", prompt, "--steps", "1", "--output", str(out), "--json"]) == 0
    text = read_parameters(out)
    assert text is not None
    assert text.startswith(prompt[:20_000])


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.webp"
    code = cli.main(
        ["generate", "a red circle", "--num-outputs", "2", "--seed", "0", "--width", "100", "--height", "96",
         "--guidance", "3", "--output", str(out), "--json"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report["images"] == [str(tmp_path / "b-0.webp"), str(tmp_path / "b-1.webp")]
    assert all(Path(p).exists() for p in report["images"])
    assert (report["width"], report["height"], report["seeds"]) == (112, 96, [0, 1])
    assert len(report["notes"]) == 2
    assert set(report["timings"]) == {"import", "load", "encode", "denoise", "decode", "save", "total"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "0"], "num_inference_steps 0"),
        (["--num-outputs", "0"], "num_outputs 0"),
        (["--width", "0", "--height", "64"], "width 0"),
        (["--guidance", "nan"], "guidance_scale nan"),
        (["--seed", "-1"], "seed -1"),
        (["--model", "nothing"], "no model 'nothing'"),
        (["--aspect-ratio", "7:5"], "aspect_ratio '7:5'"),
        (["--format", "gif"], "format 'gif'"),
        (["--output", "a.bmp"], "format 'bmp'"),
        (["--quality", "101"], "quality 101"),
        (["--strict", "--width", "100", "--height", "100"], "strict: width 100"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "x", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from flux_engine import cli;"
        "assert cli.main(['generate', 'x', '--steps', '0']) == 2; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path).returncode == 0


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    for out in (blocked / "a.png", tmp_path):
        assert cli.main(["generate", "x", "--output", str(out)]) in (1, 2)
        assert str(tmp_path) in capsys.readouterr().err
    if os.geteuid() != 0:  # root may write anywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert cli.main(["generate", "x", "--output", str(closed / "a.png")]) == 1
        assert "cannot write" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = tmp_path / "a.png"
    old.write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left"):
        files.write(old, b"new")
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_output_without_an_ending_gets_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--steps", "1", "--output", str(tmp_path / "pic"), "--format", "webp"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pic.webp")


def test_pictures_without_a_name_are_out_whatever_lies_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo makes a folder of that name."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    assert cli.main(["generate", "x", "--steps", "1"]) == 0
    assert cli.main(["generate", "x", "--steps", "1", "--num-outputs", "2"]) == 0
    assert capsys.readouterr().out.split() == ["out.png", "out-0.png", "out-1.png"]


def test_a_shortened_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would mean another one as soon as there is one."""
    with pytest.raises(SystemExit):
        cli.main(["generate", "x", "--num-output", "2"])
    assert "--num-output" in capsys.readouterr().err


def test_models_info_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    assert "demo-schnell" in {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert cli.main(["models"]) == 0
    assert "demo-schnell" in capsys.readouterr().out
    assert cli.main(["info", "--json", "--model", "demo-schnell", "--device", "cpu", "--dtype", "float32"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["device"] == "cpu"
    assert info["model"]["parts"]["vae"]["dtype"] == "float32"
    assert cli.main(["info"]) == 0
    assert "hardware" in capsys.readouterr().out
    assert cli.main(["schema", "flux-schnell", "--openapi"]) == 0
    assert json.loads(capsys.readouterr().out)["openapi"] == "3.0.2"
    assert cli.main(["schema", "flux-schnell"]) == 0
    assert "num_inference_steps" in capsys.readouterr().out
    assert cli.main(["schema", "flux"]) == 2
    assert "flux-schnell" in capsys.readouterr().err
