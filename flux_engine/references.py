"""What names LoRA weights, as requests do, and the local file that each leads to.

Understood are paths, data URIs, Hugging Face repositories and files, CivitAI model pages and download links, models on
Replicate, and addresses of a .safetensors or .tar: what Replicate's FLUX models take (github.com/replicate/cog-flux),
and nested files, revisions and versions besides. A reference is parsed without a look at the network. Its secrets, a
token or the query of a signed address, are in no description, no error and no file's name.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import logging
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

from flux_engine import downloads
from flux_engine.downloads import TAR, WEIGHTS, Answered, Fetched, Limits, Store, Terms, check_weights, unpack
from flux_engine.errors import InvalidRequest, WeightsError
from flux_engine.guarded import PUBLIC, Policy, Refuse, shown

log = logging.getLogger(__name__)

CIVITAI = "https://civitai.com"
REPLICATE = "https://replicate.com"
HUB = "https://huggingface.co"
ANSWER = 32 * 2**20
"""Most bytes of what CivitAI says of a model: its page has every version, picture and comment in it."""
LOCAL = "a path to a .safetensors or .tar; "
UNDERSTOOD = (
    "a name of a LoRA that `flux-engine models --all` lists; a data URI (data:...;base64,...) of one; OWNER/NAME; "
    "huggingface.co/OWNER/NAME[/FILE.safetensors]; civitai.com/models/ID[/NAME][?modelVersionId=N]; "
    "civitai.com/api/download/models/ID; replicate.com/OWNER/NAME[/versions/ID]; https://...(.safetensors or .tar)"
)
Kind = Literal["known", "path", "data", "huggingface", "civitai", "replicate", "link"]
Bare = Literal["huggingface", "replicate"]
"""Where OWNER/NAME is looked up."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_VERSION = r"[0-9a-f]{64}"
_TOKEN = re.compile(r"\b(hf_|r8_)\w{8,}")


@dataclass(frozen=True, repr=False)
class Secrets:
    """Tokens. Each goes, as `Authorization: Bearer`, to its own site and nowhere else; none is ever shown.

    Raises InvalidRequest for what cannot be a token, without saying it.
    """

    huggingface: str | None = None
    civitai: str | None = None
    replicate: str | None = None

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            token = (getattr(self, name) or "").strip()
            if not re.fullmatch(r"[\x21-\x7e]*", token):
                raise InvalidRequest(f"the {name} token holds characters that no token has: copy it again", field=name)
            object.__setattr__(self, name, token or None)

    def __repr__(self) -> str:
        said = (f"{name}={'set' if getattr(self, name) else None}" for name in self.__dataclass_fields__)
        return f"Secrets({', '.join(said)})"


@dataclass(frozen=True)
class Reference:
    """What was named, taken apart. Which fields are used depends on the kind."""

    kind: Kind
    name: str = ""
    """The path; OWNER/NAME; a name; of CivitAI the model's id, empty for a download link; of a data URI its type."""
    version: str | None = None
    """Revision on Hugging Face; version's id on CivitAI and Replicate; None for the newest."""
    file: str | None = None
    """The file in a Hugging Face repository; None for the only one."""
    address: str = field(default="", repr=False)
    """A link or download link with its query; of a data URI its body."""
    token: str | None = field(default=None, repr=False, compare=False)
    """What a CivitAI download link had as `token`; it is sent in a header instead."""

    @property
    def key(self) -> str:
        """SHA-256 of what is meant, 64 hexadecimal digits: the same however it was written, and without a token."""
        body = hashlib.sha256(self.address.encode("utf-8", "surrogatepass")).hexdigest() if self.address else ""
        meant = json.dumps([self.kind, self.name, self.version, self.file, body])
        return hashlib.sha256(meant.encode()).hexdigest()

    def describe(self) -> str:
        """What it means and which addresses would be asked, without anything secret."""
        match self.kind:
            case "known":
                return f"the LoRA {self.name} that `flux-engine models --all` lists"
            case "path":
                return f"the local file {self.name}"
            case "data":
                return f"a data URI of {len(self.address):,} characters"
            case "huggingface":
                what = self.file or "the only .safetensors file"
                return f"{what} of the Hugging Face repository {self.name} at {self.version or 'main'} ({HUB})"
            case "civitai" if self.address:
                return f"the CivitAI download of version {self.version} ({shown(self.address)[1:-1]})"
            case "civitai":
                return f"version {self.version or 'that is newest'} of the CivitAI model {self.name} ({_address(self)})"
            case "replicate":
                version = f" in version {self.version[:12]}..." if self.version else ""
                return f"the weights of the Replicate model {self.name}{version} ({_address(self)})"
            case _:
                return f"the file at {shown(self.address)[1:-1]}"


def parse_reference(
    text: str,
    *,
    bare: Bare = "huggingface",
    local: bool = True,
    field: str = "lora_weights",
) -> Reference:
    """What a text names. Nothing is fetched or written; whether a path exists is looked at, unless `local` is false,
    which is for texts that strangers send. `bare` is where OWNER/NAME is.

    Raises InvalidRequest for what is none of these, with a list of what is, WeightsError for a path to nothing.
    """
    if not isinstance(text, str):  # a caller's slip that Python lets pass
        raise InvalidRequest(f"{field} is a text or a path, not of the type {type(text).__name__}", field=field)
    refuse = functools.partial(_refused, text, field, local)
    text = text.strip()
    if text[:5].lower() == "data:":
        return _data(text, refuse)
    if not text or re.search(r"[\x00-\x1f\x7f\\]", text):
        raise refuse("is empty" if not text else "holds characters that no name has")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if not scheme:
        explicit = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
        if explicit and not local:
            raise refuse("is a path, which is not read here (local_files=True lets texts be paths)")
        if local and (found := _here(text, explicit)):
            return found
    host, _, rest = (text[scheme.end() :] if scheme else text).partition("/")
    host = host.lower().removeprefix("www.")
    if scheme and scheme[1].lower() not in ("http", "https"):
        raise refuse(f"is an address of the kind {scheme[1]!r}: https is fetched")
    if "@" in host:
        raise refuse("holds a user name or password: give a link without")
    path, _, query = rest.partition("#")[0].partition("?")
    if host in ("huggingface.co", "hf.co"):
        return _huggingface(path.strip("/"), refuse)
    if host == "civitai.com":
        return _civitai(path.strip("/"), query, refuse)
    if host == "replicate.com":
        if found := _replicate(path.strip("/")):
            return found
        raise refuse("is no model on Replicate: expected replicate.com/OWNER/NAME[/versions/ID of 64 digits]")
    if scheme or host == "replicate.delivery":
        return _link(f"{scheme[1].lower() if scheme else 'https'}://{host}/{rest}", refuse)
    return _bare(text, bare, refuse)


def _refused(text: str, field: str, local: bool, why: str) -> InvalidRequest:
    """The error about a text, of which it shows what is not secret."""
    named = re.sub(r"(^|//)[^/]*@", r"\1", re.sub(r"[?#].*", "", text.strip(), flags=re.DOTALL))
    named = repr(_TOKEN.sub(r"\1...", named if len(named) <= 120 else named[:80] + "..." + named[-30:]))
    named = f"(a data URI of {len(text):,} characters)" if text.strip()[:5].lower() == "data:" else named
    return InvalidRequest(f"{field} {named} {why}. Understood are: {LOCAL if local else ''}{UNDERSTOOD}", field=field)


def _here(text: str, explicit: bool) -> Reference | None:
    """The path, if it is one. Also a folder OWNER/NAME that lies here is meant before the one elsewhere."""
    with suppress(RuntimeError, OSError, ValueError):  # a user that does not exist; a name too long
        if (path := Path(text).expanduser()).exists():
            return Reference("path", str(path.absolute()))
    if explicit:
        raise WeightsError(f"{text} does not exist")


def _data(text: str, refuse: Refuse) -> Reference:
    head, comma, body = text[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise refuse("has no base64 content: write data:application/x-tar;base64,...")
    return Reference("data", head[:-7].lower()[:60], address=body)


def _huggingface(path: str, refuse: Refuse) -> Reference:
    pieces = [unquote(piece) for piece in path.split("/")]
    if len(pieces) < 2 or not all(re.fullmatch(_NAME, piece) for piece in pieces[:2]):
        raise refuse("names no Hugging Face repository: expected huggingface.co/OWNER/NAME[/FILE.safetensors]")
    if pieces[0] in ("datasets", "spaces", "api", "models", "collections"):
        raise refuse(f"is under {pieces[0]!r} on Hugging Face, and weights are in models")
    repository, inside = "/".join(pieces[:2]), pieces[2:]
    revision = None
    if len(inside) > 1 and inside[0] in ("resolve", "blob", "raw", "tree"):
        revision, inside = inside[1] if inside[1] != "main" else None, inside[2:]
    file = "/".join(inside)
    if {"..", ".", ""} & {*(revision or "main").split("/"), *(file or "file").split("/")}:
        raise refuse("leads out of the repository")
    if file and not file.lower().endswith(".safetensors"):
        raise refuse("names a file on Hugging Face that is not .safetensors, the only kind that is read")
    return Reference("huggingface", repository, revision, file or None)


def _civitai(path: str, query: str, refuse: Refuse) -> Reference:
    if found := re.fullmatch(r"models/([0-9]+)(?:/[^/]*)?", path):
        version = parse_qs(query).get("modelVersionId", [None])[-1]
        if version is not None and not re.fullmatch("[0-9]+", version):
            raise refuse("has a modelVersionId that is no number")
        return Reference("civitai", found[1], version)
    if found := re.fullmatch(r"api/download/models/([0-9]+)", path):
        asked = parse_qsl(query, keep_blank_values=True)
        token = next((value.strip() for name, value in asked if name.lower() == "token"), None)
        kept = urlencode([pair for pair in asked if pair[0].lower() != "token"], quote_via=quote)
        token = Secrets(civitai=token).civitai
        return Reference("civitai", version=found[1], address=f"{CIVITAI}/{path}{'?' * bool(kept)}{kept}", token=token)
    raise refuse("is no model on CivitAI: expected civitai.com/models/ID[/NAME] or civitai.com/api/download/models/ID")


def _replicate(path: str) -> Reference | None:
    path = path.removesuffix("/_weights")
    found = re.fullmatch(rf"({_NAME}/{_NAME})(?:(?:/versions/|/|:)({_VERSION}))?", path)
    return Reference("replicate", found[1], found[2]) if found else None


def _link(url: str, refuse: Refuse) -> Reference:
    url = url.partition("#")[0]
    try:
        parts = urlsplit(url)
    except ValueError:
        raise refuse("is not a valid address") from None
    if not parts.hostname or not parts.path.lower().endswith((".safetensors", ".tar")):
        raise refuse("is an address that does not end in .safetensors or .tar")
    return Reference("link", address=url)


def _bare(text: str, bare: str, refuse: Refuse) -> Reference:
    named = text.strip("/")
    pieces = named.split("/")
    if named.lower().endswith((".safetensors", ".tar")) and len(pieces) < 3:
        raise refuse("does not exist here; an address begins with https://")
    if len(pieces) > 2 and named.lower().endswith(".safetensors"):
        return _huggingface(named, refuse)
    found = _replicate(named)
    if found and (found.version or bare == "replicate"):
        return found
    if len(pieces) == 2 and found:
        return Reference("huggingface", named)
    raise refuse("is nothing that names weights")


def fetch_reference(
    reference: Reference,
    *,
    folder: Path,
    secrets: Secrets | None = None,
    offline: bool = False,
    limits: Limits | None = None,
    policy: Policy = PUBLIC,
    cancel: threading.Event | None = None,
    field: str = "lora_weights",
) -> Fetched:
    """The local safetensors file that a reference leads to, fetched if it is not there.

    What comes from Hugging Face lies in that library's cache, the rest under `folder`, which has one owner: what was
    fetched with one token is there for whoever uses the folder. A name without a version means what it meant when it
    was fetched. `offline` takes what is there. Raises WeightsError or UnknownModel for weights that cannot be had,
    InvalidRequest for an address that may not be reached, RequestCancelled once `cancel` is set.
    """
    limits, secrets = limits or Limits(), secrets or Secrets()
    terms = Terms(time.monotonic() + limits.seconds, limits, policy, cancel, field)
    terms.check()
    named, store = reference.describe(), Store(folder, limits)
    if reference.kind == "huggingface":
        where = reference.name, reference.file, reference.version or "main"
        return Fetched(downloads.from_hub(*where, secrets.huggingface, offline, limit=limits.bytes, named=named))
    if reference.kind == "path":
        return _from_path(reference, store, terms)
    if found := store.find(reference.key):
        return found
    if offline and reference.kind != "data":
        raise WeightsError(f"{named} is not in {folder}, and nothing is fetched offline: connect, or give a local file")
    log.info("fetching %s", named)

    def make(partial: Path) -> None:
        came = partial / "came"
        if reference.kind == "data":
            came.write_bytes(_decoded(reference, limits.bytes))
        else:
            _download(reference, came, secrets, terms)
        downloads.settle(came, partial, named=named, limit=limits.bytes)

    return store.obtain(reference.key, make, terms, named)


def _address(reference: Reference) -> str:
    """What is asked first: CivitAI's api for a page, the file itself for the rest."""
    if reference.kind == "replicate":
        version = f"/versions/{reference.version}" if reference.version else ""
        return f"{REPLICATE}/{reference.name}{version}/_weights"
    if reference.kind == "civitai" and not reference.address:
        what = f"model-versions/{reference.version}" if reference.version else f"models/{reference.name}"
        return f"{CIVITAI}/api/v1/{what}"
    return reference.address


def _download(reference: Reference, came: Path, secrets: Secrets, terms: Terms) -> None:
    """Write what the address leads to, checked against what CivitAI says of it."""
    named, url, sha256, about = reference.describe(), _address(reference), None, None
    site = {"civitai": CIVITAI, "replicate": REPLICATE}.get(reference.kind, "")
    token = reference.token or {"civitai": secrets.civitai, "replicate": secrets.replicate}.get(reference.kind)

    def ask(url: str, out: BinaryIO, limit: int) -> tuple[int, str]:
        at_home = bool(site) and downloads.origin(url) == downloads.origin(site)
        return downloads.download(url, out, terms, limit=limit, token=token if at_home else None)

    try:
        if reference.kind == "civitai" and not reference.address:
            answer = io.BytesIO()
            ask(url, answer, ANSWER)
            url, sha256, about = _file_on_civitai(answer.getvalue(), reference)
        with came.open("wb") as out:
            size, digest = ask(url, out, terms.limits.bytes)
    except Answered as error:
        raise WeightsError(f"{error}, asked for {named}: {_remedy(reference, error.status, token)}") from None
    if about is not None and abs(size - about * 1024) > 1024:
        raise WeightsError(f"{named} came with {size:,} bytes, not {about * 1024:,.0f}: try again")
    if sha256 is not None and sha256.lower() != digest:
        raise WeightsError(f"{named} came with SHA-256 {digest[:12]}..., not {sha256[:12].lower()}...: try again")


def _file_on_civitai(answer: bytes, reference: Reference) -> tuple[str, str | None, float | None]:
    """The SafeTensor file of a version, or of a model's newest, as CivitAI says: address, SHA-256, size in KiB."""
    named = reference.describe()
    try:
        said = json.loads(answer)
        if reference.version and str(said["modelId"]) != reference.name:
            raise WeightsError(f"{named}: that is a version of the model {said['modelId']}; correct the address")
        versions = [said] if reference.version else said["modelVersions"]
        files = max(versions, key=lambda version: version.get("publishedAt") or "")["files"]
        fitting = [file for file in files if (file.get("metadata") or {}).get("format") == "SafeTensor"]
        if not fitting:
            held = ", ".join(str(file["name"])[:80] for file in files[:4]) or "nothing"
            raise WeightsError(f"{named} has no SafeTensor file, only {held}: another kind is not read")
        file = min(fitting, key=lambda file: (not file.get("primary"), file.get("type") != "Model"))
        url, sha256, about = file["downloadUrl"], (file.get("hashes") or {}).get("SHA256"), file.get("sizeKB")
        if isinstance(url, str) and isinstance(sha256, str | None) and isinstance(about, float | int | None):
            return url, sha256, about
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise WeightsError(f"{named}: CivitAI answers with something else than a model; give a download link")


def _remedy(reference: Reference, status: int, token: str | None) -> str:
    kind, site = reference.kind, "CivitAI" if reference.kind == "civitai" else "Replicate"
    if status in (401, 403):
        if kind == "link":
            return "not everyone may read it, or the address was signed and has expired: ask for a new one"
        if token:
            return f"the {site} token is not accepted, or may not read this: correct it, or accept the licence there"
        return f"{site} asks for a token: give {kind}_api_token, or set {kind.upper()}_API_TOKEN"
    if status not in (404, 410):
        return "try again later"
    if kind == "civitai":
        return "the id on a download link is that of a version and can differ from the id on the model's page"
    on_hub = f"; if {reference.name} is on Hugging Face, write {HUB}/{reference.name}"
    return "no weights are there: check the address" + on_hub * (kind == "replicate")


def _decoded(reference: Reference, limit: int) -> bytes:
    if len(reference.address) * 3 / 4 > limit + 3:
        raise WeightsError(f"{reference.describe()} is larger than {limit:,} bytes, the most that is taken")
    try:
        return base64.b64decode(re.sub(r"\s+", "", unquote(reference.address)), validate=True)
    except ValueError:
        raise WeightsError(f"{reference.describe()} is not base64: it was cut or altered") from None


def _from_path(reference: Reference, store: Store, terms: Terms) -> Fetched:
    path = Path(reference.name)
    try:
        if path.is_dir():
            path /= downloads.only_one((file.name for file in path.iterdir()), f"the folder {path}")
        if not path.is_file():
            raise WeightsError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
        tar, state = downloads.is_tar(path), path.stat()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    if not tar:
        check_weights(path, str(path))
        return Fetched(path)
    key = hashlib.sha256(f"{reference.key} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()

    def make(partial: Path) -> None:
        if unpack(path, partial / WEIGHTS, named=str(path), limit=terms.limits.bytes):
            (partial / TAR).symlink_to(path)
        check_weights(partial / WEIGHTS, str(path))

    found = store.obtain(key, make, terms, str(path))
    return Fetched(found.weights, path if found.tar else None)
