"""Signing pictures with C2PA: whoever opens one can read that a model made it, and who says so.

Source: the C2PA specification, by the package c2pa-python; the certificate is the user's.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flux_engine.errors import OutputError, UnsupportedError
from flux_engine.files import ImageFormat

INSTALL = "pip install 'flux-engine[c2pa]'"
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's name for where such a picture comes from."""
TYPES: Mapping[ImageFormat, str] = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True)
class Signer:
    """What pictures are signed with."""

    certificates: str | os.PathLike[str]
    """A PEM file: the signer's certificate first, then those that vouch for it."""
    key: str | os.PathLike[str]
    """A PEM file with its private key, PKCS #8."""
    algorithm: str = "es256"
    """The key's: es256, es384, es512, ps256, ps384, ps512 or ed25519."""
    time_authority: str | None = None
    """The address of a time-stamping authority, which is asked for every picture; None leaves the time out."""


def signed(content: bytes, format: ImageFormat, signer: Signer, *, title: str = "") -> bytes:
    """A picture's file content with a manifest that says a model made it.

    Raises UnsupportedError without the package, OutputError for files that cannot be read or used.
    """
    try:
        import c2pa
    except ImportError as error:
        raise UnsupportedError(
            f"signing with C2PA needs a package that is not installed ({error}): {INSTALL}"
        ) from None
    certificates, key = _read(signer.certificates), _read(signer.key)
    out = io.BytesIO()
    try:
        info = c2pa.C2paSignerInfo(signer.algorithm, certificates, key, signer.time_authority)
        with c2pa.Signer.from_info(info) as ready, c2pa.Builder(json.dumps(_manifest(title))) as builder:
            builder.sign(ready, TYPES[format], io.BytesIO(content), out)
    except (c2pa.C2paError, ValueError, TypeError) as error:
        # Never what the files hold: one of them is a secret.
        raise OutputError(f"the picture cannot be signed with {signer.certificates}: {error}") from None
    return out.getvalue()


def _manifest(title: str) -> dict[str, Any]:
    from flux_engine import __version__

    agent = {"name": "flux-engine", "version": __version__}
    created = {"action": "c2pa.created", "digitalSourceType": MADE_BY_A_MODEL, "softwareAgent": agent}
    return {
        "title": title,
        "claim_generator_info": [agent],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read, and nothing is signed without it: {error}") from None
