"""Links: what is not public is never reached, and nothing takes long or much."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flux_engine.errors import InvalidRequest
from flux_engine.guarded import LIMIT, PUBLIC, REDIRECTS, Policy, fetch_picture, is_public, shown

CONTENT = bytes(range(256)) * 1000
LOCAL = (ipaddress.ip_network("127.0.0.1/32"),)


class Handler(BaseHTTPRequestHandler):
    """What a path is called is what it does."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))  # pyright: ignore[reportAttributeAccessIssue]
        name = self.path.partition("?")[0].strip("/").split("/")
        self.close_connection = True
        with suppress(ConnectionError, TimeoutError):
            getattr(self, "do_" + name[0])(*name[1:])

    def answer(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_picture(self, *_: str) -> None:
        self.answer(body=CONTENT, Content_Length=str(len(CONTENT)))

    def do_closing(self) -> None:
        self.answer(body=CONTENT)

    def do_chunked(self) -> None:
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (CONTENT[:1000], CONTENT[1000:]))
        self.answer(body=pieces + b"0\r\n\r\n", Transfer_Encoding="chunked")

    def do_short(self) -> None:
        self.answer(body=CONTENT[:100], Content_Length=str(len(CONTENT)))

    def do_shortchunk(self) -> None:
        self.answer(body=b"ff\r\nabc", Transfer_Encoding="chunked")

    def do_announced(self) -> None:
        self.answer(Content_Length=str(10**12))

    def do_negative(self) -> None:
        self.answer(body=CONTENT, Content_Length="-5")

    def do_gzip(self) -> None:
        self.answer(body=CONTENT, Content_Encoding="gzip")

    def do_status(self, status: str) -> None:
        self.answer(int(status), b"no", Content_Length="2")

    def do_loop(self, count: str = "0") -> None:
        self.answer(302, Location=f"/loop/{int(count) + 1}")

    def do_hops(self, count: str) -> None:
        self.answer(307, Location=f"/hops/{int(count) - 1}" if int(count) > 1 else "/picture")

    def do_to(self) -> None:
        self.answer(302, Location=self.server.location)  # pyright: ignore[reportAttributeAccessIssue]

    def do_nowhere(self) -> None:
        self.answer(302)

    def do_endless(self) -> None:
        self.answer()
        while not self.stopped(0):
            self.wfile.write(bytes(65536))

    def do_drip(self) -> None:
        self.answer(Content_Length="1000")
        self.drip(b"x")

    def do_dripping_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip(b"x")

    def do_continue(self) -> None:
        self.drip(b"HTTP/1.1 100 Continue\r\n\r\n")

    def do_silent(self) -> None:
        self.stopped(5)

    def do_nonsense(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    def do_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n")

    def do_nothing(self) -> None:
        pass

    def drip(self, piece: bytes) -> None:
        for _ in range(100):
            self.wfile.write(piece)
            self.wfile.flush()
            if self.stopped(0.05):
                return

    def stopped(self, seconds: float) -> bool:
        return self.server.stop.wait(seconds)  # pyright: ignore[reportAttributeAccessIssue]


class Server(ThreadingHTTPServer):
    """On 127.0.0.1, and it remembers what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.stop = threading.Event()
        self.location = ""
        self.port = self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


def policy(server: Server, **changes: object) -> Policy:
    """Lets the server on 127.0.0.1 be reached, under the name pictures.example."""
    plain = Policy(
        ports=frozenset({80, 443, server.port}),
        networks=LOCAL,
        resolve=lambda host, port: ["127.0.0.1"] if host == "pictures.example" else PUBLIC.resolve(host, port),
    )
    return replace(plain, **changes)


def refused(url: str, *words: str, policy: Policy = PUBLIC, timeout: float = 5, limit: int = LIMIT) -> str:
    with pytest.raises(InvalidRequest) as caught:
        fetch_picture(url, field="image", timeout=timeout, limit=limit, policy=policy)
    message = str(caught.value)
    assert caught.value.field == "image"
    assert message.startswith("image ")
    assert message.count("image '") == 1, "one message, not one in another"
    assert "secret" not in message
    assert len(message) < 450
    for word in words:
        assert word in message, message
    return message


# ---------------------------------------------------------------------------------------------------- what is fetched


@pytest.mark.parametrize("how", ["picture", "closing", "chunked", f"hops/{REDIRECTS}"])
def test_a_body_is_fetched(server: Server, how: str) -> None:
    url = f"http://pictures.example:{server.port}/{how}?token=secret&a=b c#part"
    assert fetch_picture(url, field="image", policy=policy(server)) == CONTENT
    path, headers = server.seen[0]
    assert path == f"/{how}?token=secret&a=b%20c"
    assert headers["Host"] == f"pictures.example:{server.port}"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & set(headers)


def test_the_path_is_sent_as_ascii(server: Server) -> None:
    fetch_picture(f"http://127.0.0.1:{server.port}/picture/../picture?é=%20", field="image", policy=policy(server))
    assert server.seen[0][0] == "/picture/../picture?%C3%A9=%20"


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    url = f"http://127.0.0.1:{server.port}/picture"
    assert fetch_picture(url, field="image", policy=policy(server)) == CONTENT


def test_the_name_is_looked_up_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers with another address the second time gains nothing."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    asked: list[str] = []
    connect, reached = socket.create_connection, list[tuple[str, int]]()

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    def connected(address: tuple[str, int], timeout: float) -> socket.socket:
        reached.append(address)
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", connected)

    url = f"http://rebinding.example:{server.port}/picture"
    assert fetch_picture(url, field="image", policy=policy(server, resolve=resolve)) == CONTENT
    assert asked == ["rebinding.example"]
    assert reached == [("127.0.0.1", server.port)]


def test_another_address_is_tried(server: Server) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.2", 0))
        rules = policy(
            server, networks=(ipaddress.ip_network("127.0.0.0/30"),), resolve=lambda *_: ["127.0.0.2", "127.0.0.1"]
        )
        url = f"http://pictures.example:{server.port}/picture"
        assert fetch_picture(url, field="image", policy=rules) == CONTENT


# ---------------------------------------------------------------------------------------------------- not reached


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.0.0.192",
     "192.168.1.1", "198.18.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
     "192.88.99.1", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
     "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378::1", "2001:db8::1",
     "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "100::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    refused("http://evil.example/a.png?secret", "not public", policy=Policy(resolve=lambda *_: [address]))
    refused("http://evil.example/", "not public", policy=Policy(resolve=lambda *_: ["8.8.8.8", address]))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    assert PUBLIC.allows(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1", "127.1", "0", "localhost",
     "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "[64:ff9b::127.0.0.1]",
     "169.254.169.254", "①②⑦.⓪.⓪.①"],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_spelling_leads_to_this_machine(host: str, scheme: str) -> None:
    refused(f"{scheme}://{host}/?secret", "not public")


def test_without_addresses_nothing_is_reached() -> None:
    refused("http://empty.example/", "not public", policy=Policy(resolve=lambda *_: []))
    refused("http://odd.example/", "not public", policy=Policy(resolve=lambda *_: ["not an address"]))


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("file:///etc/passwd", "'file'"),
        ("ftp://example.com/a.png", "'ftp'"),
        ("gopher://example.com/", "'gopher'"),
        ("//example.com/a.png", "http and https"),
        ("a.png", "http and https"),
        ("http://", "no host"),
        ("http:///a.png", "no host"),
        ("http://user:secret@example.com/", "user name"),
        ("http://secret@example.com/", "user name"),
        ("http://example.com\\@127.0.0.1/", "characters"),
        ("http://example.com/\r\nX: y", "characters"),
        ("http://exam\tple.com/", "characters"),
        ("http://exa mple.com/", "no host"),
        ("http://example..com/", "not a valid link"),
        ("http://[::1/", "not a valid link"),
        ("http://[fe80::1%25eth0]/", ""),
        ("http://example.com:22/", "port 22"),
        ("http://example.com:0/", "port 0"),
        ("http://example.com:99999/", "not a valid link"),
        ("http://example.com:x/", "not a valid link"),
        ("http://" + "a" * 300 + ".com/", "not a valid link"),
        ("http://ex%61mple.com/", "no host"),
    ],
)
def test_links_that_are_not_fetched(url: str, word: str) -> None:
    def never(host: str, port: int) -> list[str]:
        raise AssertionError(f"{host} was looked up")

    refused(url, word, policy=Policy(resolve=never))


def test_a_name_that_is_not_known() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    refused("http://nowhere.example/?secret", "not known", "'http://nowhere.example/'", policy=Policy(resolve=resolve))


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("http://127.0.0.2/", "not public"),
        ("http://169.254.169.254/latest/meta-data/?secret", "not public"),
        ("//2130706434/", "not public"),
        ("http://[::1]/", "not public"),
        ("http://inside.example/", "not public"),
        ("file:///etc/passwd", "'file'"),
        ("ftp://example.com/", "'ftp'"),
        ("data:image/png;base64,AAAA", "'data'"),
        ("http://user:secret@127.0.0.1/", "user name"),
        ("http://127.0.0.1:22/", "port 22"),
        ("http://[", "not a valid link"),
        ("/status/404", "404"),
    ],
)
def test_redirects_are_checked_anew(server: Server, location: str, word: str) -> None:
    server.location = location
    rules = policy(server)
    names = {"inside.example": ["10.0.0.1"], "pictures.example": ["127.0.0.1"]}
    rules = replace(rules, resolve=lambda host, port: names.get(host) or PUBLIC.resolve(host, port))
    refused(f"http://pictures.example:{server.port}/to", word, policy=rules)
    assert server.seen[0][0] == "/to"


def test_redirects_end(server: Server) -> None:
    refused(f"http://127.0.0.1:{server.port}/loop", "redirects", policy=policy(server))
    assert len(server.seen) == REDIRECTS + 1
    server.location = f"http://127.0.0.1:{server.port}/to"
    refused(f"http://127.0.0.1:{server.port}/to", "redirects", policy=policy(server))
    refused(f"http://127.0.0.1:{server.port}/hops/{REDIRECTS + 1}", "redirects", policy=policy(server))


# ---------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("status/404", "404 Not Found"),
        ("status/403", "403"),
        ("status/500", "500"),
        ("status/204", "204"),
        ("status/304", "304"),
        ("gzip", "gzip"),
        ("short", "broke off after 100 of 256,000"),
        ("shortchunk", "cannot be fetched"),
        ("announced", "larger than 64 MB"),
        ("nowhere", "without saying where"),
        ("nonsense", "cannot be fetched"),
        ("headers", "cannot be fetched"),
        ("nothing", "cannot be fetched"),
    ],
)
def test_answers_that_are_no_picture(server: Server, how: str, word: str) -> None:
    message = refused(f"http://127.0.0.1:{server.port}/{how}?token=secret", word, policy=policy(server))
    assert f"127.0.0.1:{server.port}/{how}'" in message


def test_a_length_that_cannot_be_is_not_believed(server: Server) -> None:
    assert fetch_picture(f"http://127.0.0.1:{server.port}/negative", field="i", policy=policy(server)) == CONTENT


@pytest.mark.parametrize("how", ["endless", "picture", "closing", "chunked"])
def test_bodies_over_the_limit(server: Server, how: str) -> None:
    refused(f"http://127.0.0.1:{server.port}/{how}", "larger", policy=policy(server), limit=len(CONTENT) - 1)


def test_a_body_of_just_the_limit(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}/closing"
    assert fetch_picture(url, field="image", policy=policy(server), limit=len(CONTENT)) == CONTENT


@pytest.mark.parametrize("how", ["drip", "dripping_headers", "continue", "silent"])
def test_slow_servers_meet_the_deadline(server: Server, how: str) -> None:
    began = time.monotonic()
    refused(f"http://127.0.0.1:{server.port}/{how}", "longer than 0.3 seconds", policy=policy(server), timeout=0.3)
    assert time.monotonic() - began < 1


def test_slow_names_meet_the_deadline() -> None:
    done = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        done.wait(5)
        return ["127.0.0.1"]

    began = time.monotonic()
    refused("http://slow.example/", "longer than", policy=Policy(resolve=resolve), timeout=0.2)
    assert time.monotonic() - began < 1
    done.set()


def test_the_deadline_is_one_for_all_redirects(server: Server) -> None:
    def resolve(host: str, port: int) -> list[str]:
        time.sleep(0.1)
        return ["127.0.0.1"]

    url = f"http://pictures.example:{server.port}/loop"
    refused(url, "longer than", policy=policy(server, resolve=resolve), timeout=0.25)


def test_closed_ports(server: Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        rules = policy(server, ports=frozenset({port}))
        refused(f"http://127.0.0.1:{port}/", "cannot be fetched", policy=rules)


def test_what_a_message_shows_of_a_link() -> None:
    assert shown(" https://u:p@host:8/a/b.png?X-Amz-Signature=1#f ") == "'https://host:8/a/b.png'"
    assert shown("https://u:p@x@host/a") == "'https://host/a'"
    assert len(shown("https://host/" + "a" * 5000)) < 110
    assert shown("mailto:someone?secret") == "'mailto:someone'"


# ---------------------------------------------------------------------------------------------------- https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of pictures.example, signed by itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=pictures.example",
         "-addext", "subjectAltName=DNS:pictures.example"],
        cwd=folder, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return folder / "both.pem"


@pytest.fixture
def secure(certificate: Path) -> Iterator[tuple[Server, Policy, list[str | None]]]:
    server, names = Server(), list[str | None]()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    trust = ssl.create_default_context(cafile=str(certificate.with_name("cert.pem")))
    with serving(server):
        yield server, policy(server, context=trust, resolve=lambda host, port: ["127.0.0.1"]), names


def test_https_goes_to_the_address_under_the_name(secure: tuple[Server, Policy, list[str | None]]) -> None:
    server, rules, names = secure
    url = f"https://Pictures.Example.:{server.port}/picture"
    assert fetch_picture(url, field="image", policy=rules) == CONTENT
    assert names == ["pictures.example"]
    assert server.seen[0][1]["Host"] == f"pictures.example.:{server.port}"


def test_certificates_are_checked(secure: tuple[Server, Policy, list[str | None]]) -> None:
    server, rules, _ = secure
    refused(f"https://other.example:{server.port}/picture", "certificate", policy=rules)
    refused(f"https://pictures.example:{server.port}/picture", "certificate", policy=replace(rules, context=None))
    assert server.seen == []


def test_https_never_leads_to_http(secure: tuple[Server, Policy, list[str | None]]) -> None:
    server, rules, _ = secure
    server.location = f"http://pictures.example:{server.port}/picture"
    refused(f"https://pictures.example:{server.port}/to", "https to http", policy=rules)
    server.location = f"https://pictures.example:{server.port}/picture"
    assert fetch_picture(f"https://pictures.example:{server.port}/to", field="image", policy=rules) == CONTENT


def test_a_slow_handshake_meets_the_deadline(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        rules = policy(server, ports=frozenset({port}))
        began = time.monotonic()
        refused(f"https://127.0.0.1:{port}/", "longer than", policy=rules, timeout=0.3)
        assert time.monotonic() - began < 1


def test_http_is_not_https(server: Server) -> None:
    refused(f"https://127.0.0.1:{server.port}/picture", "cannot be fetched", policy=policy(server))
