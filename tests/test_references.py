"""References to weights: what they mean, and that nothing but whole weights comes of them."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import ipaddress
import json
import logging
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from flux_engine import downloads, references
from flux_engine.downloads import Fetched, Limits, Terms
from flux_engine.errors import FluxEngineError, InvalidRequest, RequestCancelled, UnknownModel, WeightsError
from flux_engine.guarded import PUBLIC, Policy
from flux_engine.references import Reference, Secrets, fetch_reference, parse_reference
from flux_engine.text.inversion import read_inversion

LORA = save({"lora_A": torch.arange(4096, dtype=torch.float32)})
TOKENS = save({"text_encoders_0": torch.ones(2, 768), "text_encoders_1": torch.ones(2, 1280)})
HEX = "0123456789abcdef" * 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "r8_SECRETsecretSECRETsecret"


def packed(*members: tuple[str | tarfile.TarInfo, bytes], mode: Any = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return out.getvalue()


TRAINED = packed(("output/lora.safetensors", LORA), ("output/config.yaml", b"a"))
SDXL = packed(("lora.safetensors", LORA), ("embeddings.pti", TOKENS), ("special_params.json", b'{"TOK": "<s0><s1>"}'))


def uri(content: bytes) -> str:
    return "data:application/x-tar;base64," + base64.b64encode(content).decode()


# ---------------------------------------------------------------------------------------------------- parsing

HF, CIVITAI, REPLICATE = "huggingface", "civitai", "replicate"
DOWNLOAD = "https://civitai.com/api/download/models/725"
UNDERSTOOD: list[tuple[str, Reference]] = [
    ("https://huggingface.co/alvdansen/frosting_lane_flux", Reference(HF, "alvdansen/frosting_lane_flux")),
    ("huggingface.co/owner/name", Reference(HF, "owner/name")),
    ("huggingface.co/owner/name/", Reference(HF, "owner/name")),
    ("https://HuggingFace.co/owner/name?library=diffusers#x", Reference(HF, "owner/name")),
    ("https://www.huggingface.co/owner/name", Reference(HF, "owner/name")),
    ("https://hf.co/owner/name", Reference(HF, "owner/name")),
    ("https://huggingface.co/owner/name/x.safetensors", Reference(HF, "owner/name", file="x.safetensors")),
    ("huggingface.co/owner/name/a/b c.safetensors/", Reference(HF, "owner/name", file="a/b c.safetensors")),
    ("https://huggingface.co/o/n/resolve/main/x.safetensors?download=true", Reference(HF, "o/n", file="x.safetensors")),
    ("https://huggingface.co/o/n/blob/main/a/x.safetensors", Reference(HF, "o/n", file="a/x.safetensors")),
    ("https://huggingface.co/o/n/blob/v1/a%20b.safetensors", Reference(HF, "o/n", "v1", "a b.safetensors")),
    ("https://huggingface.co/o/n/tree/main", Reference(HF, "o/n")),
    ("https://huggingface.co/o/n/tree/refs%2Fpr%2F1", Reference(HF, "o/n", "refs/pr/1")),
    ("owner/name/x.safetensors", Reference(HF, "owner/name", file="x.safetensors")),
    ("owner/name/a/x.safetensors", Reference(HF, "owner/name", file="a/x.safetensors")),
    ("https://civitai.com/models/180891", Reference(CIVITAI, "180891")),
    ("https://civitai.com/models/180891/", Reference(CIVITAI, "180891")),
    ("civitai.com/models/180891/pixel-art?x=1", Reference(CIVITAI, "180891")),
    ("https://www.civitai.com/models/180891/pixel-art-xl", Reference(CIVITAI, "180891")),
    ("https://civitai.com/models/180891?modelVersionId=725", Reference(CIVITAI, "180891", "725")),
    ("civitai.com/models/180891/pixel?modelVersionId=725", Reference(CIVITAI, "180891", "725")),
    (DOWNLOAD, Reference(CIVITAI, version="725", address=DOWNLOAD)),
    ("civitai.com/api/download/models/725", Reference(CIVITAI, version="725", address=DOWNLOAD)),
    (f"{DOWNLOAD}?type=Model&format=SafeTensor",
     Reference(CIVITAI, version="725", address=f"{DOWNLOAD}?type=Model&format=SafeTensor")),
    (f"{DOWNLOAD}?token={TOKEN}&type=Model", Reference(CIVITAI, version="725", address=f"{DOWNLOAD}?type=Model")),
    ("https://example.com/a/x.safetensors", Reference("link", address="https://example.com/a/x.safetensors")),
    ("https://Example.com/x.safetensors?X-Sig=A%2Fb&y#f",
     Reference("link", address="https://example.com/x.safetensors?X-Sig=A%2Fb&y")),
    ("HTTP://example.com:8080/X.SAFETENSORS", Reference("link", address="http://example.com:8080/X.SAFETENSORS")),
    ("https://example.com/x.tar", Reference("link", address="https://example.com/x.tar")),
    ("https://replicate.delivery/pbxt/abc/trained_model.tar",
     Reference("link", address="https://replicate.delivery/pbxt/abc/trained_model.tar")),
    ("replicate.delivery/yhqm/a/flux-lora.tar", Reference("link", address="https://replicate.delivery/yhqm/a/flux-lora.tar")),
    ("https://pbxt.replicate.delivery/a/trained_model.tar",
     Reference("link", address="https://pbxt.replicate.delivery/a/trained_model.tar")),
    ("https://replicate.com/owner/model", Reference(REPLICATE, "owner/model")),
    ("replicate.com/owner/model/", Reference(REPLICATE, "owner/model")),
    (f"https://replicate.com/owner/model/versions/{HEX}", Reference(REPLICATE, "owner/model", HEX)),
    (f"https://replicate.com/owner/model/{HEX}", Reference(REPLICATE, "owner/model", HEX)),
    (f"replicate.com/owner/model:{HEX}", Reference(REPLICATE, "owner/model", HEX)),
    (f"owner/model:{HEX}", Reference(REPLICATE, "owner/model", HEX)),
    (f"owner/model/{HEX}", Reference(REPLICATE, "owner/model", HEX)),
    (f"owner/model/versions/{HEX}", Reference(REPLICATE, "owner/model", HEX)),
    ("https://replicate.com/owner/model/_weights", Reference(REPLICATE, "owner/model")),
    ("data:application/x-tar;base64,QUJD", Reference("data", "application/x-tar", address="QUJD")),
    ("DATA:;base64,QUJD", Reference("data", "", address="QUJD")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), UNDERSTOOD, ids=[text[:60] for text, _ in UNDERSTOOD])
@pytest.mark.parametrize("bare", [HF, REPLICATE])
def test_what_is_understood(text: str, meant: Reference, bare: Any) -> None:
    found = parse_reference(f" {text}\n", bare=bare)
    assert found == meant
    assert found.key == meant.key and len(found.key) == 64
    assert TOKEN not in repr(found) + found.describe()


def test_a_bare_name_is_where_the_schema_says() -> None:
    assert parse_reference("owner/na_me.1") == Reference(HF, "owner/na_me.1")
    assert parse_reference("owner/na_me.1", bare="replicate") == Reference(REPLICATE, "owner/na_me.1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("name", "nothing that names weights"),
        ("foo/bar baz", "nothing that names weights"),
        ("owner/model/12ab", "nothing that names weights"),
        ("owner/model:12ab", "nothing that names weights"),
        ("../..", "is a path, which is not read here"),
        ("x.safetensors", "does not exist here"),
        ("a/x.safetensors", "does not exist here"),
        ("https://huggingface.co/owner", "no Hugging Face repository"),
        ("https://huggingface.co/", "no Hugging Face repository"),
        ("https://huggingface.co/datasets/o/n", "'datasets'"),
        ("https://huggingface.co/o/n/x.bin", "not .safetensors"),
        ("https://huggingface.co/o/n/resolve/main/../x.safetensors", "leads out"),
        ("https://huggingface.co/o/n/resolve/..%2F..%2Fa/x.safetensors", "leads out"),
        ("https://huggingface.co/o/n/a/%2e%2e%2fx.safetensors", "leads out"),
        ("https://civitai.com/models", "no model on CivitAI"),
        ("https://civitai.com/models/abc", "no model on CivitAI"),
        ("https://civitai.com/models/1/a/b", "no model on CivitAI"),
        ("https://civitai.com/images/1", "no model on CivitAI"),
        ("https://civitai.com/models/1?modelVersionId=secret", "modelVersionId"),
        ("https://civitai.com/models/１", "no model on CivitAI"),
        ("https://civitai.com/api/download/models/1?token=a%0d%0asecret", "characters that no token has"),
        ("https://replicate.com/owner", "no model on Replicate"),
        ("https://replicate.com/owner/model/versions/12ab", "no model on Replicate"),
        ("https://example.com/x.bin?secret", "does not end in"),
        ("https://example.com/x.tar.gz#secret", "does not end in"),
        ("https://example.com/?secret.safetensors", "does not end in"),
        ("https:///x.safetensors", "does not end in"),
        ("https://[::1/x.safetensors", "not a valid address"),
        ("https://user:secret@example.com/x.safetensors", "user name or password"),
        ("user:secret@huggingface.co/o/n", "user name or password"),
        ("ftp://example.com/x.safetensors", "'ftp'"),
        ("file:///etc/passwd", "'file'"),
        ("https://example.com/\r\nx.safetensors", "characters"),
        ("data:application/x-tar,secret", "no base64"),
        ("data:secret", "no base64"),
        (f"hf_{'secret' * 6}", "nothing that names weights"),
    ],
)  # fmt: skip
def test_what_is_not_understood(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest) as caught:
        parse_reference(text, field="extra_lora", local=text != "../..")
    message = str(caught.value)
    assert words in message
    if "%0d" not in text:
        assert "Understood are: " in message and "a name of a LoRA" in message and message.startswith("extra_lora ")
        assert caught.value.field == "extra_lora"
    assert "secret" not in message.lower(), message


def test_the_error_names_what_was_given_and_stays_short() -> None:
    for text in ("foo/bar baz", "https://example.com/" + "a" * 10_000, "data:" + "a" * 10_000):
        with pytest.raises(InvalidRequest) as caught:
            parse_reference(text)
        assert len(str(caught.value)) < 700
    with pytest.raises(InvalidRequest, match="'foo/bar baz'"):
        parse_reference("foo/bar baz")
    with pytest.raises(InvalidRequest, match="of the type int"):
        parse_reference(3)  # pyright: ignore[reportArgumentType]


def test_paths_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    for name in ("x.safetensors", "owner/name"):
        (tmp_path / name).write_bytes(LORA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    here = Reference("path", str(tmp_path / "x.safetensors"))
    for text in ("x.safetensors", "./x.safetensors", "~/x.safetensors", str(tmp_path / "x.safetensors")):
        assert parse_reference(text) == here
    assert parse_reference("owner/name") == Reference("path", str(tmp_path / "owner/name"))
    assert parse_reference("owner/name", local=False) == Reference(HF, "owner/name")
    for text in ("/x.safetensors", "./x.safetensors", "~/x.safetensors", ".."):
        with pytest.raises(InvalidRequest, match="is a path, which is not read here"):
            parse_reference(text, local=False)
    for text in ("/nowhere/x.safetensors", "./nothing", "~nobody-here/x", "/" + "a" * 5000):
        with pytest.raises(WeightsError, match="does not exist"):
            parse_reference(text)


def test_keys_are_one_for_each_meaning() -> None:
    keys = {reference.key for _, reference in UNDERSTOOD}
    assert len(keys) == len({repr((r, r.address)) for _, r in UNDERSTOOD})
    with_token = parse_reference(f"{DOWNLOAD}?token={TOKEN}")
    assert with_token.key == parse_reference(DOWNLOAD).key and with_token.token == TOKEN
    signed = [parse_reference(f"https://example.com/x.safetensors?v={number}") for number in (1, 2)]
    assert signed[0].key != signed[1].key
    assert parse_reference("owner/name").key == Reference(HF, "owner/name").key
    assert parse_reference("owner/name").key == "45aa4f62dc00e9e8e69f528eba6b16aee3e1b0f9b7692e88a1ff4a1d8f8d0870"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("o/n", "the only .safetensors file of the Hugging Face repository o/n at main (https://huggingface.co)"),
        (
            "civitai.com/models/7/a",
            "version that is newest of the CivitAI model 7 (https://civitai.com/api/v1/models/7)",
        ),
        ("civitai.com/models/7?modelVersionId=9", "(https://civitai.com/api/v1/model-versions/9)"),
        (f"{DOWNLOAD}?type=secret", f"the CivitAI download of version 725 ({DOWNLOAD})"),
        ("replicate.com/o/n", "the weights of the Replicate model o/n (https://replicate.com/o/n/_weights)"),
        (f"o/n:{HEX}", f"(https://replicate.com/o/n/versions/{HEX}/_weights)"),
        ("https://example.com/x.tar?secret", "the file at https://example.com/x.tar"),
        ("data:;base64,secret", "a data URI of 6 characters"),
    ],
)
def test_descriptions(text: str, words: str) -> None:
    said = parse_reference(text).describe()
    assert said.endswith(words) and "secret" not in said + repr(parse_reference(text))


def test_tokens_are_not_shown() -> None:
    secrets = Secrets(huggingface=TOKEN, civitai=f" {TOKEN}\n", replicate="")
    assert repr(secrets) == str(secrets) == f"{secrets}" == "Secrets(huggingface=set, civitai=set, replicate=None)"
    assert (secrets.civitai, secrets.replicate) == (TOKEN, None)
    for bad in ("secret\r\nX: y", "secret secret", "secrét"):
        with pytest.raises(InvalidRequest, match="civitai token holds") as caught:
            Secrets(civitai=bad)
        assert "secr" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- a server


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        host = self.headers["Host"].partition(":")[0]
        self.server.seen.append((host, self.path, self.headers.get("Authorization")))
        path = self.path.partition("?")[0]
        if path in self.server.moved:
            return self.answer(302, b"", Location=self.server.moved[path])
        if path == "/endless.tar":
            self.send_response(200)
            self.end_headers()
            with suppress(ConnectionError):
                while not self.server.stop.is_set():
                    self.wfile.write(bytes(65536))
            return None
        if path == "/announced.tar":
            self.send_response(200)
            self.send_header("Content-Length", str(10**12))
            return self.end_headers()
        time.sleep(self.server.pause)
        status, body = self.server.bodies.get(path, (404, b"nothing"))
        with suppress(ConnectionError):
            if self.server.hang:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.server.half.set()
                self.server.stop.wait(self.server.hang)
                return None
            self.answer(status, body)
        return None

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str, str | None]] = []
        """Of each request, host, path and authorization."""
        self.bodies: dict[str, tuple[int, bytes]] = {}
        self.moved: dict[str, str] = {}
        self.pause = 0.0
        self.hang = 0.0
        """Answers end in the middle after so many seconds."""
        self.half, self.stop = threading.Event(), threading.Event()
        self.port = self.server_address[1]

    def at(self, path: str, host: str = "files.example") -> str:
        return f"http://{host}:{self.port}{path}"

    @property
    def policy(self) -> Policy:
        return Policy(
            ports=frozenset({self.port}),
            networks=(ipaddress.ip_network("127.0.0.1/32"),),
            resolve=lambda host, port: ["127.0.0.1"] if host.endswith(".example") else ["10.0.0.1"],
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """It stands for CivitAI and Replicate as well, under names of their own."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setattr(references, "CIVITAI", server.at("", "civitai.example"))
        monkeypatch.setattr(references, "REPLICATE", server.at("", "replicate.example"))
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


def fetch(server: Server | None, text: str, folder: Path, **changes: Any) -> Fetched:
    policy = server.policy if server else Policy(resolve=lambda *_: pytest.fail("the network was asked"))
    return fetch_reference(parse_reference(text), **{"folder": folder, "policy": policy} | changes)


@contextmanager
def failing(*words: str, kind: type[Exception] = WeightsError, folder: Path | None = None) -> Iterator[None]:
    """The error says the words, tells no secret, and leaves nothing in the folder."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "secret" not in message.lower() and "SECRET" not in repr(caught.value.args), message
    assert ".partial-" not in message, message
    if folder is not None and folder.exists():
        assert [path.name for path in folder.iterdir() if path.name != "locks"] == []


def test_a_download_is_kept(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.bodies["/x.safetensors"] = 200, LORA
    url = server.at("/x.safetensors?sig=secret%2F")
    found = fetch(server, url, tmp_path / "a")
    assert found.weights.read_bytes() == LORA and found.tar is None
    assert server.seen == [("files.example", "/x.safetensors?sig=secret%2F", None)]
    assert fetch(server, url, tmp_path / "a") == found == fetch(None, url, tmp_path / "a", offline=True)
    assert len(server.seen) == 1
    assert found.weights == tmp_path / "a" / parse_reference(url).key / "weights.safetensors"
    assert "files.example" in caplog.text and "secret" not in caplog.text
    names = [path.name for path in tmp_path.rglob("*")]
    assert not any(word in name for name in names for word in ("secret", "sig", "example", "x.safe")), names


def test_offline(tmp_path: Path) -> None:
    for text in ("https://example.com/x.safetensors?secret", "replicate.com/o/n", "civitai.com/models/7", DOWNLOAD):
        with failing("nothing is fetched offline", folder=tmp_path / "a"):
            fetch(None, text, tmp_path / "a", offline=True)
    assert not (tmp_path / "a").exists()
    assert fetch(None, uri(LORA), tmp_path / "a", offline=True).weights.read_bytes() == LORA
    (tmp_path / "x.safetensors").write_bytes(LORA)
    path = tmp_path / "x.safetensors"
    assert fetch(None, str(path), tmp_path / "b", offline=True) == Fetched(path)
    assert not (tmp_path / "b").exists()


def test_what_is_not_public_is_not_reached(server: Server, tmp_path: Path) -> None:
    for url in ("https://169.254.169.254/x.safetensors", "http://localhost/x.tar", "https://[::1]/x.tar"):
        with failing("not public", kind=InvalidRequest, folder=tmp_path):
            fetch_reference(parse_reference(url), folder=tmp_path)
    server.moved["/x.tar"] = "http://inside.test/x"
    with failing("only", kind=InvalidRequest, folder=tmp_path):
        fetch(server, server.at("/x.tar?secret"), tmp_path)
    server.moved["/x.tar"] = server.at("/x?secret", "inside.test")
    with pytest.raises(InvalidRequest, match="not public"):
        fetch(server, server.at("/x.tar"), tmp_path)


# ---------------------------------------------------------------------------------------------------- other sites


def on_civitai(server: Server, content: bytes = LORA, **changes: Any) -> dict[str, Any]:
    """Version 725 of model 7: what the api says of it."""
    server.bodies["/api/download/models/725"] = 200, content
    file = {
        "name": "x.safetensors", "type": "Model", "metadata": {"format": "SafeTensor"}, "primary": True,
        "downloadUrl": server.at("/api/download/models/725?type=Model", "civitai.example"),
        "sizeKB": len(LORA) / 1024, "hashes": {"SHA256": hashlib.sha256(LORA).hexdigest().upper()},
    } | changes  # fmt: skip
    pickle = {"name": "x.pt", "type": "Model", "metadata": {"format": "PickleTensor"}, "primary": True,
              "downloadUrl": server.at("/pickle")}  # fmt: skip
    version = {"id": 725, "modelId": 7, "publishedAt": "2025-06-01T00:00:00Z", "files": [pickle, file]}
    older = version | {"id": 7, "publishedAt": "2024-01-01T00:00:00Z", "files": [pickle]}
    server.bodies["/api/v1/models/7"] = 200, json.dumps({"id": 7, "modelVersions": [older, version]}).encode()
    server.bodies["/api/v1/model-versions/725"] = 200, json.dumps(version).encode()
    return file


@pytest.mark.parametrize("query", ["", "?modelVersionId=725"])
def test_a_page_on_civitai_is_its_version(server: Server, tmp_path: Path, query: str) -> None:
    on_civitai(server)
    server.moved["/api/download/models/725"] = server.at("/signed?secret")
    server.bodies["/signed"] = 200, LORA
    found = fetch(server, f"civitai.com/models/7/name{query}", tmp_path, secrets=Secrets(civitai=TOKEN, replicate="no"))
    assert found.weights.read_bytes() == LORA
    api = "/api/v1/model-versions/725" if query else "/api/v1/models/7"
    assert server.seen == [
        ("civitai.example", api, f"Bearer {TOKEN}"),
        ("civitai.example", "/api/download/models/725?type=Model", f"Bearer {TOKEN}"),
        ("files.example", "/signed?secret", None),
    ]


def test_a_token_in_a_link_goes_into_a_header(server: Server, tmp_path: Path) -> None:
    on_civitai(server)
    fetch(server, f"{DOWNLOAD}?type=Model&token={TOKEN}", tmp_path, secrets=Secrets(civitai="other"))
    assert server.seen == [("civitai.example", "/api/download/models/725?type=Model", f"Bearer {TOKEN}")]
    fetch(server, DOWNLOAD, tmp_path)
    assert server.seen[1] == ("civitai.example", "/api/download/models/725", None)


def test_tokens_go_nowhere_else(server: Server, tmp_path: Path) -> None:
    """Not to a file elsewhere, not after a redirect, and not back again once elsewhere."""
    secrets = Secrets(huggingface=TOKEN, civitai=TOKEN, replicate=TOKEN)
    on_civitai(server, downloadUrl=server.at("/x.safetensors", "evil.example"))
    server.bodies["/x.safetensors"] = server.bodies["/api/download/models/726"] = 200, LORA
    fetch(server, "civitai.com/models/7", tmp_path, secrets=secrets)
    fetch(server, server.at("/x.safetensors", "civitai.example"), tmp_path, secrets=secrets)
    server.moved["/api/download/models/9"] = server.at("/back", "evil.example")
    server.moved["/back"] = server.at("/x.safetensors", "civitai.example")
    fetch(server, "civitai.com/api/download/models/9", tmp_path, secrets=secrets)
    sent = [(host, path) for host, path, token in server.seen if token]
    assert sent == [("civitai.example", "/api/v1/models/7"), ("civitai.example", "/api/download/models/9")]
    assert len(server.seen) == 6
    assert downloads.origin("https://civitai.com/a") != downloads.origin("http://civitai.com/a")
    assert downloads.origin("https://civitai.com/a") != downloads.origin("https://civitai.com.evil.com/a")
    assert downloads.origin("https://CIVITAI.com:443/a") == downloads.origin("https://civitai.com/b")


@pytest.mark.parametrize("version", ["", f"/versions/{HEX}"])
def test_replicate(server: Server, tmp_path: Path, version: str) -> None:
    server.moved[f"/o/n{version}/_weights"] = server.at("/pbxt/trained_model.tar")
    server.bodies["/pbxt/trained_model.tar"] = 200, SDXL
    found = fetch(server, f"replicate.com/o/n{version}", tmp_path, secrets=Secrets(replicate=TOKEN, civitai="no"))
    assert found.weights.read_bytes() == LORA
    assert found.tar is not None and read_inversion(found.tar).words == {"TOK": "<s0><s1>"}
    assert [(host, token) for host, _, token in server.seen] == [
        ("replicate.example", f"Bearer {TOKEN}"), ("files.example", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "status", "secrets", "words"),
    [
        (DOWNLOAD, 401, None, ("401 Unauthorized", "CivitAI asks for a token: give civitai_api_token")),
        (DOWNLOAD, 403, None, ("CIVITAI_API_TOKEN",)),
        (DOWNLOAD, 401, TOKEN, ("the CivitAI token is not accepted", "accept the licence")),
        (DOWNLOAD, 404, None, ("404 Not Found", "can differ from the id on the model's page")),
        (DOWNLOAD, 503, None, ("503", "try again later")),
        ("civitai.com/models/7", 404, None, ("404", "CivitAI model 7")),
        ("replicate.com/o/n", 401, None, ("Replicate asks for a token: give replicate_api_token",)),
        ("replicate.com/o/n", 403, TOKEN, ("the Replicate token is not accepted",)),
        ("replicate.com/o/n", 404, None, ("no weights are there", "write https://huggingface.co/o/n")),
        ("link", 403, TOKEN, ("signed and has expired",)),
        ("link", 404, None, ("no weights are there: check the address",)),
        ("link", 500, None, ("500", "try again later")),
    ],
)
def test_statuses(
    server: Server, tmp_path: Path, text: str, status: int, secrets: str | None, words: tuple[str, ...]
) -> None:
    for path in ("/x.safetensors", "/api/download/models/725", "/o/n/_weights", "/api/v1/models/7"):
        server.bodies[path] = status, b"secret"
    text = server.at("/x.safetensors?secret") if text == "link" else text
    with failing(*words, folder=tmp_path):
        fetch(server, text, tmp_path, secrets=Secrets(civitai=secrets, replicate=secrets))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hashes": {"SHA256": "ab" * 32}}, "came with SHA-256"),
        ({"sizeKB": 10.0}, "came with 16,"),
        ({"sizeKB": 10.0, "hashes": None}, "not 10,240: try again"),
        ({"metadata": {"format": "PickleTensor"}}, "has no SafeTensor file, only x.pt, x.safetensors"),
        ({"downloadUrl": None}, "something else than a model"),
        ({"hashes": {"SHA256": 3}}, "something else than a model"),
    ],
)
def test_what_civitai_says_is_checked(server: Server, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    on_civitai(server, **changes)
    with failing(words, "CivitAI model 7", folder=tmp_path):
        fetch(server, "civitai.com/models/7", tmp_path)
    on_civitai(server, hashes={}, sizeKB=None)
    assert fetch(server, "civitai.com/models/7", tmp_path).weights.read_bytes() == LORA


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b"null", b'{"modelVersions": []}', b"[" * 100_000, b"\xff"])
def test_answers_that_are_no_model(server: Server, tmp_path: Path, answer: bytes) -> None:
    server.bodies["/api/v1/models/7"] = 200, answer
    with failing("something else than a model", folder=tmp_path):
        fetch(server, "civitai.com/models/7", tmp_path)


def test_a_version_of_another_model(server: Server, tmp_path: Path) -> None:
    on_civitai(server)
    with failing("that is a version of the model 7", folder=tmp_path):
        fetch(server, "civitai.com/models/8?modelVersionId=725", tmp_path)


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (LORA[:-100], "is not a whole safetensors file"),
        (b"", "is not a whole safetensors file"),
        (b"<!DOCTYPE html><html>Log in", "leads to a web page"),
        (b"\x80\x02}q\x00" + bytes(5000), "is a pickle"),
        (b"\x1f\x8b\x08" + bytes(500), "is compressed"),
        (packed(("x.safetensors", LORA), mode="w:gz"), "is compressed"),
        (packed(("x.safetensors", LORA[:-5])), "is not a whole safetensors file"),
    ],
)
def test_what_is_no_weights_is_not_kept(server: Server, tmp_path: Path, body: bytes, words: str) -> None:
    server.bodies["/x.safetensors"] = 200, body
    with failing(words, "the file at http://files.example", folder=tmp_path):
        fetch(server, server.at("/x.safetensors?secret"), tmp_path)
    server.bodies["/x.safetensors"] = 200, LORA
    assert fetch(server, server.at("/x.safetensors?secret"), tmp_path).weights.read_bytes() == LORA


def test_a_download_that_breaks_off(server: Server, tmp_path: Path) -> None:
    server.bodies["/x.safetensors"], server.hang = (200, LORA), 0.01
    with failing("broke off after", f"of {len(LORA):,} bytes", folder=tmp_path):
        fetch(server, server.at("/x.safetensors"), tmp_path)
    server.hang = 0
    assert fetch(server, server.at("/x.safetensors"), tmp_path).weights.read_bytes() == LORA


def test_cancelled_halfway(server: Server, tmp_path: Path) -> None:
    server.bodies["/x.safetensors"], server.hang, cancel = (200, LORA), 20, threading.Event()
    threading.Thread(target=lambda: (server.half.wait(10), time.sleep(0.3), cancel.set()), daemon=True).start()
    began = time.monotonic()
    with failing("cancelled", kind=RequestCancelled, folder=tmp_path):
        fetch(server, server.at("/x.safetensors"), tmp_path, cancel=cancel)
    assert server.half.is_set() and time.monotonic() - began < 5
    with failing("cancelled", kind=RequestCancelled, folder=tmp_path):
        fetch(server, server.at("/x.safetensors"), tmp_path, cancel=cancel)
    assert len(server.seen) == 1


def test_limits(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.bodies["/x.safetensors"] = server.bodies["/x.tar"] = 200, LORA
    url, small = server.at("/x.safetensors"), Limits(bytes=len(LORA) - 1)
    with failing("is larger than", folder=tmp_path):
        fetch(server, url, tmp_path, limits=small)
    with failing("is larger than", folder=tmp_path):
        fetch(None, uri(LORA + bytes(10)), tmp_path, limits=small)
    with failing("is larger than", folder=tmp_path):
        fetch(server, server.at("/endless.tar"), tmp_path, limits=Limits(bytes=10**6, seconds=3))
    with failing("is larger than", folder=tmp_path):
        fetch(server, server.at("/announced.tar"), tmp_path)
    fetch(server, url, tmp_path / "just", limits=Limits(bytes=len(LORA)))
    server.hang = 20
    began = time.monotonic()
    with failing("took longer than", folder=tmp_path / "b"):
        fetch(server, url, tmp_path / "b", limits=Limits(seconds=0.4))
    monkeypatch.setattr(downloads, "STALLED", 0.2)
    with failing("sent nothing for 0.2 seconds", folder=tmp_path / "b"):
        fetch(server, url, tmp_path / "b")
    assert time.monotonic() - began < 5


def test_a_host_that_cannot_be_reached(server: Server, tmp_path: Path) -> None:
    import socket

    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    with failing("the host example.com is not known", folder=tmp_path):
        fetch(server, "https://example.com/x.tar?secret", tmp_path, policy=Policy(resolve=resolve))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        rules = Policy(ports=frozenset({port}), networks=server.policy.networks)
        with failing("cannot be fetched", "refused", folder=tmp_path):
            fetch(server, f"http://127.0.0.1:{port}/x.tar?secret", tmp_path, policy=rules)
    for count in range(10):
        server.moved[f"/{count}.tar"] = f"/{count + 1}.tar"
    with failing("redirects", folder=tmp_path):
        fetch(server, server.at("/0.tar"), tmp_path)


class Full(io.BytesIO):
    def write(self, *_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.bodies["/x.safetensors"] = 200, LORA
    terms = Terms(time.monotonic() + 5, Limits(), server.policy)
    with failing("No space left on device", "cannot be kept", "Free some room"):
        downloads.download(server.at("/x.safetensors?secret"), Full(), terms, limit=10**9)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with failing("No space left on device", "the file at", folder=tmp_path):
        fetch(server, server.at("/x.safetensors?secret"), tmp_path)


def test_a_folder_that_is_none(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with failing("cannot be kept"):
        fetch(server, server.at("/x.safetensors"), tmp_path / "file")


# ---------------------------------------------------------------------------------------------------- tars, data, paths


def special(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def bomb() -> bytes:
    """A header that claims 10 GB, of which nothing is there."""
    info = tarfile.TarInfo("x.safetensors")
    info.size = 10 * 10**9
    return info.tobuf() + bytes(2048)


X = ("x.safetensors", LORA)
HOSTILE = [
    (packed(("a.txt", b"a")), "No .safetensors file found in"),
    (packed(("x.safetensors/a.txt", b"a")), "No .safetensors file found in"),
    (packed(), "No .safetensors file found in"),
    (packed(X, ("a/y.safetensors", LORA)), "Multiple .safetensors files found in"),
    (packed(X, X), "Multiple .safetensors files found in"),
    (packed(X, ("Y.SAFETENSORS", LORA)), "Multiple .safetensors files found in"),
    (packed(("../x.safetensors", LORA)), "leads out of it"),
    (packed(("a/../../x.safetensors", LORA)), "leads out of it"),
    (packed(("/tmp/x.safetensors", LORA)), "leads out of it"),
    (packed(X, ("/etc/passwd", b"")), "leads out of it"),
    (packed((special("x.safetensors", tarfile.SYMTYPE, "/etc/passwd"), b"")), "is a link"),
    (packed(X, (special("y", tarfile.LNKTYPE, "x.safetensors"), b"")), "is a link"),
    (packed((special("x.safetensors", tarfile.CHRTYPE), b"")), "is a link"),
    (packed((special("x.safetensors", tarfile.FIFOTYPE), b"")), "is a link"),
    (bomb(), "10,000,000,000 bytes; 8,000,000,000 at most"),
    (packed(*((f"{n}", b"") for n in range(1001))), "more than 1,000 members"),
    (packed(X)[: 1024 + len(LORA) // 2], "is not a whole tar"),
    (packed(X)[: 512 + (len(LORA) + 511) // 512 * 512], "is not a whole tar"),
    (packed(("x.safetensors", b"\x80\x02}q\x00" + bytes(600))), "is a pickle"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_tars_that_are_refused(tmp_path: Path, number: int) -> None:
    content, words = HOSTILE[number]
    with failing(words, "data URI", folder=tmp_path / "cache"):
        fetch(None, uri(content), tmp_path / "cache")
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with failing(words, str(path), folder=tmp_path / "cache"):
        fetch(None, str(path), tmp_path / "cache")
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "x.tar"}


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    pax = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1", "GNU.sparse.size": "8000000000"}
    info = tarfile.TarInfo("x.safetensors")
    info.pax_headers = pax
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info.size = 1
        tar.addfile(info, io.BytesIO(b"a"))
    with failing("sparse file", folder=tmp_path):
        fetch(None, uri(out.getvalue()), tmp_path)


@pytest.mark.parametrize(
    ("content", "tokens"),
    [(TRAINED, False), (SDXL, True), (packed(("._x.safetensors", b"mac"), X), False), (LORA, False)],
)
def test_data_uris(tmp_path: Path, content: bytes, tokens: bool) -> None:
    found = fetch(None, uri(content), tmp_path)
    assert found.weights.read_bytes() == LORA
    assert (found.tar is not None) == tokens
    assert fetch(None, uri(content), tmp_path) == found


@pytest.mark.parametrize("text", ["data:;base64,secret!", "data:;base64,QUJ", "data:;base64,séc"])
def test_data_uris_that_are_cut(tmp_path: Path, text: str) -> None:
    with failing("is not base64", folder=tmp_path):
        fetch(None, text, tmp_path)


def test_local_tars_and_folders(tmp_path: Path) -> None:
    tar, folder, cache = tmp_path / "t.tar", tmp_path / "folder", tmp_path / "cache"
    tar.write_bytes(SDXL)
    found = fetch(None, str(tar), cache)
    assert found.weights.read_bytes() == LORA and found.tar == tar
    other = save({"b": torch.ones(3)})
    tar.write_bytes(packed(("y.safetensors", other)))
    assert fetch(None, str(tar), cache).weights.read_bytes() == other, "the tar was changed"
    folder.mkdir()
    with failing("No .safetensors file found in the folder"):
        fetch(None, str(folder), cache)
    (folder / "x.safetensors").write_bytes(LORA)
    assert fetch(None, str(folder), cache).weights == folder / "x.safetensors"
    (folder / "y.safetensors").write_bytes(LORA)
    with failing("Multiple .safetensors files found in", "x.safetensors, y.safetensors"):
        fetch(None, str(folder), cache)
    reference = parse_reference(str(tar))
    tar.unlink()
    with failing("does not exist"):
        fetch_reference(reference, folder=cache)


# ---------------------------------------------------------------------------------------------------- the folder


def used(folder: Path, url: str, age: float) -> None:
    then = time.time() - age
    os.utime(folder / parse_reference(url).key, (then, then))


def test_what_was_used_longest_ago_goes(server: Server, tmp_path: Path) -> None:
    urls = [server.at(f"/{number}.safetensors") for number in range(4)]
    for number in range(4):
        server.bodies[f"/{number}.safetensors"] = 200, LORA
    room = Limits(folder=3 * len(LORA))
    for age, url in zip((300, 200, 100), urls, strict=False):
        fetch(server, url, tmp_path, limits=room)
        used(tmp_path, url, age)
    fetch(server, urls[0], tmp_path, limits=room)  # the oldest is used again
    fetch(server, urls[3], tmp_path, limits=room)
    kept = [(tmp_path / parse_reference(url).key).exists() for url in urls]
    assert kept == [True, False, True, True]
    assert len(server.seen) == 4
    found = fetch(server, urls[1], tmp_path, limits=Limits(folder=1))
    assert found.weights.is_file(), "what was just fetched stays, although it is larger than the bound"
    assert [p.name for p in tmp_path.iterdir() if p.name != "locks"] == [parse_reference(urls[1]).key]


def test_what_is_locked_stays(server: Server, tmp_path: Path) -> None:
    from filelock import FileLock

    urls = [server.at(f"/{number}.safetensors") for number in range(3)]
    for number in range(3):
        server.bodies[f"/{number}.safetensors"] = 200, LORA
    first = parse_reference(urls[0]).key
    fetch(server, urls[0], tmp_path)
    with FileLock(tmp_path / "locks" / f"{first}.lock"):
        fetch(server, urls[1], tmp_path, limits=Limits(folder=1))
        assert (tmp_path / first / "weights.safetensors").is_file()
        with failing("another process has been fetching"):
            (tmp_path / parse_reference(urls[1]).key).rename(tmp_path / "away")
            (tmp_path / first).rename(tmp_path / parse_reference(urls[1]).key)
            fetch(server, urls[0], tmp_path, limits=Limits(seconds=0.3))
        cancel = threading.Event()
        threading.Timer(0.2, cancel.set).start()
        with failing("cancelled", kind=RequestCancelled):
            fetch(server, urls[0], tmp_path, cancel=cancel)


def test_what_a_killed_process_left_is_not_trusted(server: Server, tmp_path: Path) -> None:
    server.bodies["/x.safetensors"] = 200, LORA
    url = server.at("/x.safetensors")
    for key in (parse_reference(url).key, "0" * 64):
        (tmp_path / f".partial-{key}").mkdir(parents=True)
        (tmp_path / f".partial-{key}" / "weights.safetensors").write_bytes(b"half")
    with failing("offline"):
        fetch(None, url, tmp_path, offline=True)
    assert fetch(server, url, tmp_path).weights.read_bytes() == LORA
    assert not list(tmp_path.glob(".partial-*"))


PROGRAM = """
import ipaddress, sys
from pathlib import Path
from flux_engine.guarded import Policy
from flux_engine.references import fetch_reference, parse_reference
policy = Policy(ports=frozenset({int(sys.argv[3])}), networks=(ipaddress.ip_network("127.0.0.1/32"),))
print(fetch_reference(parse_reference(sys.argv[1]), folder=Path(sys.argv[2]), policy=policy).weights)
"""


def test_two_processes_at_once(server: Server, tmp_path: Path) -> None:
    server.bodies["/x.safetensors"], server.pause = (200, LORA), 3.0
    url = server.at("/x.safetensors", "127.0.0.1")
    command = [sys.executable, "-c", PROGRAM, url, str(tmp_path), str(server.port)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=60)[0].strip() for process in both]
    assert told[0] == told[1] and Path(told[0]).read_bytes() == LORA
    assert len(server.seen) == 1


def test_many_threads_at_once(server: Server, tmp_path: Path) -> None:
    server.bodies["/x.safetensors"], server.pause = (200, LORA), 0.2
    found: list[Fetched] = []
    url = server.at("/x.safetensors")
    threads = [threading.Thread(target=lambda: found.append(fetch(server, url, tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and len(server.seen) == 1


# ---------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache made by hand, which the hub's own library reads, without a connection."""
    from huggingface_hub import constants

    def repository(name: str, **files: bytes) -> None:
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(COMMIT)
        (root / "blobs").mkdir()
        snapshot = root / "snapshots" / COMMIT
        for file, content in files.items():
            path = snapshot / file.replace("__", "/").replace("_s", ".s")
            path.parent.mkdir(parents=True, exist_ok=True)
            (root / "blobs" / file).write_bytes(content)
            path.symlink_to(os.path.relpath(root / "blobs" / file, path.parent))

    repository("o/one", a__x_safetensors=LORA, README=b"a")
    repository("o/none", README=b"a")
    repository("o/many", x_safetensors=LORA, a__y_safetensors=LORA)
    repository("o/cut", x_safetensors=LORA[:-5])
    for module in ("huggingface_hub.file_download", "huggingface_hub._snapshot_download"):
        if hasattr(sys.modules.get(module), "HF_HUB_CACHE"):
            monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--o--one" / "snapshots" / COMMIT


def test_repositories_of_the_hub(hub_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    how = {"offline": True, "secrets": Secrets(huggingface=TOKEN)}
    whole = hub_cache / "a" / "x.safetensors"
    for text in ("o/one", "huggingface.co/o/one", "o/one/a/x.safetensors",
                 "https://huggingface.co/o/one/resolve/main/a/x.safetensors",
                 f"https://huggingface.co/o/one/blob/{COMMIT}/a/x.safetensors"):  # fmt: skip
        assert fetch(None, text, cache, **how) == Fetched(whole)
    with failing("No .safetensors file found in the Hugging Face repository o/none"):
        fetch(None, "o/none", cache, **how)
    with failing("Multiple .safetensors files found in the Hugging Face repository o/many", "a/y.safetensors, x.saf"):
        fetch(None, "o/many", cache, **how)
    assert fetch(None, "o/many/x.safetensors", cache, **how).weights.read_bytes() == LORA
    with failing("is not a whole safetensors file", "repository o/cut"):
        fetch(None, "o/cut", cache, **how)
    for text in ("o/absent", "o/one/b.safetensors"):
        with failing("nothing is fetched offline"):
            fetch(None, text, cache, **how)
    assert not cache.exists()


@pytest.mark.parametrize("answer", ["there", "none", "fails", "offline"])
def test_what_an_adapter_says_beside_it_is_fetched_too(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """A connection that fails is told: without what stands there the LoRA would count too much or too little."""
    import huggingface_hub
    from huggingface_hub import errors

    asked: list[str] = []

    class Told:
        will_download = False

    def download(_: str, file: str, **how: Any) -> object:
        if how.get("dry_run"):
            return Told
        asked.append(file)
        if file.endswith(".safetensors") or answer == "there":
            return str(hub_cache / "a" / "x.safetensors")
        response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
        raise {
            "none": errors.RemoteEntryNotFoundError("none", response=response),  # pyright: ignore[reportArgumentType]
            "fails": errors.LocalEntryNotFoundError("no connection"),
            "offline": errors.LocalEntryNotFoundError("not in the cache"),
        }[answer]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    def get() -> Fetched:
        return fetch(None, "o/one/a/adapter_model.safetensors", tmp_path, offline=answer == "offline")

    if answer == "fails":
        with failing("it cannot be fetched: no connection"):
            get()
    else:
        assert get() == Fetched(hub_cache / "a" / "x.safetensors")
    assert asked == ["a/adapter_model.safetensors", "a/adapter_config.json"]


def test_the_hub_online(hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token goes to the hub's own functions, and a file that is too large is not begun."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    class Told:
        will_download, file_size = True, 10**10

    def download(repository: str, file: str, **how: Any) -> object:
        calls.append(how)
        return Told if how.get("dry_run") else str(hub_cache / "a" / "x.safetensors")

    class Api:
        def __init__(self, token: str) -> None:
            calls.append({"token": token})

        def list_repo_files(self, repository: str, revision: str) -> list[str]:
            return ["x.safetensors", "b.txt"]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with failing("10,000,000,000 bytes; 8,000,000,000 are fetched"):
        fetch(None, "o/one", tmp_path, secrets=Secrets(huggingface=TOKEN, civitai="no"))
    assert [call["token"] for call in calls] == [TOKEN, TOKEN]
    Told.file_size = len(LORA)
    fetch(None, "o/one", tmp_path, secrets=Secrets(huggingface=TOKEN))
    assert [call.get("local_files_only") for call in calls] == [None, None, None, None, False]


def test_every_error_is_typed() -> None:
    assert issubclass(downloads.Answered, WeightsError) and issubclass(UnknownModel, FluxEngineError)
    assert PUBLIC.networks == ()
