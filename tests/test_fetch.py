"""The hub's own library against a server on this machine that speaks as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import in_shards
from safetensors.torch import load_file

from flux_engine import hub as models

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 100_000
"""26 MB: the library keeps what has come in pieces of 10."""

PROGRAM = """
import json, sys
from flux_engine import fetch
from flux_engine.errors import FluxEngineError
try:
    how = {"revision": sys.argv[3], "offline": sys.argv[4] == "offline"}
    if sys.argv[2] == "*":
        print(json.dumps(["files", " ".join(fetch.listing(sys.argv[1], **how))]))
    else:
        print(json.dumps(["file", str(fetch.fetch(sys.argv[1], sys.argv[2], **how))]))
except FluxEngineError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(ThreadingHTTPServer):
    """Serves a few files, and the ways not to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"owner/model": {"x.safetensors": CONTENT}}
        """Of each repository, by name."""
        self.requests: list[tuple[str, str | None]] = []
        """Of every GET, the path and the range asked for."""
        self.break_off = 0
        """So many more answers end in the middle."""
        self.pause = 0.0


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        token = self.headers.get("Authorization")
        if token not in (None, "Bearer good"):
            return self._refuse(401, "Nothing", "Invalid credentials in Authorization header")
        listed = re.fullmatch(r"/api/models/(\w+/\w+)/tree/(\w+)\?.*", self.path)
        if listed and listed[1] in self.server.files and listed[2] == "main":
            files = self.server.files[listed[1]].items()
            return self._send(json.dumps([{"type": "file", "path": n, "size": len(c), "oid": "1"} for n, c in files]))
        if listed:
            return self._refuse(401, "RepoNotFound")
        match = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", self.path)
        if match is None:
            return self._refuse(404, "EntryNotFound")
        repository, revision, file = match.groups()
        if repository == "owner/gated":
            return self._refuse(403 if token else 401, "GatedRepo")
        if repository == "owner/forbidden":
            return self._refuse(403, "Nothing", "this token may not read here")
        if repository == "owner/broken":
            return self._refuse(500, "Nothing")
        if repository not in self.server.files:
            return self._refuse(401, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        content = self.server.files[repository].get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        asked = self.headers.get("Range")
        begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        part = content[begin:]
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            time.sleep(self.server.pause)
            if self.server.break_off:
                self.server.break_off -= 1
                part = part[: len(part) // 2]
                self.close_connection = True
            self.wfile.write(part)

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def _refuse(self, status: int, code: str, words: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", words)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Client:
    """Fetches in a process of its own, since the library reads its settings when it is imported."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.home = home
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
        }
        self.environment.pop("HF_TOKEN", None)

    def start(
        self, repository: str = "owner/model", file: str = "x.safetensors", revision: str = "main", how: str = "online"
    ) -> subprocess.Popen[str]:
        return self.run(PROGRAM, repository, file, revision, how)

    def run(self, program: str, *args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, *args]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True)

    def fetch(self, *args: str, **kwargs: str) -> tuple[str, str]:
        return self.answer(self.start(*args, **kwargs))

    @staticmethod
    def answer(process: subprocess.Popen[str]) -> tuple[str, str]:
        kind, words = json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
        return kind, words


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


def test_a_file_is_fetched_once_into_the_usual_cache(hub: Hub, client: Client) -> None:
    kind, path = client.fetch()
    assert kind == "file" and Path(path).read_bytes() == CONTENT
    assert Path(path) == client.home / "hub" / "models--owner--model" / "snapshots" / COMMIT / "x.safetensors"
    hub.requests.clear()
    assert client.fetch() == (kind, path)
    assert client.fetch(how="offline") == (kind, path)
    assert hub.requests == []


def test_a_cache_made_by_hand_is_used_offline(client: Client) -> None:
    root = client.home / "hub" / "models--owner--other"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    (root / "blobs" / "abc").write_bytes(b"weights")
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT / "x.safetensors").symlink_to("../../blobs/abc")
    kind, path = client.fetch("owner/other", how="offline")
    assert kind == "file" and Path(path).read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("args", "kind", "words"),
    [
        (("owner/gated",), "WeightsError", "accept its licence at https://huggingface.co/owner/gated, then log in"),
        (("owner/nothing",), "UnknownModel", "there is no repository 'owner/nothing'"),
        (("owner/model", "y.safetensors"), "WeightsError", "owner/model at main has no file 'y.safetensors'"),
        (("owner/model", "x.safetensors", "v9"), "UnknownModel", "owner/model has no revision 'v9'"),
        (("owner/model", "x.safetensors", "main", "offline"), "WeightsError", "nothing is fetched offline"),
        (("owner/model/x/y",), "UnknownModel", "is not the name of a repository"),
    ],
)  # fmt: skip
def test_each_way_to_fail_is_said(client: Client, args: tuple[str, ...], kind: str, words: str) -> None:
    told = client.fetch(*args)
    assert told[0] == kind and words in told[1], told
    assert not list(client.home.rglob("snapshots/*/*"))


@pytest.mark.parametrize(
    ("token", "repository", "words"),
    [
        ("bad", "owner/model", "the hub does not accept the token that is set here"),
        ("bad", "owner/gated", "the hub does not accept the token that is set here"),
        ("good", "owner/gated", "the account that is logged in has not accepted its licence, or has no access yet"),
        ("good", "owner/forbidden", "the token that is set here may not read it"),
    ],
)
def test_tokens(client: Client, token: str, repository: str, words: str) -> None:
    client.environment["HF_TOKEN"] = token
    for file in ("x.safetensors", "*") if repository == "owner/model" else ("x.safetensors",):
        kind, told = client.fetch(repository, file)
        assert kind == "WeightsError" and words in told, told
    assert not list(client.home.rglob("snapshots/*/*"))


def test_a_good_token(client: Client) -> None:
    client.environment["HF_TOKEN"] = "good"
    assert client.fetch()[0] == "file"


def test_a_server_that_fails_and_none_at_all(hub: Hub, tmp_path: Path) -> None:
    """At once, since the library tries again for some twenty seconds."""
    broken, unplugged = Client(hub, tmp_path / "a"), Client(hub, tmp_path / "b")
    unplugged.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there
    started = broken.start("owner/broken"), unplugged.start(), unplugged.start(file="*")
    for client, process in zip((broken, unplugged, unplugged), started, strict=True):
        kind, words = client.answer(process)
        assert kind == "WeightsError" and "cannot be fetched" in words, words
        assert not list(client.home.rglob("snapshots/*/*"))


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: Hub, client: Client) -> None:
    hub.break_off = 1
    kind, path = client.fetch()
    assert kind == "file" and Path(path).read_bytes() == CONTENT
    assert [asked for _, asked in hub.requests] == [None, f"bytes={10 * 2**20}-"], hub.requests


def test_two_at_once_do_not_meet_in_a_half_file(hub: Hub, client: Client) -> None:
    hub.pause = 1.0
    both = [client.start() for _ in range(2)]
    told = [client.answer(process) for process in both]
    assert told[0] == told[1] and told[0][0] == "file"
    assert Path(told[0][1]).read_bytes() == CONTENT
    assert len(hub.requests) == 1


def test_the_files_of_a_repository_are_listed(client: Client) -> None:
    assert client.fetch(file="*") == ("files", "x.safetensors")
    kind, words = client.fetch(file="*", how="offline")
    assert kind == "WeightsError" and "nothing is fetched offline" in words, words
    client.fetch()
    assert client.fetch(file="*", how="offline") == ("files", "x.safetensors")
    kind, words = client.fetch("owner/nothing", file="*")
    assert kind == "UnknownModel" and "there is no repository 'owner/nothing'" in words, words


SHARDS = """
import json, sys, torch
from pathlib import Path
from flux_engine import EngineConfig, FluxEngineError
from flux_engine.assemble import find_model
from flux_engine.checkpoints.source import WeightSource
from safetensors.torch import load_file
try:
    path = find_model("owner/shards", EngineConfig()).parts["transformer"]
    given = load_file(sys.argv[1])
    with WeightSource.open(path) as source:
        same = set(source.recipes) == set(given) and all(torch.equal(source.rows(n), t) for n, t in given.items())
    print(json.dumps([path.name, str(same)]))
except FluxEngineError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def test_a_repository_in_shards_is_fetched_whole(hub: Hub, client: Client, tmp_path: Path) -> None:
    given = models.find("demo-schnell").obtain()["transformer"]
    (tmp_path / "there").mkdir()
    there = in_shards(tmp_path / "there", load_file(given))
    files = hub.files["owner/shards"] = {path.name: path.read_bytes() for path in there.iterdir()}
    missing = files.pop("x-00002-of-00002.safetensors")
    kind, words = client.answer(client.run(SHARDS, str(given)))
    assert kind == "WeightsError" and "has no file 'x-00002-of-00002.safetensors'" in words, words
    files["x-00002-of-00002.safetensors"] = missing
    assert client.answer(client.run(SHARDS, str(given))) == ("x.safetensors.index.json", "True")


def test_a_full_disk(hub: Hub, client: Client) -> None:
    """A cache on a file system of 8 MB, which only this process sees."""
    full = client.home / "hub"
    full.mkdir()
    program = f'{sys.executable} -c "$PROGRAM" owner/model x.safetensors main online'
    inside = f"mount -t tmpfs -o size=8m none {full} && exec {program}"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside]
    if shutil.which("unshare") is None or subprocess.run([*command[:3], "true"], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    process = subprocess.Popen(
        command, env=client.environment | {"PROGRAM": PROGRAM}, stdout=subprocess.PIPE, text=True
    )
    kind, words = client.answer(process)
    assert kind == "WeightsError" and "no room for x.safetensors of owner/model" in words, words
