"""Pictures from links that strangers send: fetched without reaching what is not public.

The host is resolved once, every address it has must be public, and the connection goes to a verified address itself, so
a name cannot answer differently a second time. Each redirect is checked anew. One deadline holds over everything, one
limit over the body, whatever the server announces. Proxies of the environment are not used. A link's query and its
user name stay out of every message: they are secrets.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from flux_engine.errors import InvalidRequest

LIMIT = 64 * 2**20
"""Most bytes of a body."""
TIMEOUT = 20.0
"""Seconds for everything: names, redirects, headers and body."""
REDIRECTS = 5
PIECE = 64 * 1024

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # a cloud's own service to its machines
        "192.0.0.0/24",
        "192.88.99.0/24",
        "64:ff9b:1::/48",  # translated into networks of the operator's choice
        "2001::/23",  # tunnels, and what else is for protocols
    )
)
"""Refused although the standard library calls some of them global."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Refuse = Callable[[str], InvalidRequest]


def _resolve(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class Policy:
    """What may be reached. The default is what is safe where strangers send the links."""

    ports: frozenset[int] = frozenset({80, 443})
    networks: tuple[Network, ...] = ()
    """Networks that may be reached although they are not public."""
    resolve: Callable[[str, int], Sequence[str]] = _resolve
    """All addresses of a host."""
    context: ssl.SSLContext | None = None
    """Whom to trust over https. Default: what the system trusts."""

    def allows(self, address: str) -> bool:
        """Whether an address is public, or in `networks`."""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self.networks) or is_public(ip)


PUBLIC = Policy()


def is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether anyone may reach it. An IPv6 address that stands for an IPv4 address is as public as that."""
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if ip.is_site_local:
            return False
    special = ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast
    special = special or ip.is_reserved or ip.is_unspecified or any(ip in network for network in REFUSED)
    return ip.is_global and not special


def shown(url: str) -> str:
    """A link as a message may show it: without user, query and fragment, and not long."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#]*@)?([^?#]*)", url.strip())
    text = "".join(match.groups()) if match else url.partition("?")[0]
    return repr(text if len(text) <= 100 else text[:60] + "..." + text[-30:])


def fetch_picture(
    url: str, *, field: str, timeout: float = TIMEOUT, limit: int = LIMIT, policy: Policy = PUBLIC
) -> bytes:
    """What an http(s) link leads to. Raises InvalidRequest for whatever stands in the way."""
    deadline = time.monotonic() + timeout
    for _ in range(REDIRECTS + 1):
        refuse = functools.partial(_refused, field, shown(url))
        try:
            target = _target(url, policy, refuse)
            answer = _ask(target, deadline, limit, policy, refuse)
        except InvalidRequest:
            raise
        except TimeoutError:
            raise refuse(f"took longer than {timeout:g} seconds: send the file itself") from None
        except ssl.SSLCertVerificationError as error:
            raise refuse(f"has no valid certificate: {error.verify_message}") from None
        except socket.gaierror:
            raise refuse("leads nowhere: its host is not known") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            raise refuse(f"cannot be fetched: {why}") from None
        if isinstance(answer, bytes):
            return answer
        url = _next(url, answer, refuse)
    raise InvalidRequest(
        f"{field} {shown(url)} is where more than {REDIRECTS} redirects lead: give the last address", field=field
    )


def _next(url: str, location: str, refuse: Refuse) -> str:
    """Where a redirect leads, not yet checked but for one thing."""
    try:
        following = urljoin(url, location)
        downwards = urlsplit(url).scheme == "https" and urlsplit(following).scheme == "http"
    except ValueError:
        raise refuse("leads to what is not a valid link") from None
    if downwards:
        raise refuse("leads from https to http, which is not followed: give the last address")
    return following


def _refused(field: str, named: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {named} {why}", field=field)


@dataclass(frozen=True)
class _Target:
    """A link taken apart, all of it ASCII."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def _target(url: str, policy: Policy, refuse: Refuse) -> _Target:
    if re.search(r"[\x00-\x1f\x7f\\]", url):
        raise refuse("holds characters that no link has")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        ascii_host = host if ":" in host else host.encode("idna").decode()
    except ValueError:
        raise refuse("is not a valid link") from None
    if parts.scheme not in ("http", "https"):
        raise refuse(f"is a link of the kind {parts.scheme!r}: http and https are fetched")
    if "@" in parts.netloc:
        raise refuse("holds a user name or password: give a link without, or send the file itself")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", ascii_host):
        raise refuse("is not a valid link: it names no host")
    secure = parts.scheme == "https"
    port = (443 if secure else 80) if port is None else port
    if port not in policy.ports:
        raise refuse(f"asks for port {port}: only {', '.join(map(str, sorted(policy.ports)))} may be reached")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?[]|")
    return _Target(secure, ascii_host, port, path)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _addresses(target: _Target, deadline: float, policy: Policy, refuse: Refuse) -> list[str]:
    """All addresses of the host, every one of them allowed."""
    found: list[Sequence[str] | Exception] = []

    def look() -> None:
        try:
            found.append(policy.resolve(target.host, target.port))
        except Exception as error:  # noqa: BLE001  raised below, in the caller's thread
            found.append(error)

    thread = threading.Thread(target=look, daemon=True)  # looking up a name takes no time limit
    thread.start()
    thread.join(_left(deadline))
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise found[0]
    addresses = list(dict.fromkeys(found[0]))
    if not addresses or not all(policy.allows(address) for address in addresses):
        raise refuse("leads to an address that is not public: send the file itself")
    return addresses


def _connect(target: _Target, deadline: float, policy: Policy, refuse: Refuse) -> socket.socket:
    """A connection to a verified address; the name is used for the certificate only."""
    addresses = _addresses(target, deadline, policy, refuse)
    plain = _first_that_answers(addresses, target.port, deadline)
    if not target.secure:
        return plain
    try:
        plain.settimeout(_left(deadline))
        context = policy.context or ssl.create_default_context()
        return context.wrap_socket(plain, server_hostname=target.host.rstrip("."))
    except BaseException:
        plain.close()
        raise


def _first_that_answers(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Each but the last waits for its share of the time that is left."""
    for index, address in enumerate(addresses[:-1]):
        try:
            return socket.create_connection((address, port), timeout=_left(deadline) / (len(addresses) - index))
        except OSError:
            _left(deadline)
    return socket.create_connection((addresses[-1], port), timeout=_left(deadline))


class _Timed(io.RawIOBase):
    """A connection's bytes, until the deadline: http.client alone would wait anew for every piece."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        super().__init__()
        self.connection = connection
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.connection.settimeout(_left(self.deadline))
        return self.connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)


def _ask(target: _Target, deadline: float, limit: int, policy: Policy, refuse: Refuse) -> bytes | str:
    """The body, or where a redirect leads."""
    with closing(_connect(target, deadline, policy, refuse)) as connection:
        connection.settimeout(_left(deadline))
        connection.sendall(
            f"GET {target.path} HTTP/1.1\r\nHost: {target.host_header}\r\nUser-Agent: flux-engine\r\n"
            "Accept: image/*, */*;q=0.1\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        timed = _Timed(connection, deadline)
        with http.client.HTTPResponse(timed, method="GET") as response:  # pyright: ignore[reportArgumentType]
            response.begin()
            if response.status in (301, 302, 303, 307, 308):
                location = response.getheader("Location")
                if not location:
                    raise refuse(f"answers {response.status} without saying where to")
                return location.encode("latin-1").decode("utf-8", "replace").strip()
            if response.status != 200:
                raise refuse(f"answers {response.status} {response.reason[:60]}".rstrip())
            encoding = response.getheader("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise refuse(f"comes compressed ({encoding[:20]}), although that was not asked for")
            return _body(response, limit, refuse)


def _body(response: http.client.HTTPResponse, limit: int, refuse: Refuse) -> bytes:
    too_large = f"is larger than {limit / 2**20:,.3g} MB, the most that is read"
    announced = response.length
    if announced is not None and announced > limit:
        raise refuse(too_large)
    body = bytearray()
    while piece := response.read(PIECE):
        body += piece
        if len(body) > limit:
            raise refuse(too_large)
    if announced is not None and len(body) < announced:
        raise refuse(f"broke off after {len(body):,} of {announced:,} bytes: try again")
    return bytes(body)
