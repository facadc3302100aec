"""Weights from public addresses into a folder that is bounded: downloads, what a tar holds, and the folder itself.

An address is connected to as guarded.py does for pictures: no address that is not public, every redirect checked. A
token goes to the host it was given for and to no other, also not where that host redirects to. What the folder keeps is
published by one rename, so that what is there is whole.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import logging
import os
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from flux_engine import guarded
from flux_engine.errors import InvalidRequest, RequestCancelled, WeightsError
from flux_engine.guarded import PIECE, PUBLIC, REDIRECTS, Policy, Refuse, shown

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger(__name__)

STALLED = 60.0
"""Seconds without a byte after which a server is given up."""
POLL = 0.1
"""Seconds between two looks at whether the caller has cancelled."""
WEIGHTS, TAR = "weights.safetensors", "weights.tar"
"""What an entry of the folder holds."""
PARTIAL = ".partial-"


@dataclass(frozen=True)
class Limits:
    """How much and how long, of one reference and of the folder."""

    bytes: int = 8 * 10**9
    """Most bytes of a file, and of the weights in a tar."""
    seconds: float = 3600.0
    """For one reference, waiting for another process included."""
    folder: int = 50 * 10**9
    """Bytes of the folder beyond which what was used longest ago is removed."""


@dataclass(frozen=True)
class Fetched:
    """What a reference led to."""

    weights: Path
    """A safetensors file."""
    tar: Path | None = None
    """The tar that it came in, where that holds learned tokens as well (text/inversion.py reads them)."""


@dataclass(frozen=True)
class Terms:
    """What holds for every request that one reference needs."""

    deadline: float
    """Of time.monotonic()."""
    limits: Limits
    policy: Policy = PUBLIC
    cancel: threading.Event | None = None
    field: str = "lora_weights"
    """The field of a request that an InvalidRequest names."""

    def check(self) -> None:
        """Raise RequestCancelled if the caller has cancelled."""
        if self.cancel is not None and self.cancel.is_set():
            raise RequestCancelled("cancelled while weights were fetched; nothing of them is kept")


class Answered(WeightsError):
    """A server answered with a status that is not 200."""

    def __init__(self, named: str, status: int) -> None:
        super().__init__(f"{named} answers {status} {http.client.responses.get(status, '')}".rstrip())
        self.status = status


class _Watched(guarded._Timed):
    """A connection's bytes, while the caller has not cancelled and the server is not silent for long."""

    def __init__(self, connection: socket.socket, terms: Terms) -> None:
        super().__init__(connection, terms.deadline)
        self.terms = terms

    def readinto(self, buffer: memoryview) -> int:
        silent = time.monotonic() + STALLED
        while True:
            self.terms.check()
            self.connection.settimeout(min(guarded._left(self.deadline), POLL))
            try:
                return self.connection.recv_into(buffer)
            except TimeoutError:
                if time.monotonic() > silent:
                    raise OSError(f"it sent nothing for {STALLED:g} seconds") from None


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port) of a link, as a token is bound to them."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").rstrip("."), parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def download(url: str, out: BinaryIO, terms: Terms, *, limit: int, token: str | None = None) -> tuple[int, str]:
    """Write what a link leads to into `out`: (bytes, SHA-256 as 64 hexadecimal digits).

    `token` is sent as `Authorization: Bearer` to the link's own scheme, host and port; after a redirect to another
    one, never again. Raises InvalidRequest for a link that may not be followed, Answered for a status that is not 200,
    RequestCancelled, and WeightsError for whatever else stands in the way.
    """
    first, what = url, f"the weights at {shown(url)}"
    for _ in range(REDIRECTS + 1):
        refuse = functools.partial(guarded._refused, terms.field, shown(url))
        token = token if origin(url) == origin(first) else None
        try:
            terms.check()
            answer = _ask(guarded._target(url, terms.policy, refuse), out, terms, limit, token, refuse)
        except (InvalidRequest, WeightsError, RequestCancelled):
            raise
        except TimeoutError:
            raise WeightsError(f"{what} took longer than the time that was given: try again, or allow more") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            if isinstance(error, socket.gaierror):
                why = f"the host {urlsplit(url).hostname} is not known, or there is no network"
            raise WeightsError(f"{what} cannot be fetched: {why}. Try again") from None
        if isinstance(answer, tuple):
            return answer
        url = guarded._next(url, answer, refuse)
    raise WeightsError(f"{what} cannot be fetched: more than {REDIRECTS} redirects lead on; give the last address")


def _ask(
    target: guarded._Target, out: BinaryIO, terms: Terms, limit: int, token: str | None, refuse: Refuse
) -> tuple[int, str] | str:
    """The body's size and SHA-256, or where a redirect leads."""
    permit = f"Authorization: Bearer {token}\r\n" if token else ""
    named = shown(f"{'https' if target.secure else 'http'}://{target.host_header}{target.path}")
    begin = min(terms.deadline, time.monotonic() + STALLED)
    with closing(guarded._connect(target, begin, terms.policy, refuse)) as connection:
        connection.settimeout(guarded._left(begin))
        connection.sendall(
            f"GET {target.path} HTTP/1.1\r\nHost: {target.host_header}\r\nUser-Agent: flux-engine\r\nAccept: */*\r\n"
            f"{permit}Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        watched = _Watched(connection, terms)
        with http.client.HTTPResponse(watched, method="GET") as response:  # pyright: ignore[reportArgumentType]
            response.begin()
            if response.status in (301, 302, 303, 307, 308):
                location = response.getheader("Location")
                if not location:
                    raise Answered(named, response.status)
                return location.encode("latin-1").decode("utf-8", "replace").strip()
            if response.status != 200:
                raise Answered(named, response.status)
            if response.getheader("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
                raise WeightsError(f"{named} comes compressed, although that was not asked for")
            return _copied(response, out, terms, limit, named)


def _copied(response: http.client.HTTPResponse, out: BinaryIO, terms: Terms, limit: int, named: str) -> tuple[int, str]:
    too_large = f"{named} is larger than {limit:,} bytes, the most that is fetched"
    announced = response.length
    if announced is not None and announced > limit:
        raise WeightsError(too_large)
    size, digest = 0, hashlib.sha256()
    while piece := response.read1(PIECE):
        terms.check()
        guarded._left(terms.deadline)
        size += len(piece)
        if size > limit:
            raise WeightsError(too_large)
        digest.update(piece)
        try:
            out.write(piece)
        except OSError as error:
            raise no_room(named, error) from None
    if announced is not None and size < announced:
        raise WeightsError(f"{named} broke off after {size:,} of {announced:,} bytes: try again")
    return size, digest.hexdigest()


def no_room(named: str, error: OSError) -> WeightsError:
    """What to say where a file cannot be written."""
    return WeightsError(f"{named} cannot be kept: {error.strerror or error}. Free some room, or choose another folder")


def is_tar(path: Path) -> bool:
    """Whether a file is a tar that is not compressed."""
    with path.open("rb") as file:
        begin = file.read(512)
    return begin[257:262] == b"ustar" or begin == bytes(512)  # with nothing in it


def unpack(path: Path, out: Path, *, named: str, limit: int) -> bool:
    """The one .safetensors file in a tar -> `out`; whether learned tokens lie beside it.

    No name in the tar decides where anything is written. Raises WeightsError naming `named` for none or several, for
    links, devices, sparse files and names that lead out of it, for more than `limit` bytes, and for a tar with no end.
    """
    from flux_engine.text.inversion import EMBEDDINGS, MAX_MEMBERS, _Bounded

    found: list[str] = []
    tokens = False
    count = 0
    try:
        with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                inside, said = PurePosixPath(member.name), f"{named}: its member {member.name[:80]!r}"
                if inside.is_absolute() or ".." in inside.parts:
                    raise WeightsError(f"{said} leads out of it")
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise WeightsError(f"{said} is a link, a device or a sparse file")
                count += 1
                if count > MAX_MEMBERS:  # also where a negative size leads back to what was read before
                    raise WeightsError(f"{named} has more than {MAX_MEMBERS:,} members")
                if not member.isreg() or inside.name.startswith("._"):  # what macOS adds beside each file
                    continue
                tokens = tokens or inside.name == EMBEDDINGS
                if inside.suffix.lower() != ".safetensors":
                    continue
                found.append(member.name[:80])
                if len(found) > 1:
                    raise WeightsError(
                        f"Multiple .safetensors files found in {named}: {found[0]!r} and {found[1]!r}; pack one"
                    )
                if not 0 <= member.size <= limit:
                    raise WeightsError(f"{said} has {member.size:,} bytes; {limit:,} at most are taken")
                content = tar.extractfile(member)
                assert content is not None
                with content, out.open("xb") as copy:
                    shutil.copyfileobj(content, copy, 2**20)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end")
    except OSError as error:
        raise no_room(named, error) from None
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise WeightsError(f"{named} is not a whole tar: {str(error)[:80]}") from None
    if not found:
        raise WeightsError(f"No .safetensors file found in {named}: pack the LoRA as one such file")
    return tokens


def settle(came: Path, folder: Path, *, named: str, limit: int) -> None:
    """What came, a safetensors file or a tar -> the files of an entry. Raises WeightsError for anything else."""
    weights = folder / WEIGHTS
    if is_tar(came):
        if unpack(came, weights, named=named, limit=limit):
            came.rename(folder / TAR)
        else:
            came.unlink()
    else:
        with came.open("rb") as file:
            begin = file.read(64).lstrip().lower()
        if begin.startswith((b"<!doctype", b"<html")):
            raise WeightsError(f"{named} leads to a web page and not to weights: it may ask to log in; give a token")
        if begin.startswith((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"\x28\xb5\x2f\xfd")):
            raise WeightsError(f"{named} is compressed: give a .safetensors, or a tar that is not compressed")
        came.rename(weights)
    check_weights(weights, named)


def check_weights(weights: Path, named: str) -> None:
    """Raise WeightsError, naming `named`, unless a file is a whole safetensors file by its header."""
    from flux_engine.checkpoints.safetensors_file import SafetensorsFile

    try:
        SafetensorsFile(weights).close()
    except WeightsError as error:
        raise WeightsError(str(error).replace(str(weights), named)) from None


def only_one(names: Iterable[str], where: str) -> str:
    """The one name that ends in .safetensors. Raises WeightsError for none and for several, with their names."""
    found = sorted(name for name in names if name.lower().endswith(".safetensors"))
    if not found:
        raise WeightsError(f"No .safetensors file found in {where}: weights of another kind are not read")
    if len(found) > 1:
        more = ", ..." if len(found) > 8 else ""
        raise WeightsError(f"Multiple .safetensors files found in {where}: name one of {', '.join(found[:8])}{more}")
    return found[0]


def from_hub(
    repository: str, file: str | None, revision: str, token: str | None, offline: bool, *, limit: int, named: str
) -> Path:
    """A file of a Hugging Face repository, or its only one, through the hub's own library and cache; where there is no
    `token`, with the library's own. Raises WeightsError or UnknownModel."""
    from huggingface_hub import HfApi, errors, hf_hub_download

    from flux_engine.fetch import _said, listing

    where = f"the Hugging Face repository {repository}"
    if file is None and (token is None or offline):
        file = only_one(listing(repository, revision=revision, offline=offline), where)
    elif file is None:
        with _said(repository, "the list of files", revision, offline):
            names = HfApi(token=token).list_repo_files(repository, revision=revision)
        file = only_one(names, where)
    with _said(repository, file, revision, offline):
        ask: Callable[..., Any] = hf_hub_download
        if not offline:
            told = ask(repository, file, revision=revision, token=token, dry_run=True)
            if told.will_download and (told.file_size or 0) > limit:
                raise WeightsError(f"{named} has {told.file_size:,} bytes; {limit:,} are fetched")
        path = Path(ask(repository, file, revision=revision, token=token, local_files_only=offline))
        if file.endswith("adapter_model.safetensors"):  # PEFT's, whose alpha is in a file beside it
            with suppress(errors.EntryNotFoundError if offline else errors.RemoteEntryNotFoundError):
                ask(repository, f"{file[:-17]}config.json", revision=revision, token=token, local_files_only=offline)
    check_weights(path, named)
    return path


class Store:
    """A folder of entries, one folder KEY/ each; the time of an entry's folder is when it was last used.

    A lock in locks/ lets one process at a time make an entry or remove it. What a killed process left is never read,
    and goes at the next look at the folder's size.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.limits = limits

    def find(self, key: str) -> Fetched | None:
        """The entry, marked as used now; None if there is none."""
        entry = self.folder / key
        if not (entry / WEIGHTS).is_file():
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(entry)
        return Fetched(entry / WEIGHTS, entry / TAR if (entry / TAR).is_file() else None)

    def obtain(self, key: str, make: Callable[[Path], None], terms: Terms, named: str) -> Fetched:
        """The entry; if it is not there, `make` fills an empty folder with it. Then the folder is kept within bounds.

        Raises WeightsError if the folder cannot be written or another process takes too long, RequestCancelled, and
        what `make` raises; nothing is left of an entry that could not be made.
        """
        from filelock import Timeout

        if found := self.find(key):
            return found
        partial = self.folder / (PARTIAL + key)
        try:
            with self._lock(key).acquire(
                timeout=max(0.0, terms.deadline - time.monotonic()),
                cancel_check=terms.cancel.is_set if terms.cancel else None,
            ):
                if found := self.find(key):
                    return found
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    make(partial)
                    for path in partial.iterdir():
                        with path.open("rb") as file:
                            os.fsync(file.fileno())
                    terms.check()
                    partial.rename(self.folder / key)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        except Timeout:
            terms.check()
            raise WeightsError(f"another process has been fetching {named} for too long: try again") from None
        except OSError as error:
            raise no_room(named, error) from None
        self.evict(keep=key)
        made = self.find(key)
        if made is None:
            raise WeightsError(f"{named} was removed from {self.folder} at once: let no other program clear it")
        return made

    def evict(self, *, keep: str = "") -> None:
        """Remove what was used longest ago until the folder is within its bound, but not `keep`, and nothing locked."""
        from filelock import Timeout

        entries: list[tuple[int, str, int]] = []
        for path in self.folder.iterdir():
            if path.is_dir() and path.name != "locks":
                with suppress(FileNotFoundError):
                    size = sum(file.stat().st_size for file in path.iterdir())
                    entries.append((path.stat().st_mtime_ns, path.name, size))
        total = sum(size for _, _, size in entries)
        for used, name, size in sorted(entries):
            left_over = name.startswith(PARTIAL)
            key = name.removeprefix(PARTIAL)
            if not left_over and (total <= self.limits.folder or key == keep):
                continue
            with suppress(Timeout, OSError), self._lock(key).acquire(timeout=0):
                entry, away = self.folder / name, self.folder / (PARTIAL + key)
                if entry.stat().st_mtime_ns != used and not left_over:
                    continue  # used again in the meantime
                if not left_over:
                    shutil.rmtree(away, ignore_errors=True)
                    entry.rename(away)
                    log.info("removed weights of %d bytes, which were used longest ago", size)
                shutil.rmtree(away, ignore_errors=True)
                total -= size

    def _lock(self, key: str) -> BaseFileLock:
        from filelock import FileLock

        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / "locks" / f"{key}.lock", thread_local=False)
