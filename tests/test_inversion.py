"""Learned tokens: what they draw, that they leave no trace, and files that are not what they should be."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sdxl_models
import torch
from conftest import latent_error
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save, save_file

import flux_engine
from flux_engine.checks import MAX_PROMPT_CHARACTERS
from flux_engine.engine import Engine
from flux_engine.errors import InvalidRequest, WeightsError
from flux_engine.text import inversion
from flux_engine.text.sdxl import SDXLTextEncoder

PROMPT = "a large {} circle on a blue background"
TOK = {"TOK": "<s0><s1>"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(sdxl_models.family())


@pytest.fixture(scope="module")
def refined() -> Engine:
    return Engine(sdxl_models.family().refined_by(sdxl_models.family(sdxl_models.REFINER)))


@pytest.fixture(autouse=True)
def forgotten(engine: Engine, refined: Engine) -> Any:
    yield
    engine.unload_textual_inversion()
    refined.unload_textual_inversion()


def draw(engine: Engine, prompt: str, **asked: Any) -> torch.Tensor:
    defaults: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 3, "guidance_scale": 9.0}
    return engine(prompt, output_type="latent", **(defaults | asked)).image


def rows_of(engine: Engine, *words: str) -> list[torch.Tensor]:
    """The rows of words of one piece, in both tables."""
    tables = []
    for reader, plain in zip(engine._pipeline.family.text.readers, engine._pipeline.family.text.plain(), strict=True):
        ids = [reader.tokenizer(word).input_ids[1:-1] for word in words]
        assert all(len(one) == 1 for one in ids)
        tables.append(plain[[one[0] for one in ids]].clone())
    return tables


def new_rows(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(count, width, generator=generator) for width in sdxl_models.WIDTHS]


def pti(tables: list[torch.Tensor]) -> bytes:
    return save({f"text_encoders_{i}": table for i, table in enumerate(tables)})


def a_tar(path: Path, members: dict[str, bytes], **kept: Any) -> Path:
    with tarfile.open(path, "w", **kept) as tar:
        for name, content in members.items():
            add(tar, name, content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **said: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in said.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def trained(path: Path, tables: list[torch.Tensor], words: Any = None, **more: bytes) -> Path:
    """As a trained model is kept."""
    members = {
        "special_params.json": json.dumps(TOK if words is None else words).encode(),
        "embeddings.pti": pti(tables),
    }
    return a_tar(path, members | {name.replace("__", "."): content for name, content in more.items()})


def test_tokens_that_equal_words_draw_what_the_words_draw(engine: Engine, tmp_path: Path) -> None:
    words = draw(engine, PROMPT.format("red green"))
    before = draw(engine, PROMPT.format("TOK"))
    found = engine.load_textual_inversion(trained(tmp_path / "a.tar", rows_of(engine, "red", "green")))
    assert (found.words, found.left_out) == (TOK, ())
    assert engine.describe()["textual_inversion"] == TOK
    assert torch.equal(draw(engine, PROMPT.format("TOK")), words)
    assert torch.equal(draw(engine, PROMPT.format("<s0><s1>")), words)
    assert latent_error(draw(engine, PROMPT.format("<s1><s0>")), words) >= 1e-2
    assert latent_error(draw(engine, PROMPT.format("<s0><s2>")), words) >= 1e-2  # there is no <s2>: plain text
    engine.unload_textual_inversion()
    assert "textual_inversion" not in engine.describe()
    assert torch.equal(draw(engine, PROMPT.format("TOK")), before)
    engine.unload_textual_inversion()  # twice is no harm


def test_learned_tokens_matter_and_follow_one_another(engine: Engine, tmp_path: Path) -> None:
    red = draw(engine, PROMPT.format("red"))
    engine.load_textual_inversion(trained(tmp_path / "a.tar", new_rows()))
    other = draw(engine, PROMPT.format("TOK"))
    assert latent_error(other, red) >= 1e-2
    engine.load_textual_inversion(trained(tmp_path / "b.tar", rows_of(engine, "red"), {"NEW": "<s0>"}))
    assert torch.equal(draw(engine, PROMPT.format("NEW")), red)
    assert torch.equal(draw(engine, PROMPT.format("red")), red)
    assert latent_error(draw(engine, PROMPT.format("TOK")), other) >= 1e-2  # forgotten
    assert engine._pipeline.family.text.learned == ("<s0>",)


def test_only_positive_prompts_are_replaced(engine: Engine, tmp_path: Path) -> None:
    plain, words = (draw(engine, "a circle", negative_prompt=PROMPT.format(word)) for word in ("TOK", "red green"))
    engine.load_textual_inversion(trained(tmp_path / "a.tar", rows_of(engine, "red", "green")))
    assert torch.equal(draw(engine, "a circle", negative_prompt=PROMPT.format("TOK")), plain)
    # What says the tokens themselves means them.
    assert torch.equal(draw(engine, "a circle", negative_prompt=PROMPT.format("<s0><s1>")), words)


def test_with_weights_and_over_several_chunks(engine: Engine, tmp_path: Path) -> None:
    long = "a small {} star, " * 20
    asked = (
        (PROMPT.format("({}:1.5)"), {"prompt_weights": True}),
        (long, {"prompt_chunks": True}),
        (long + "[{}]", {"prompt_chunks": True, "prompt_weights": True}),
    )
    words = [draw(engine, prompt.format(*["red green"] * 20), **fields) for prompt, fields in asked[:1]]
    words += [draw(engine, prompt.replace("{}", "red green"), **fields) for prompt, fields in asked[1:]]
    engine.load_textual_inversion(trained(tmp_path / "a.tar", rows_of(engine, "red", "green")))
    for (prompt, fields), wanted in zip(asked, words, strict=True):
        assert torch.equal(draw(engine, prompt.replace("{}", "TOK"), **fields), wanted)


def test_what_the_tokens_push_over_the_limit_is_reported(engine: Engine, tmp_path: Path) -> None:
    prompt = " ".join(["a"] * 74 + ["TOK"])
    engine.load_textual_inversion(trained(tmp_path / "a.tar", new_rows(3), {"TOK": "<s0><s1><s2>"}))
    (note,) = engine(prompt, width=32, height=32, num_inference_steps=1, output_type="latent").notes
    assert "cut to 77 tokens, the last 2 are not read" in note


@pytest.mark.parametrize("old", [False, True])
def test_the_pooled_vector_is_the_ends_own(old: bool, tmp_path: Path) -> None:
    """SDXL's own configs say that a prompt ends at token 2, for which transformers takes the highest number instead."""
    family = sdxl_models.family()
    if old:
        for reader in family.text.readers:
            body = getattr(reader.clip, "text_model", reader.clip)
            assert body.eos_token_id == 49407
            body.eos_token_id = 2
    engine = Engine(family)
    words = draw(engine, PROMPT.format("red green"))
    assert torch.equal(words, draw(Engine(sdxl_models.family()), PROMPT.format("red green")))
    engine.load_textual_inversion(trained(tmp_path / "a.tar", rows_of(engine, "red", "green")))
    assert torch.equal(draw(engine, PROMPT.format("TOK")), words)


def test_diffusers_reads_the_same_of_them(engine: Engine, tmp_path: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(
        engine.export(tmp_path / "model"), torch_dtype=torch.float32, add_watermarker=False
    )
    tables = new_rows()
    for table, tokenizer, encoder in zip(
        tables, (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2), strict=True
    ):
        for i, row in enumerate(table):
            pipe.load_textual_inversion({f"<s{i}>": row[None]}, tokenizer=tokenizer, text_encoder=encoder)
    engine.load_textual_inversion(trained(tmp_path / "a.tar", tables))
    for prompt in ("a photo of <s0><s1> on a blue background", "<s1>, star", "a photo of a circle"):
        tokens, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        mine = engine._pipeline.family.text.encode([prompt])
        assert latent_error(mine.tokens, tokens) <= 1e-5
        assert latent_error(mine.pooled, pooled) <= 1e-5


def test_the_refiner_learns_too(refined: Engine, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"refine": "expert_ensemble_refiner", "high_noise_frac": 0.5, "num_inference_steps": 2}
    words = draw(refined, PROMPT.format("red green"), **asked)
    refined.load_textual_inversion(trained(tmp_path / "a.tar", rows_of(refined, "red", "green")))
    assert torch.equal(draw(refined, PROMPT.format("TOK"), **asked), words)


def test_a_refiner_that_shares_the_encoder_learns_too(tmp_path: Path) -> None:
    family = sdxl_models.family()
    base = Engine(family)
    base.load_textual_inversion(trained(tmp_path / "a.tar", rows_of(base, "red", "green")))
    late = Engine(family.refined_by(replace(sdxl_models.family(sdxl_models.REFINER), text=family.text.second())))
    asked: dict[str, Any] = {"refine": "expert_ensemble_refiner", "high_noise_frac": 0.5, "num_inference_steps": 2}
    words = draw(late, PROMPT.format("red green"), **asked)
    assert torch.equal(draw(late, PROMPT.format("TOK"), **asked), words)
    late.unload_textual_inversion()
    assert latent_error(draw(late, PROMPT.format("TOK"), **asked), words) >= 1e-2
    assert torch.equal(draw(late, PROMPT.format("red green"), **asked), words)


def test_an_export_has_the_published_table(engine: Engine, tmp_path: Path) -> None:
    before = engine.export(tmp_path / "before")
    engine.load_textual_inversion(trained(tmp_path / "a.tar", new_rows()))
    after = engine.export(tmp_path / "after")
    for part in ("text_encoder", "text_encoder_2"):
        first, second = ((folder / part / "model.safetensors").read_bytes() for folder in (before, after))
        assert first == second


def test_every_way_to_keep_them(engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = new_rows()
    found = engine.load_textual_inversion(trained(tmp_path / "a.tar", tables, lora__safetensors=b"not read"))
    wanted = draw(engine, PROMPT.format("TOK"))
    assert found.left_out == ("lora.safetensors",)
    assert "lora.safetensors not applied" in caplog.text

    in_a_folder = {
        f"./model/{n}": c
        for n, c in (("special_params.json", json.dumps(TOK).encode()), ("embeddings.pti", pti(tables)))
    }
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        engine.load_textual_inversion(a_tar(tmp_path / "b.tar", in_a_folder, format=kind))
        assert torch.equal(draw(engine, PROMPT.format("TOK")), wanted)

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "embeddings.pti").write_bytes(pti(tables))
    (folder / "unet.safetensors").touch()
    found = engine.load_textual_inversion(str(folder))
    assert (found.words, found.left_out) == ({}, ("unet.safetensors",))
    assert torch.equal(draw(engine, PROMPT.format("<s0><s1>")), wanted)
    (folder / "special_params.json").write_text(json.dumps(TOK))
    assert engine.load_textual_inversion(folder).words == TOK
    assert engine.load_textual_inversion(folder / "embeddings.pti").words == {}

    one = tmp_path / "my-style.safetensors"
    save_file({"clip_l": tables[0].half(), "clip_g": tables[1].half()}, one)
    assert engine.load_textual_inversion(one).words == {"my-style": "<s0><s1>"}
    assert latent_error(draw(engine, PROMPT.format("my-style")), wanted) <= 1e-2


def test_flux_has_no_use_for_it() -> None:
    flux = flux_engine.load("demo-schnell", device="cpu", dtype="float32")
    for call in (lambda: flux.load_textual_inversion("a.tar"), flux.unload_textual_inversion):
        with pytest.raises(InvalidRequest, match="for SDXL models, and demo-schnell is none"):
            call()


def test_it_waits_for_its_turn(engine: Engine, tmp_path: Path) -> None:
    file = trained(tmp_path / "a.tar", rows_of(engine, "red", "green"))
    plain = draw(engine, PROMPT.format("TOK"), num_inference_steps=2)
    threads: list[threading.Thread] = []

    def begin(step: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=lambda: engine.load_textual_inversion(file)))
            threads[0].start()
            threads[0].join(0.3)
            assert threads[0].is_alive()
            assert not engine._pipeline.family.text.learned
            with pytest.raises(InvalidRequest, match="callback"):
                engine.load_textual_inversion(file)

    assert torch.equal(draw(engine, PROMPT.format("TOK"), num_inference_steps=2, on_step=begin), plain)
    threads[0].join()
    assert engine._pipeline.family.text.learned


def test_words_cannot_make_a_prompt_grow_without_end(engine: Engine, tmp_path: Path) -> None:
    words = {chr(ord("A") + i): chr(ord("B") + i) * 1000 for i in range(20)}
    engine.load_textual_inversion(trained(tmp_path / "a.tar", new_rows(), words))
    with pytest.raises(InvalidRequest, match=f"at most {MAX_PROMPT_CHARACTERS:,}") as caught:
        draw(engine, "A A")
    assert caught.value.field == "prompt"


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle ran')",)


def linked(path: Path, kind: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        add(tar, "embeddings.pti", type=kind, linkname="/etc/passwd")
    return path


def sparse(path: Path, name: str, size: int) -> Path:
    """A tar whose member is as large as it says, and takes no room."""
    member = tarfile.TarInfo(name)
    member.size = size
    with path.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(512 + size + 1024)
    return path


def huge_header(path: Path) -> Path:
    member = tarfile.TarInfo("PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, 2**32
    with path.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(2**32 + 2048)
    return path


def looping(path: Path) -> Path:
    """A member whose negative size leads back to itself."""
    member = tarfile.TarInfo("again")
    member.size = 0
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + (2**16 - 512).to_bytes(2, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + bytes(1024))
    return path


def nested_headers(path: Path) -> Path:
    """Extended headers, one behind the other: tarfile goes down a level for each."""
    record = b"11 path=ab\n"
    member = tarfile.TarInfo("PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, len(record)
    path.write_bytes((member.tobuf() + record.ljust(512, b"\0")) * 5_000 + bytes(1024))
    return path


def many(path: Path) -> Path:
    return a_tar(path, {f"{i}.txt": b"" for i in range(inversion.MAX_MEMBERS + 1)})


def twice(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            add(tar, "embeddings.pti", pti(new_rows()))
    return path


def cut(path: Path, by: int) -> Path:
    """With what is read cut, or what comes behind it."""
    trained(path, new_rows(), lora__safetensors=bytes(3000))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 3072
    content = path.read_bytes()[:end]
    path.write_bytes(content[:by])
    return path


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", pickle.dumps(Bomb()))
    return path


def tables(path: Path, **held: torch.Tensor) -> Path:
    save_file(held, path)
    return path


def bad(i: int, j: int, value: float) -> list[torch.Tensor]:
    rows = new_rows()
    rows[i][j, 0] = value
    return rows


def told(path: Path, said: bytes) -> Path:
    return a_tar(path, {"special_params.json": said, "embeddings.pti": pti(new_rows())})


W1, W2 = sdxl_models.WIDTHS
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda p: p / "none", "does not exist"),
    "empty": (lambda p: (p / "a.tar").touch() or p / "a.tar", "neither a tar"),
    "noise": (lambda p: (p / "a.tar").write_bytes(b"noise" * 999) and p / "a.tar", "neither a tar"),
    "zero byte in the name": (lambda p: p / "a\0b", "does not exist"),
    "compressed": (lambda p: _compressed(p / "a.tar"), "not compressed"),
    "pickle": (lambda p: (p / "a.pt").write_bytes(pickle.dumps(Bomb(), 2)) and p / "a.pt", "is a pickle"),
    "pickle in a zip": (lambda p: zipped(p / "a.pt"), "is a pickle"),
    "pickle in a tar": (
        lambda p: a_tar(p / "a.tar", {"embeddings.pti": pickle.dumps(Bomb(), 2)}),
        r"a\.tar/embeddings\.pti is a pickle",
    ),
    "empty folder": (lambda p: p, "embeddings.pti does not exist"),
    "empty tar": (lambda p: a_tar(p / "a.tar", {}), "neither a tar"),
    "no embeddings": (lambda p: a_tar(p / "a.tar", {"lora.safetensors": b""}), "only lora.safetensors"),
    "leads up": (
        lambda p: a_tar(p / "a.tar", {"../embeddings.pti": pti(new_rows())}),
        r"'\.\./embeddings\.pti' leads out",
    ),
    "leads to the root": (
        lambda p: a_tar(p / "a.tar", {"/tmp/x": b"", "embeddings.pti": pti(new_rows())}),
        "'/tmp/x' leads out",
    ),
    "link": (lambda p: linked(p / "a.tar", tarfile.SYMTYPE), "'embeddings.pti' is a link"),
    "hard link": (lambda p: linked(p / "a.tar", tarfile.LNKTYPE), "'embeddings.pti' is a link"),
    "device": (lambda p: linked(p / "a.tar", tarfile.CHRTYPE), "'embeddings.pti' is a link or a device"),
    "huge embeddings": (
        lambda p: sparse(p / "a.tar", "embeddings.pti", 2**33),
        r"embeddings\.pti has 8,589,934,592 bytes",
    ),
    "huge words": (
        lambda p: sparse(p / "a.tar", "special_params.json", 2**33),
        r"special_params\.json has 8,589,934,592",
    ),
    "huge header": (lambda p: huge_header(p / "a.tar"), "claims a header of"),
    "leads back": (lambda p: looping(p / "a.tar"), "more than 1,000 members|not a whole tar"),
    "nested headers": (lambda p: nested_headers(p / "a.tar"), "not a whole tar"),
    "many members": (lambda p: many(p / "a.tar"), "more than 1,000 members"),
    "twice": (lambda p: twice(p / "a.tar"), "embeddings.pti twice"),
    "cut in the words": (lambda p: cut(p / "a.tar", 520), "not a whole tar"),
    "cut in the embeddings": (lambda p: cut(p / "a.tar", 1600), "not a whole tar"),
    "cut in what is not read": (lambda p: cut(p / "a.tar", -512), "not a whole tar"),
    "cut between members": (lambda p: cut(p / "a.tar", 1024), "not a whole tar"),
    "embeddings that are not whole": (
        lambda p: a_tar(p / "a.tar", {"embeddings.pti": pti(new_rows())[:-4]}),
        r"a\.tar/embeddings\.pti is not a whole safetensors",
    ),
    "large file": (
        lambda p: tables(p / "a.safetensors", clip_l=torch.zeros(99_999, W1), clip_g=torch.zeros(99_999, W2)),
        "bytes; 16,777,216 at most",
    ),
    "not finite": (lambda p: trained(p / "a.tar", bad(1, 1, float("nan"))), "not finite"),
    "infinite": (lambda p: trained(p / "a.tar", bad(0, 0, float("inf"))), "not finite"),
    "too large for float32": (
        lambda p: tables(
            p / "a.safetensors", clip_l=torch.full((1, W1), 1e300, dtype=torch.float64), clip_g=torch.zeros(1, W2)
        ),
        "not finite",
    ),
    "widths": (
        lambda p: trained(p / "a.tar", [torch.zeros(2, 768), torch.zeros(2, 1280)]),
        "768 and 1280 wide.*24 and 40",
    ),
    "changed places": (lambda p: trained(p / "a.tar", new_rows()[::-1]), "40 and 24 wide.*24 and 40"),
    "different numbers": (lambda p: trained(p / "a.tar", [torch.zeros(2, W1), torch.zeros(3, W2)]), "as many rows"),
    "none": (lambda p: trained(p / "a.tar", [torch.zeros(0, W1), torch.zeros(0, W2)]), "as many rows"),
    "no matrix": (lambda p: trained(p / "a.tar", [torch.zeros(W1), torch.zeros(W2)]), "as many rows"),
    "whole numbers": (
        lambda p: trained(p / "a.tar", [torch.zeros(2, W, dtype=torch.int64) for W in (W1, W2)]),
        "whole numbers",
    ),
    "for another model": (lambda p: tables(p / "a.safetensors", emb_params=torch.zeros(2, 768)), "holds 'emb_params'"),
    "one table": (lambda p: tables(p / "a.safetensors", clip_l=torch.zeros(2, W1)), "holds 'clip_l'"),
    "one more table": (
        lambda p: tables(p / "a.safetensors", clip_l=torch.zeros(2, W1), clip_g=torch.zeros(2, W2), t5=torch.zeros(1)),
        "it holds",
    ),
    "words that are no JSON": (lambda p: told(p / "a.tar", b"{"), r"a\.tar/special_params\.json cannot be read"),
    "words that are no text": (lambda p: told(p / "a.tar", b"\xff\xfe"), r"special_params\.json cannot be read"),
    "words that nest": (lambda p: told(p / "a.tar", b"[" * 60_000), r"special_params\.json cannot be read"),
    "words in a list": (lambda p: told(p / "a.tar", b'["TOK"]'), "not a JSON object of texts"),
    "words to numbers": (lambda p: told(p / "a.tar", b'{"TOK": 1}'), "not a JSON object of texts"),
    "empty word": (lambda p: told(p / "a.tar", b'{"": "<s0>"}'), "'' stands for '<s0>': neither may be empty"),
    "blank word": (lambda p: told(p / "a.tar", b'{" ": "<s0>"}'), "neither may be empty"),
    "word for nothing": (lambda p: told(p / "a.tar", b'{"TOK": ""}'), "'TOK' stands for '': neither may be empty"),
    "half a character": (lambda p: told(p / "a.tar", b'{"TOK": "\\ud800"}'), "no words"),
    "token that is not there": (
        lambda p: told(p / "a.tar", b'{"TOK": "<s0><s2>"}'),
        "there is no <s2>, only <s0> to <s1>",
    ),
}


def _compressed(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "embeddings.pti", pti(new_rows()))
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_wrong_is_told_and_changes_nothing(
    engine: Engine, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = HOSTILE[case]
    text, learned = engine._pipeline.family.text, new_rows(1)
    (tmp_path / "before").mkdir()
    engine.load_textual_inversion(trained(tmp_path / "before" / "a.tar", learned, {"TOK": "<s0>"}))
    before = [reader.table for reader in text.readers]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "before"))
    with pytest.raises(WeightsError, match=words) as caught:
        engine.load_textual_inversion(make(work))
    assert str(work) in str(caught.value) or "wide" in words or "finite" in words
    assert len(str(caught.value)) < 500
    assert (text.learned, text.words) == (("<s0>",), {"TOK": "<s0>"})
    assert all(reader.table is table for reader, table in zip(text.readers, before, strict=True))
    assert [one.name for one in (tmp_path / "before").iterdir()] == ["a.tar"]  # nothing left behind


def test_what_is_finite_in_float32_alone_is_refused_in_float16(tmp_path: Path) -> None:
    family = sdxl_models.family()
    for reader in family.text.readers:
        reader.clip.half()
    half = Engine(replace(family, text=SDXLTextEncoder(family.text.readers)))
    with pytest.raises(WeightsError, match="not finite as float16"):
        half.load_textual_inversion(trained(tmp_path / "a.tar", bad(1, 0, 1e5)))


def test_a_path_is_wanted(engine: Engine) -> None:
    for path in (None, 7, b"a.tar"):
        with pytest.raises(WeightsError, match="named by a text or a path"):
            engine.load_textual_inversion(path)  # pyright: ignore[reportArgumentType]


def test_the_table_may_have_more_rows_than_the_vocabulary() -> None:
    family = sdxl_models.family()
    for reader, plain in zip(family.text.readers, family.text.plain(), strict=True):
        rows = torch.cat((plain, torch.zeros(3, plain.shape[1])))
        reader.clip.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows))
        reader.clip.config.vocab_size += 3
    text = SDXLTextEncoder(family.text.readers)
    a = text.readers[0].tokenizer("a").input_ids[1]
    text.learn(text.widened([plain[a : a + 1] for plain in text.plain()]), {})
    found, wanted = text.encode(["<s0> circle"]), text.encode(["a circle"])
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.pooled, wanted.pooled)
