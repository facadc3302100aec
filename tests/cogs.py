"""The real cogs, each in an environment of its own under out/cogs, serving a generated folder without Docker.

The environments have only cog and what it brings; torch and the rest are those of the environment that runs the tests,
looked for after cog's own, so that nothing is installed twice and cog's versions win.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {"0.23": "cog==0.23.1", "0.16": "cog==0.16.12"}
READY = 180.0
"""Most seconds until a server is ready."""


def environment(version: str) -> Path:
    """The folder of an environment with that cog, made once."""
    folder = ROOT / "out" / "cogs" / version
    packages = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")]
    # Without the cog in it: the older one calls the newer one's server where it finds that.
    rest = {path.name: path for one in packages for path in one.iterdir() if not path.name.startswith("cog")}
    wanted = "\n".join([VERSIONS[version], sys.version, str(ROOT), *sorted(map(str, rest.values()))])
    stamp = folder / "made-for"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, clear=True, symlinks=True)
        (folder / "rest").mkdir()
        for name, path in rest.items():
            (folder / "rest" / name).symlink_to(path)
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-qq", VERSIONS[version]], check=True)
        [own] = folder.glob("lib/python*/site-packages")
        (own / "zz-after-cog.pth").write_text(f"{ROOT}\n{ROOT / 'kernels'}\n{folder / 'rest'}\n")
        stamp.write_text(wanted)
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@dataclass
class Server:
    """One that runs."""

    version: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        seconds: float = 120,
    ) -> tuple[int, Any]:
        """Status of an answer, and its JSON, or its text where it is none."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=data,
            method=method,
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text or b"null")
        except ValueError:
            return status, text.decode()

    def predict(self, **inputs: Any) -> tuple[int, Any]:
        """A prediction, once no other one runs."""
        self.wait_until_idle()
        return self.call("POST", "/predictions", {"input": inputs})

    def wait_until_idle(self, seconds: float = 60) -> str:
        """What the server then says of itself. Both cogs answer, and call webhooks, a moment before they take another
        prediction."""
        until = time.monotonic() + seconds
        while (said := self.health()["status"]) == "BUSY" and time.monotonic() < until:
            time.sleep(0.01)
        return said

    def begin(self, name: str, hook: str, inputs: dict[str, Any], **more: Any) -> tuple[int, Any]:
        """A prediction that is not waited for, of that id."""
        body = {"input": inputs, "webhook": hook, **more}
        return self.call("PUT", f"/predictions/{name}", body, headers={"Prefer": "respond-async"})

    def health(self) -> dict[str, Any]:
        return self.call("GET", "/health-check", seconds=10)[1]


@contextmanager
def serving(version: str, folder: Path, *, upload: str | None = None) -> Iterator[Server]:
    """A server of a generated folder, ready; nothing of it runs afterwards."""
    home, port = environment(version), free_port()
    log = folder / f"server-{port}.log"
    aside = folder.parent / "tmp"
    aside.mkdir(exist_ok=True)
    known = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    settings = known | {
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",  # Cog starts its worker as `python`
        "PORT": str(port),
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FLUX_ENGINE_CACHE": str(folder.parent / "cache"),
        "TMPDIR": str(aside),  # where the files of predictions are
    }
    command = [str(home / "bin" / "python"), "-m", "cog.server.http", "--host", "127.0.0.1"]
    command += ["--upload-url", upload] if upload else []
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=settings, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        server = Server(version, port, process, log)
        _wait_until_ready(server)
        yield server
    finally:
        _end(process)


def _wait_until_ready(server: Server) -> None:
    until = time.monotonic() + READY
    while time.monotonic() < until:
        if server.process.poll() is not None:
            break
        try:
            said = server.health().get("status")
        except OSError:
            said = None
        if said == "READY":
            return
        if said in ("SETUP_FAILED", "DEFUNCT"):
            break
        time.sleep(0.2)
    raise AssertionError(f"cog {server.version} did not get ready: {server.log.read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server and what it started: they are a group of their own."""
    for sign, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait(10)


@dataclass
class Receiver:
    """Takes webhooks and uploads, and gives a file."""

    url: str = ""
    hooks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    uploads: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list[tuple[str, dict[str, str], bytes]])
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    came: threading.Condition = field(default_factory=threading.Condition)

    def of(self, name: str) -> list[dict[str, Any]]:
        """The webhooks of a prediction."""
        return [hook for hook in self.hooks if hook.get("id") == name]

    def ended(self, name: str, seconds: float = 120) -> dict[str, Any]:
        """The last webhook of a prediction, once it has ended."""
        return self.until(name, lambda hook: hook["status"] in ("succeeded", "failed", "canceled"), seconds)

    def until(self, name: str, right: Any, seconds: float = 120) -> dict[str, Any]:
        with self.came:
            found: list[dict[str, Any]] = []

            def there() -> bool:
                found[:] = [hook for hook in self.of(name) if right(hook)]
                return bool(found)

            assert self.came.wait_for(there, seconds), f"nothing came of {name}: {self.of(name)}"
            return found[-1]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on this machine."""
    told = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self._body())
            with told.came:
                told.hooks.append(body)
                told.came.notify_all()
            self._answer(b"")

        def do_PUT(self) -> None:
            body = self._body()
            with told.came:
                told.uploads.append((self.path, dict(self.headers.items()), body))
                told.came.notify_all()
            self._answer(b"", Location=f"{told.url}/kept{self.path}?signed=1")

        def do_GET(self) -> None:
            self._answer(told.files[self.path], **{"Content-Type": "image/png"})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                pieces = []
                while size := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield told
        server.shutdown()
        thread.join()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def decoded(uri: str) -> tuple[str, bytes]:
    """The kind and the bytes of a data URI."""
    head, _, body = uri.partition(",")
    return head.removeprefix("data:").removesuffix(";base64"), base64.b64decode(body)
