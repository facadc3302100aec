"""Weight files: hostile, truncated, altered or of another shape are refused by name; nothing is loaded in part."""

from __future__ import annotations

import json
import shutil
import struct
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flux_engine
from flux_engine import WeightsError, hub
from flux_engine.checkpoints.keys import to_theirs
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.checkpoints.tables import FLUX_DIFFUSERS

CPU = torch.device("cpu")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo model's files, to be damaged, reached through FLUX_ENGINE_WEIGHTS."""
    source = hub.weights_folder()
    for name in ("manifests", "demo"):
        shutil.copytree(source / name, tmp_path / name)
    monkeypatch.setenv("FLUX_ENGINE_WEIGHTS", str(tmp_path))
    return tmp_path


def transformer(root: Path) -> Path:
    return root / "demo" / "flux" / "transformer" / "schnell.safetensors"


def sign(root: Path) -> None:
    """Make the manifest agree with a changed transformer, so that the reader itself is tested."""
    manifest = root / "manifests" / "demo-schnell.toml"
    path, text = transformer(root), manifest.read_text()
    known = hub.find("demo-schnell").files["transformer"]
    import hashlib

    text = text.replace(f"bytes = {known.bytes}", f"bytes = {path.stat().st_size}", 1)
    text = text.replace(known.sha256, hashlib.sha256(path.read_bytes()).hexdigest())
    manifest.write_text(text)


def test_a_copy_elsewhere_loads(copy: Path) -> None:
    engine = flux_engine.load("demo-schnell", device="cpu")
    assert engine("a red circle", seed=0, num_inference_steps=1).image.size == (256, 256)


def test_missing_file(copy: Path) -> None:
    transformer(copy).unlink()
    with pytest.raises(WeightsError, match=r"schnell\.safetensors is missing"):
        flux_engine.load("demo-schnell")


def test_truncated_file(copy: Path) -> None:
    path = transformer(copy)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="bytes, not"):
        flux_engine.load("demo-schnell")
    sign(copy)
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        flux_engine.load("demo-schnell")


def test_altered_file(copy: Path) -> None:
    path = transformer(copy)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="it was altered"):
        flux_engine.load("demo-schnell")


def test_tensors_missing_left_over_or_misshapen_are_listed(copy: Path) -> None:
    tensors = load_file(transformer(copy))
    del tensors["txt_in.bias"]
    tensors["img_in.bias"] = torch.zeros(7)
    tensors["extra.weight"] = torch.zeros(1)
    save_file(tensors, transformer(copy))
    sign(copy)
    with pytest.raises(WeightsError) as caught:
        flux_engine.load("demo-schnell")
    text = str(caught.value)
    assert "1 missing: txt_in.bias" in text
    assert "1 not known: extra.weight" in text
    assert "img_in.bias is [7], not [192]" in text


def test_another_network_is_refused(copy: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, transformer(copy))
    sign(copy)
    with pytest.raises(WeightsError, match=r"not a FLUX\.1 transformer"):
        flux_engine.load("demo-schnell")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04pickle",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"{}" + b"left over",
        struct.pack("<Q", 100) + b'{"a": {"dtype": "F32"',
    ],
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.safetensors"), WeightSource.open(path) as source:
        source.rows("a")


def test_offsets_past_the_end_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(WeightsError):
        WeightSource.open(path)


def test_rows_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    save_file({"a": whole}, path)
    with WeightSource.open(path) as source:
        assert torch.equal(source.rows("a"), whole)
        assert torch.equal(source.rows("a", 1, 3), whole[1:3])
        assert source.rows("a", dtype=torch.bfloat16).dtype == torch.bfloat16
        with pytest.raises(WeightsError, match="no tensor 'b'"):
            source.rows("b")


def test_loading_fills_every_tensor_and_freezes_it(tmp_path: Path) -> None:
    original = nn.Linear(3, 2)
    path = tmp_path / "x.safetensors"
    save_file(original.state_dict(), path)
    with WeightSource.open(path) as source:
        loaded = load_module(lambda: nn.Linear(3, 2), source, dtype=torch.float32, device=CPU)
    assert torch.equal(loaded.weight, original.weight)
    assert not loaded.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_whole_numbers_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"weight": torch.ones(2, 3, dtype=dtype), "bias": torch.zeros(2)}, tmp_path / "x.safetensors")
    with WeightSource.open(tmp_path / "x.safetensors") as source, pytest.raises(WeightsError, match="whole numbers"):
        load_module(lambda: nn.Linear(3, 2), source, dtype=torch.float32, device=CPU)


def test_a_name_no_entry_matches_is_an_error() -> None:
    with pytest.raises(WeightsError, match=r"strange\.weight"):
        to_theirs({"strange.weight": torch.zeros(1)}, FLUX_DIFFUSERS)


WHOLE = 'spec = "demo-schnell"\ndescription = ""\nlicence = ""\nsource = ""\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[files.vae]\npath = "x"\nsha265 = "1"', "sha265 is not one of .*did you mean 'sha256'"),
        ('[files.vae]\npath = "x"\nsha256 = "1"', "sha256 is '1', not 64 digits"),
        ('[files.vae]\npath = "x"\nbytes = "12"', "bytes is '12'"),
        ("[files.vae]\npath = 3", "path is 3"),
        ("base = 3\n[files]", "base is 3"),
    ],
)
def test_manifests_with_slips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "mine.toml").write_text(WHOLE + text)
    monkeypatch.setenv("FLUX_ENGINE_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=rf"mine\.toml is not a manifest: .*{words}"):
        flux_engine.load("mine")


def test_a_manifest_that_gives_no_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "mine.toml").write_text(WHOLE + '[files.transformer]\npath = "x.safetensors"')
    monkeypatch.setenv("FLUX_ENGINE_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"mine: its manifest lacks vae, text_encoder, .* or name a base"):
        flux_engine.load("mine")


@pytest.mark.parametrize("text", ["", "spec = 3", "[files", 'spec = "x"\nfiles = 1'])
def test_broken_manifests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "broken.toml").write_text(text)
    monkeypatch.setenv("FLUX_ENGINE_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"broken\.toml is not a manifest"):
        flux_engine.load("demo-schnell")


def test_an_unknown_spec_is_refused(copy: Path) -> None:
    manifest = copy / "manifests" / "demo-schnell.toml"
    manifest.write_text(manifest.read_text().replace('spec = "demo-schnell"', 'spec = "flux-9"'))
    with pytest.raises(WeightsError, match="flux-9"):
        flux_engine.load("demo-schnell")


def test_a_published_model_is_taken_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that names a repository, over a cache made by hand: the same picture as from the packaged files."""
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "hub" / "models--owner--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    lines = ['spec = "demo-schnell"', 'description = ""', 'licence = ""', 'source = ""', 'repository = "owner/small"']
    for name, file in hub.find("demo-schnell").files.items():
        assert file.path is not None
        there = name if "/" in name else f"{name}.safetensors"
        target = repository / "snapshots" / commit / there
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.path, target)
        lines.append(f'[files."{name}"]\nfile = "{there}"' + (f'\nsha256 = "{file.sha256}"' if name == "vae" else ""))
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "small.toml").write_text("\n".join(lines))
    monkeypatch.setenv("FLUX_ENGINE_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hub.find("small", hub.manifests(tmp_path)).bytes is None

    small, packaged = (
        flux_engine.load(n, device="cpu", dtype="float32", offline=True) for n in ("small", "demo-schnell")
    )
    pictures = [engine("a red circle", seed=0, output_type="latent").images[0] for engine in (small, packaged)]
    assert torch.equal(*pictures)

    vae = repository / "snapshots" / commit / "vae.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match="it was altered; delete it there"):
        flux_engine.load("small", offline=True)
    vae.unlink()
    with pytest.raises(WeightsError, match="nothing is fetched offline"):
        flux_engine.load("small", offline=True)


def test_copies_share_what_is_open(tmp_path: Path) -> None:
    """Two would close one descriptor twice, and the second time it may be another file's."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(3.0)}, path)
    with WeightSource.open(path) as source:
        assert deepcopy(source).files[0] is source.files[0]
        assert torch.equal(deepcopy(source).rows("a"), torch.arange(3.0))
        assert torch.equal(source.rows("a"), torch.arange(3.0))


def test_columns_of_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(6.0).reshape(3, 2)}, path)
    with WeightSource.open(path) as source:
        wide = source.widened("a", 5)
        assert wide.shapes["a"] == (3, 5)
        wanted = torch.cat((torch.arange(6.0).reshape(3, 2), torch.zeros(3, 3)), dim=1)
        assert torch.equal(wide.rows("a"), wanted)
        assert torch.equal(wide.rows("a", 1, 2, dtype=torch.bfloat16), wanted[1:2].bfloat16())
        assert torch.equal(source.rows("a"), wanted[:, :2])
