"""Pictures signed with C2PA, read back with a certificate that is made here."""

from __future__ import annotations

import datetime
import io
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from flux_engine import OutputError, Predictor, UnsupportedError
from flux_engine.engine import Engine
from flux_engine.files import ImageFormat
from flux_engine.images import encode, read_parameters
from flux_engine.provenance import TYPES, Signer, signed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import c2pa
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PHOTO = Path(__file__).parent / "data" / "grace_hopper.jpg"


def named(name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def certificate(name: str, key: Any, issuer: str, issuing: Any, *, ca: bool) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)
    made = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing.public_key()), critical=False)
    )
    if not ca:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return made.sign(issuing, hashes.SHA256())


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    folder = tmp_path_factory.mktemp("keys")
    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    chain = [certificate("signer", own, "root", root, ca=False), certificate("root", root, "root", root, ca=True)]
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(b"".join(one.public_bytes(pem) for one in chain))
    key = own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key)
    return Signer(folder / "chain.pem", folder / "key.pem")


def manifest_of(content: bytes, kind: ImageFormat) -> tuple[dict[str, Any], list[str]]:
    """What a reader finds, and what it has to say against it but that it does not know who signed."""
    with c2pa.Reader(TYPES[kind], io.BytesIO(content)) as reader:
        found = json.loads(reader.json())
    wrong = [one["code"] for one in found.get("validation_status", ())]
    return found["manifests"][found["active_manifest"]], [one for one in wrong if one != "signingCredential.untrusted"]


@pytest.mark.parametrize("kind", list(TYPES))
def test_a_signed_picture(signer: Signer, kind: ImageFormat) -> None:
    picture = Image.open(PHOTO).convert("RGB")
    content = encode(picture, kind, parameters="a photo")
    out = signed(content, kind, signer, title="out-0")
    manifest, wrong = manifest_of(out, kind)
    assert wrong == []
    (action,) = [
        action
        for one in manifest["assertions"]
        if one["label"].startswith("c2pa.actions")
        for action in one["data"]["actions"]
    ]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert manifest["title"] == "out-0" and manifest["claim_generator_info"][0]["name"] == "flux-engine"
    before, after = (Image.open(io.BytesIO(one)).convert("RGB") for one in (content, out))
    assert ImageChops.difference(before, after).getbbox() is None  # no pixel is another
    altered = bytearray(out)
    altered[len(altered) // 2] ^= 1
    assert manifest_of(bytes(altered), kind)[1]  # the control


def test_saving_a_result(engine: Engine, signer: Signer, tmp_path: Path) -> None:
    result = engine("a red circle", width=128, height=128, num_inference_steps=1, seed=0)
    path = result.save(tmp_path / "a.png", c2pa=signer)
    manifest, wrong = manifest_of(path.read_bytes(), "png")
    assert (manifest["title"], wrong) == ("a.png", [])
    assert (read_parameters(path) or "").startswith("a red circle")
    with pytest.raises(c2pa.C2paError):
        manifest_of(result.save(tmp_path / "b.png").read_bytes(), "png")


def test_a_predictor_signs(signer: Signer, tmp_path: Path) -> None:
    predictor = Predictor(
        "flux-schnell", model="demo-schnell", device="cpu", c2pa=signer, output_dir=tmp_path, say=lambda _: None
    )
    paths = predictor.predict(prompt="a red circle", num_inference_steps=1)
    assert isinstance(paths, list)
    assert manifest_of(paths[0].read_bytes(), "webp")[1] == []


def test_what_cannot_sign(signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(Image.open(PHOTO).convert("RGB"), "png")
    (tmp_path / "no.pem").write_text("-----BEGIN NOTHING-----")
    secret = Path(signer.key).read_text().splitlines()[1]
    for wrong in (
        replace(signer, certificates=tmp_path / "missing.pem"),
        replace(signer, certificates=tmp_path / "no.pem"),
        replace(signer, key=tmp_path / "no.pem"),
        replace(signer, algorithm="rot13"),
        replace(signer, key=signer.certificates, certificates=signer.key),
    ):
        with pytest.raises(OutputError) as caught:
            signed(content, "png", wrong)
        assert secret not in str(caught.value)
    with pytest.raises(OutputError):
        signed(b"no picture", "png", signer)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'flux-engine\[c2pa\]'"):
        signed(content, "png", signer)
