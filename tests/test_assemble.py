"""What a model name may be: a manifest, a file, a folder, a repository; and writing a loaded model for other tools."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux_engine
from flux_engine import EngineConfig, OutputError, UnknownModel, UnsupportedError, WeightsError, cli, hub
from flux_engine.assemble import find_model
from flux_engine.checkpoints.export import new_folder
from flux_engine.checkpoints.folders import choose, weights_in
from flux_engine.checkpoints.source import WeightSource
from flux_engine.engine import Engine
from flux_engine.ledger import REMEMBERED, Ledger, Pin
from flux_engine.specs import SPECS

PARTS = hub.find("demo-schnell").obtain()
CONFIG = EngineConfig()


def latent(engine: Engine) -> Tensor:
    return engine("a red circle", seed=0, num_inference_steps=2, output_type="latent").images[0]


def load(name: object, **options: str) -> Engine:
    return flux_engine.load(str(name), device="cpu", dtype="float32", offline=True, **options)


def everything() -> dict[str, Tensor]:
    """All parts of the demo model as one file of ComfyUI's holds them."""
    return {
        prefix + name: tensor
        for prefix, path in (
            ("model.diffusion_model.", PARTS["transformer"]),
            ("vae.", PARTS["vae"]),
            ("text_encoders.clip_l.transformer.", PARTS["text_encoder"] / "model.safetensors"),
            ("text_encoders.t5xxl.transformer.", PARTS["text_encoder_2"] / "model.safetensors"),
        )
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    assert cli.main(["convert", "demo-schnell", str(folder)]) == 0
    return folder


def test_the_same_model_by_every_kind_of_name(engine: Engine, exported: Path, tmp_path: Path) -> None:
    expected = latent(engine)
    save_file(everything(), tmp_path / "all.safetensors")
    for name in (PARTS["transformer"], exported, exported / "transformer", tmp_path / "all.safetensors"):
        loaded = flux_engine.load(name, device="cpu", dtype="float32", offline=True)
        assert torch.equal(latent(loaded), expected), name
        assert (loaded.spec.sizes, loaded.spec.num_inference_steps) == (engine.spec.sizes, 4)
        assert loaded.spec.schedule == engine.spec.schedule


@pytest.mark.parametrize(
    ("prefix", "other", "words"),
    [
        ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.", "a CLIP text encoder under each of"),
        ("text_encoders.t5xxl.transformer.", "", "a T5 text encoder under each of"),
        ("vae.", "first_stage_model.", "an autoencoder under each of"),
        ("model.diffusion_model.", "ema.", "a FLUX.1 transformer under each of"),
    ],
)
def test_two_parts_of_a_kind_in_one_file(tmp_path: Path, prefix: str, other: str, words: str) -> None:
    tensors = everything()
    again = {other + n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
    save_file(tensors | again, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=words) as caught:
        load(tmp_path / "x.safetensors")
    assert prefix in str(caught.value) and (other or "no prefix") in str(caught.value)


def test_a_guided_transformer_is_taken_for_what_it_is(tmp_path: Path) -> None:
    shutil.copy(hub.find("demo-dev").obtain()["transformer"], tmp_path / "x.safetensors")
    spec = find_model(str(tmp_path / "x.safetensors"), CONFIG).spec
    assert spec.name == "x" and spec.schedule.shifted and spec.num_inference_steps == 28


def test_convert_keeps_every_bit(exported: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(exported), str(tmp_path / "bfl"), "--to", "bfl"]) == 0
    again, first = load_file(tmp_path / "bfl" / "small.safetensors"), load_file(PARTS["transformer"])
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    again, first = load_file(tmp_path / "bfl" / "ae.safetensors"), load_file(PARTS["vae"])
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("matrices", "vectors"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_convert_of_other_dtypes(tmp_path: Path, matrices: torch.dtype, vectors: torch.dtype) -> None:
    """All in the dtype that most numbers have, which are the matrices'."""
    whole = matrices
    given = {n: t.to(matrices if t.ndim > 1 else vectors) for n, t in everything().items()}
    save_file(given, tmp_path / "x.safetensors")
    assert cli.main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "bfl"), "--to", "bfl"]) == 0
    assert cli.main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "diffusers")]) == 0
    for file, prefix in (("x", "model.diffusion_model."), ("ae", "vae.")):
        written = load_file(tmp_path / "bfl" / f"{file}.safetensors")
        assert {prefix + name for name in written} == {name for name in given if name.startswith(prefix)}
        for name, tensor in written.items():
            assert tensor.dtype == whole and torch.equal(tensor, given[prefix + name].to(whole)), name
    names = (tmp_path / "x.safetensors", tmp_path / "diffusers", tmp_path / "bfl" / "x.safetensors")
    first, *others = (flux_engine.load(name, device="cpu", dtype=whole, offline=True) for name in names)
    expected = first._pipeline.family.net.state_dict()
    for other in others:
        found = other._pipeline.family.net.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert torch.equal(latent(first), latent(others[0]))


def test_transformers_reads_what_is_written_and_encodes_the_same(engine: Engine, exported: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    text = engine._pipeline.family.text
    clip = CLIPTextModel.from_pretrained(exported / "text_encoder", dtype=torch.float32)
    t5 = T5EncoderModel.from_pretrained(exported / "text_encoder_2", dtype=torch.float32)
    for clip_kind, t5_kind in ((CLIPTokenizer, T5TokenizerFast), (AutoTokenizer, AutoTokenizer)):
        clip_tokens = clip_kind.from_pretrained(exported / "tokenizer")
        t5_tokens = t5_kind.from_pretrained(exported / "tokenizer_2")
        for prompt in ("a large red circle on a blue background", "", "Ünïcode ☃, <|endoftext|>  </s>", "a star " * 99):
            ours = text.encode([prompt])
            with torch.inference_mode():
                ids = clip_tokens(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
                pooled = clip(ids.input_ids).pooler_output
                length = text.max_sequence_length
                ids = t5_tokens(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
                tokens = t5(ids.input_ids).last_hidden_state
            assert (pooled - ours.pooled).abs().max() <= 1e-5 and (tokens - ours.tokens).abs().max() <= 1e-5, prompt


def test_two_that_write_the_same_folder_at_once(tmp_path: Path) -> None:
    """The second to end is refused; neither has files of the other."""

    def other() -> None:
        with new_folder(tmp_path / "x") as folder:
            (folder / "other").touch()

    with pytest.raises(OutputError, match="cannot write"), new_folder(tmp_path / "x") as folder:
        (folder / "one").touch()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (folder / "one").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "other"]


def test_what_is_written_can_be_read_by_those_who_may_read_its_folder(exported: Path) -> None:
    modes = {path.stat().st_mode for path in exported.rglob("*") if path.is_file()}
    assert len(modes) == 1, modes


def test_convert_writes_whole_or_not_at_all(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError, match="exists already"):
        engine.export(tmp_path / "full")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="exists already"):
        engine.export(tmp_path / "file")
    for odd in (None, 3, b"x", "x\0"):
        with pytest.raises(OutputError, match="named by a text or a path"):
            engine.export(odd)  # pyright: ignore[reportArgumentType]
    program = (
        "import sys, flux_engine, resource, signal\n"
        "engine = flux_engine.load('demo-schnell', device='cpu')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: engine.export(sys.argv[1])\n"
        "except flux_engine.OutputError as error: print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "new")], capture_output=True, text=True, check=True
    ).stdout
    assert f"cannot write {tmp_path / 'new'}" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("demo-schnel", UnknownModel, "did you mean 'demo-schnell'"),
        ("", UnknownModel, "no model ''"),
        ("./nothing", WeightsError, "nothing does not exist"),
        ("nothing.safetensors", WeightsError, "does not exist"),
        ("owner/nothing", WeightsError, "nothing is fetched offline"),
        ("a/b\0", UnknownModel, "no model"),
        ("falconsai-nsfw", UnknownModel, "is a safety checker and no model"),
        (PARTS["vae"], WeightsError, "it holds an autoencoder"),
        (PARTS["tokenizer"], WeightsError, "holds no safetensors file"),
        ("x" * 5000, UnknownModel, "no model 'xxx"),
        ("x" * 5000 + ".safetensors", WeightsError, "does not exist"),
        ("~nobody-at-all/x", WeightsError, "~nobody-at-all/x does not exist"),
        ("owner/x/../../y.safetensors", UnknownModel, "cannot contain a '..' path segment"),
        ("owner/na--me", UnknownModel, "is not the name of a repository"),
        ("https://huggingface.co/owner/x", UnknownModel, "OWNER/NAME on the Hugging Face hub"),
        ("/dev/zero", WeightsError, "is not a file"),
        ("/proc/self/mem", WeightsError, "cannot be read: Input/output error"),
        (3, UnknownModel, "named by a text or a path, not by 3"),
        (None, UnknownModel, "not by None"),
        (b"demo-schnell", UnknownModel, "not by b'demo-schnell'"),
    ],
)
def test_names_that_cannot_be_loaded(name: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        flux_engine.load(name, device="cpu", offline=True)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"revision": 3}, UnknownModel, "a revision is named by a text, not by 3"),
        ({"variant": ["fp16"]}, UnknownModel, "a variant is named by a text"),
        ({"embedding_cache": "x"}, UnsupportedError, "embedding_cache 'x' is not a whole number"),
        ({"dtype": torch.int8}, UnsupportedError, "dtype 'int8' is not one of"),
    ],
)
def test_options_of_the_wrong_type(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        flux_engine.load("owner/name", offline=True, **options)


@contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """A folder that nobody may look into, not even root."""
    user = os.geteuid()
    folder.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


def test_what_may_not_be_looked_at(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(exported, tmp_path / "closed" / "x")
    (tmp_path / "link.safetensors").symlink_to(folder / "x.safetensors")
    with forbidden(folder.parent):
        for name in (folder, folder.parent, folder / "x.safetensors", tmp_path / "link.safetensors"):
            with pytest.raises(WeightsError, match="cannot be read: Permission denied"):
                load(name)
        with pytest.raises(WeightsError, match="cannot be read: Permission denied"):
            WeightSource.open(folder / "x.safetensors")
        monkeypatch.setenv("FLUX_ENGINE_WEIGHTS", str(folder.parent))
        with pytest.raises(WeightsError, match="manifests cannot be read: Permission denied"):
            load("demo-schnell")


def test_folders_that_are_not_whole(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "x")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 3.0}))
    with pytest.raises(UnsupportedError, match=r"shift of 3\.0 at every size"):
        load(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("[")
    with pytest.raises(WeightsError, match=r"scheduler_config\.json cannot be read"):
        load(folder)
    shutil.rmtree(folder / "scheduler")
    shutil.rmtree(folder / "text_encoder_2")  # the base has it
    assert latent(load(folder)).isfinite().all()
    shutil.rmtree(folder / "transformer")
    with pytest.raises(WeightsError, match="has no transformer"):
        load(folder)
    (folder / "transformer").symlink_to(folder / "transformer")
    with pytest.raises(WeightsError):
        load(folder / "transformer")


def test_a_repository_is_read_from_a_cache_made_by_hand(
    engine: Engine, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "1" * 40
    repository = tmp_path / "hub" / "models--owner--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = shutil.copytree(exported, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(latent(load("owner/small")), latent(engine))
    inside = "owner/small/transformer/diffusion_pytorch_model.safetensors"
    assert torch.equal(latent(load(inside, revision=commit)), latent(engine))
    with pytest.raises(WeightsError, match="holds no variant 'fp16'"):
        load("owner/small", variant="fp16")
    file = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert torch.equal(latent(load("owner/small")), latent(engine))
    with pytest.raises(WeightsError, match=r"\(revision v2\) is not in the cache"):
        load("owner/small", revision="v2")


def test_a_cache_of_symlinks(engine: Engine, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's library keeps it: a snapshot is links to files that are called by their hashes."""
    from huggingface_hub import constants

    repository, commit = tmp_path / "models--owner--small", "1" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = shutil.copytree(exported, repository / "snapshots" / commit)
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        blob = path.rename(repository / "blobs" / f"{number:064x}")
        path.symlink_to(os.path.relpath(blob, path.parent))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("owner/small", snapshot, snapshot / "transformer"):
        assert torch.equal(latent(load(name)), latent(engine)), name
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    with pytest.raises(WeightsError, match=r"vae/diffusion_pytorch_model\.safetensors"):
        load(snapshot)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer/tokenizer.json", None, r"tokenizer is not a tokenizer: it lacks tokenizer\.json"),
        ("tokenizer_2/tokenizer.json", "{", "tokenizer_2 cannot be read as a tokenizer"),
        ("tokenizer_2/tokenizer_config.json", None, "tokenizer_2 has 386 pieces, and its text encoder 286"),
        ("tokenizer/tokenizer_config.json", "[]", "tokenizer cannot be read as a tokenizer"),
        ("text_encoder/config.json", "", r"text_encoder/config\.json cannot be used"),
        ("text_encoder/config.json", '{"vocab_size": 9}', "tensors? .*of another shape"),
        ("text_encoder/config.json", '{"num_hidden_layers": 100000000}', "asks for 100,000,000 layers"),
        ("text_encoder_2/config.json", '{"d_model": "x"}', r"text_encoder_2/config\.json cannot be used"),
        ("text_encoder_2/config.json", '{"d_model": -3}', "no network can be made as it is described"),
        ("text_encoder_2/config.json", '{"d_model": 1' + 18 * "0" + "}", "no network can be made as it is described"),
        ("vae/config.json", '{"norm_num_groups": 0}', "no network can be made as it is described"),
        ("vae/config.json", "[]", "is not a JSON object"),
    ],
)
def test_damaged_folders(exported: Path, tmp_path: Path, file: str, content: str | None, words: str) -> None:
    folder = shutil.copytree(exported, tmp_path / "x")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(WeightsError, match=words):
        load(folder)


@pytest.mark.parametrize(
    "inside",
    ["", "transformer", "transformer/diffusion_pytorch_model.safetensors", "text_encoder", "text_encoder/config.json",
     "tokenizer", "tokenizer/tokenizer.json", "scheduler", "scheduler/scheduler_config.json", "vae/config.json"],
)  # fmt: skip
@pytest.mark.parametrize("loop", [True, False])
def test_symlinks_that_lead_nowhere(exported: Path, tmp_path: Path, inside: str, loop: bool) -> None:
    """In a loop, or to what is gone: never an error without a name, never another model's part in its place."""
    folder = tmp_path / "x"
    shutil.copytree(exported, folder)
    at = folder / inside
    shutil.rmtree(at) if at.is_dir() else at.unlink()
    at.symlink_to(at if loop else "gone")
    with pytest.raises(WeightsError, match=re.escape(str(folder / inside.partition("/")[0]))):
        load(folder)


def test_revisions_and_variants_of_what_has_none(exported: Path) -> None:
    with pytest.raises(WeightsError, match="comes with the package and has no revision"):
        load("demo-schnell", revision="v2")
    with pytest.raises(UnsupportedError, match="no variant 'fp16'"):
        load("demo-schnell", variant="fp16")
    with pytest.raises(WeightsError, match="is here and has no revision"):
        load(exported, revision="v2")


def test_which_file_of_a_folder_is_meant(tmp_path: Path) -> None:
    names = ["x.safetensors.index.json", "x-00001-of-00002.safetensors", "x.safetensors.index.fp16.json",
             "x.fp16-00001-of-00002.safetensors", "x.bin"]  # fmt: skip
    assert choose("here", names) == "x.safetensors.index.json"
    assert choose("here", names, variant="fp16") == "x.safetensors.index.fp16.json"
    assert choose("here", ["sd_xl_base_1.0.safetensors"]) == "sd_xl_base_1.0.safetensors"
    with pytest.raises(WeightsError, match=r"a\.safetensors, b\.safetensors: name the one"):
        choose("here", ["a.safetensors", "b.safetensors"])
    with pytest.raises(WeightsError, match="cannot be read"):
        weights_in(tmp_path / "nothing")


def test_every_manifest_is_whole() -> None:
    known = hub.manifests()
    for manifest in known.values():
        assert manifest.files and manifest.licence and manifest.description and manifest.source
        for name, file in manifest.files.items():
            assert file.path or "/" in file.repository, (manifest.name, name)
            assert file.sha256 is None or len(file.sha256) == 64
        if manifest.kind == "model" and manifest.family == "flux":
            assert manifest.spec in SPECS
            assert {"transformer", "vae", "tokenizer", "tokenizer_2"} <= {name.split("/")[0] for name in manifest.files}
    krea = known["flux-krea-dev"].files
    assert krea["transformer"].repository == "black-forest-labs/FLUX.1-Krea-dev"
    assert krea["vae"] == known["flux-schnell"].files["vae"]
    lcm = known["sdxl-lcm"].files
    assert lcm["unet/config.json"].repository == "latent-consistency/lcm-sdxl" and lcm["unet"].bytes is None
    assert lcm["text_encoder_2"] == known["sdxl"].files["text_encoder_2"]


@pytest.mark.parametrize("base", ["nothing", "x"])
def test_a_base_that_cannot_be(tmp_path: Path, base: str) -> None:
    (tmp_path / "manifests").mkdir()
    text = f'base = "{base}"\nspec = "flux-dev"\ndescription = ""\nlicence = ""\nsource = ""\n[files]\n'
    (tmp_path / "manifests" / "x.toml").write_text(text)
    with pytest.raises(WeightsError, match="the manifest x stands on"):
        hub.find("x", hub.manifests(tmp_path))


def test_a_model_put_together_by_a_manifest(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another transformer over the parts of a base, as Lightning is over SDXL's."""
    (tmp_path / "manifests").mkdir()
    shutil.copy(hub.find("demo-dev").obtain()["transformer"], tmp_path / "t.safetensors")
    (tmp_path / "manifests" / "mine.toml").write_text(
        'base = "demo-schnell"\nspec = "demo-dev"\ndescription = ""\nlicence = ""\nsource = ""\n'
        '[files.transformer]\npath = "t.safetensors"\n'
    )
    monkeypatch.setenv("FLUX_ENGINE_WEIGHTS", str(tmp_path))
    assert torch.equal(latent(load("mine")), latent(load("demo-dev")))


def test_a_large_file_is_hashed_once(tmp_path: Path) -> None:
    path, ledger = tmp_path / "x", Ledger(tmp_path / "cache")
    with path.open("wb") as file:
        file.truncate(REMEMBERED)
    first = ledger.sha256(path)
    entry = next((tmp_path / "cache" / "digests").iterdir())
    entry.write_text(entry.read_text().replace(first, "f" * 64))
    assert ledger.sha256(path) == "f" * 64
    with path.open("r+b") as file:
        file.write(b"x")
    assert ledger.sha256(path) not in (first, "f" * 64)
    entry.write_text("[")
    assert len(ledger.sha256(path)) == 64
    assert Ledger().sha256(path) == ledger.sha256(path)


def test_what_no_manifest_pins_is_pinned_when_it_is_first_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--small"
    commits = ("1" * 40, "2" * 40)
    for commit, content in zip(commits, (b"old", b"new"), strict=True):
        (repository / "snapshots" / commit / "a").mkdir(parents=True)
        (repository / "snapshots" / commit / "a" / "b").write_bytes(content)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    file, ledger = hub.WeightFile(None, "owner/small", "a/b", "main", None, None), Ledger(tmp_path / "cache")
    assert file.obtain(offline=True, ledger=ledger).read_bytes() == b"old"
    (repository / "refs" / "main").write_text(commits[1])
    assert file.obtain(offline=True, ledger=ledger).read_bytes() == b"old"
    pin = ledger.pin("owner/small", "main", "a/b")
    assert pin is not None and pin.commit == commits[0]
    ledger.remember("owner/small", "main", "a/b", Pin(commits[0], 3, "0" * 64))
    with pytest.raises(WeightsError, match="it was altered"):
        file.obtain(offline=True, ledger=ledger)
