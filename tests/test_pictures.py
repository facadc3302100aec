"""Pictures as users send them: what is read, what is refused, and the sizes they are brought to."""

from __future__ import annotations

import base64
import io
import random
import struct
import subprocess
import sys
import urllib.parse
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin

import flux_engine.guarded
from flux_engine.errors import InvalidRequest
from flux_engine.pictures import (
    FORMATS,
    KONTEXT_SIZES,
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    RESIZES,
    SDXL_BUCKETS,
    alpha_mask,
    fit,
    flatten,
    nearest_aspect,
    of_area,
    place,
    read_mask,
    read_picture,
    reading,
    within,
)


def scene(size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Red upper left, green upper right, blue below: every turn of it is another picture."""
    image = Image.new("RGB", size, (20, 40, 220))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, size[0] // 2 - 1, size[1] // 2 - 1), fill=(230, 20, 30))
    draw.rectangle((size[0] // 2, 0, size[0], size[1] // 2 - 1), fill=(20, 200, 30))
    return image


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    best = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}
    best["AVIF"] = {"quality": 95, "subsampling": "4:4:4"}
    options = best.get(format, {}) | options
    image.save(buffer, format, **options)
    return buffer.getvalue()


def array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(image).astype(np.int32)


def same(a: Image.Image, b: Image.Image, tolerance: int = 0) -> bool:
    return a.mode == b.mode and a.size == b.size and abs(array(a) - array(b)).max() <= tolerance


def refused(value: object, *words: str, urls: bool = False) -> str:
    """The message, which names the field and stays short."""
    with pytest.raises(InvalidRequest) as caught:
        read_picture(value, "control_image", urls=urls)
    message = str(caught.value)
    assert caught.value.field == "control_image"
    assert message.startswith("control_image ")
    assert len(message) < 450
    for word in words:
        assert word in message, message
    return message


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, with other chunks before a little data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


# ---------------------------------------------------------------------------------------------------- ways to send


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read(format: str) -> None:
    image = read_picture(encoded(scene(), format), "image")
    assert same(image, scene(), 8 if format in ("JPEG", "AVIF") else 0)
    assert type(image) is Image.Image
    assert image.info == {}


@pytest.mark.parametrize(
    "way",
    ["str", "path", "bytes", "bytearray", "memoryview", "strided", "file", "stream", "pil", "array", "data", "percent",
     "base64", "urlsafe", "wrapped", "unpadded", "upper"],
)  # fmt: skip
def test_every_way_to_send_is_read(way: str, tmp_path: Path) -> None:
    sent = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    content = encoded(sent)
    assert {b"-", b"_"} <= {bytes([b]) for b in base64.urlsafe_b64encode(content)}, "the control of urlsafe"
    path = tmp_path / "a picture.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()

    class Stream:
        """Has no tell and no seek, and gives little at a time."""

        def __init__(self) -> None:
            self.left = content

        def read(self, count: int) -> bytes:
            piece, self.left = self.left[: min(count, 7)], self.left[min(count, 7) :]
            return piece

    values: dict[str, object] = {
        "str": str(path),
        "path": path,
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "strided": memoryview(bytes(b for byte in content for b in (byte, 0)))[::2],
        "file": io.BytesIO(content),
        "stream": Stream(),
        "pil": sent,
        "array": np.asarray(sent),
        "data": f"data:image/png;base64,{text}",
        "percent": "data:image/png," + urllib.parse.quote_from_bytes(content),
        "base64": text,
        "urlsafe": base64.urlsafe_b64encode(content).decode(),
        "wrapped": base64.encodebytes(content).decode(),
        "unpadded": text.rstrip("="),
        "upper": f"  DATA:application/octet-stream;BASE64,{urllib.parse.quote(text, safe='')}\n",
    }
    assert same(read_picture(values[way], "image"), sent)


def test_an_open_file_is_read_whole_and_left_where_it_stood() -> None:
    file = io.BytesIO()
    scene().save(file, "PNG")
    for stood in (file.tell(), 5):
        file.seek(stood)
        assert same(read_picture(file, "image"), scene())
        assert file.tell() == stood


def test_a_path_wins_over_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "A" * 80
    Path(name).write_bytes(encoded(scene()))
    assert same(read_picture(name, "image"), scene())
    Path(name).unlink()
    refused(name, "neither a file that is there nor a picture in base64")


def test_links_are_fetched_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, int]] = []

    def fetch(url: str, *, field: str, limit: int) -> bytes:
        asked.append((url, field, limit))
        return content

    monkeypatch.setattr(flux_engine.guarded, "fetch_picture", fetch)
    content = encoded(scene())
    refused("https://host/a.png?token=secret", "allow_urls=True", "'https://host/a.png'")
    assert asked == []
    assert same(read_picture(" https://host/a.png?token=1\n", "image", urls=True), scene())
    assert asked == [("https://host/a.png?token=1", "image", MAX_BYTES)]
    content = png_of(60_000, 60_000)
    assert "secret" not in refused("https://u:secret@host/a.png?token=secret", "too large", urls=True)
    content = b"<!DOCTYPE html><html>not found</html>"
    refused("https://host/a.png", "web page", urls=True)


@pytest.mark.parametrize("link", ["file:///etc/passwd", "s3://bucket/key.png", "ftp://host/a.png", "gopher://h/x"])
@pytest.mark.parametrize("urls", [False, True])
def test_other_links_are_refused_by_name(link: str, urls: bool) -> None:
    refused(link, link.partition(":")[0] + "://", urls=urls)


# ---------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("dtype", "top"),
    [("uint8", 255), ("uint16", 65535), (">u2", 65535), ("float16", 1), ("float32", 1), ("float64", 1)],
)
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_arrays(dtype: str, top: int, channels: int) -> None:
    steps = np.linspace(0, 1, 5 * 7 * max(channels, 1)).reshape((5, 7, channels) if channels else (5, 7))
    numbers = (steps * top).astype(dtype)
    image = read_picture(numbers, "image")
    assert image.mode == ("RGBA" if channels == 4 else "RGB")
    wanted = np.rint(numbers.astype(np.float64) * 255 / top)
    got = array(image)
    if channels < 2:
        assert (got[..., 0] == got[..., 1]).all()
        got, wanted = got[..., 0], wanted.reshape(5, 7)
    assert abs(got - wanted).max() <= (0 if top != 1 else 1)


def test_arrays_of_bool_are_black_and_white() -> None:
    assert array(read_picture(np.array([[True, False]]), "image"))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4,), np.uint8), "shape"),
        (np.zeros((), np.uint8), "shape"),
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape"),
        (np.zeros((3, 4, 5), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), np.complex64), "complex64"),
        (np.array([[object()]]), "object"),
        (np.full((4, 4), np.nan, np.float32), "NaN"),
        (np.full((4, 4), np.inf, np.float32), "rescale"),
        (np.full((4, 4), -0.5, np.float32), "(x + 1) / 2"),
        (np.full((4, 4), 200.0, np.float32), "x / 255"),
        (np.broadcast_to(np.uint8(0), (MAX_SIDE + 1, 4)), "too large"),
        (np.broadcast_to(np.uint8(0), (16_000, 16_000)), "too large"),
    ],
)
def test_arrays_that_are_no_pictures(numbers: np.ndarray[Any, Any], word: str) -> None:
    refused(numbers, word)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(np.array(scene())).permute(2, 0, 1) / 255
    for one in (tensor, tensor[None], tensor.clone().requires_grad_()):
        assert same(read_picture(one.to(dtype), "image"), scene(), 1)
    assert same(read_picture((tensor * 255).byte(), "image"), scene(), 1)
    assert read_mask(tensor[:1].to(dtype), "mask").size == scene().size
    refused(tensor.permute(1, 2, 0), "(C, H, W)")
    refused(tensor.repeat(2, 1, 1, 1), "(C, H, W)")
    refused(tensor * 2 - 1, "(x + 1) / 2")
    refused(tensor.to_sparse())


# ---------------------------------------------------------------------------------------------------- modes, colours


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa", "F"]
)
def test_every_mode_of_pil(mode: str) -> None:
    through = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(mode)
    image = (scene().convert(through) if through else scene()).convert(mode, palette=Image.Palette.ADAPTIVE)
    before = image.tobytes()
    read = read_picture(image, "image")
    grey = mode in ("1", "L", "LA", "La", "F")
    wanted = scene().convert("1" if mode == "1" else "L").convert("RGB") if grey else scene()
    assert same(read, wanted, 8 if mode in ("YCbCr", "HSV", "LAB", "F") else 0)
    assert image.mode == mode
    assert image.tobytes() == before
    read.paste((1, 2, 3), (0, 0, *read.size))
    assert image.tobytes() == before, "the caller's picture was drawn on"


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("I", "memory"), ("I;16", "memory"), ("I;16B", "memory"), ("I;16L", "memory"), ("I;16", "PNG"), ("I;16B", "TIFF")],
)
def test_sixteen_bits(mode: str, kept: str) -> None:
    numbers = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    image = Image.fromarray(numbers.astype(np.int32) if mode == "I" else numbers)
    image = image if image.mode == mode else image.convert("I").convert(mode)
    sent = image if kept == "memory" else encoded(image, kept)
    assert array(read_picture(sent, "image"))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_numbers_beyond_sixteen_bits_are_refused() -> None:
    refused(Image.fromarray(np.array([[0, 70_000]], np.int32)), "70000")
    refused(Image.fromarray(np.array([[-1, 5]], np.int32)), "-1")
    refused(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "nan")
    assert array(read_picture(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "i"))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    assert array(read_picture(Image.fromarray(np.array([[0, 9, 90]], np.float32)), "i"))[0, :, 0].tolist() == [0, 9, 90]


@pytest.mark.parametrize("kind", ["rgb", "grey", "sixteen", "palette", "palette bytes", "gif", "grey alpha"])
def test_transparency_of_every_kind(kind: str) -> None:
    """Two pixels, the second of them transparent."""
    grey = Image.fromarray(np.array([[10, 200]], np.uint8))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 10, 10, 200, 200, 200] + [0] * 762)
    sent = {
        "rgb": lambda: encoded(grey.convert("RGB"), transparency=(200, 200, 200)),
        "grey": lambda: encoded(grey, transparency=200),
        "sixteen": lambda: encoded(Image.fromarray(np.array([[2570, 51500]], np.uint16)), transparency=51500),
        "palette": lambda: encoded(palette, transparency=1),
        "palette bytes": lambda: encoded(palette, transparency=b"\xff\x00"),
        "gif": lambda: encoded(palette, "GIF", transparency=1),
        "grey alpha": lambda: encoded(Image.merge("LA", (grey, Image.fromarray(np.array([[255, 0]], np.uint8))))),
    }[kind]()
    for value in (sent, Image.open(io.BytesIO(sent))):
        read = read_picture(value, "image")
        assert read.mode == "RGBA"
        assert array(read)[0, :, 3].tolist() == [255, 0]
        assert array(read)[0, 0, :3].tolist() == [10, 10, 10]
        assert not isinstance(value, Image.Image) or "transparency" in value.info or kind == "grey alpha"


def test_opaque_alpha_is_dropped() -> None:
    assert read_picture(encoded(scene().convert("RGBA")), "image").mode == "RGB"
    assert read_picture(encoded(scene().convert("LA")), "image").mode == "RGB"
    nearly = scene().convert("RGBA")
    nearly.putpixel((3, 3), (1, 2, 3, 254))
    assert same(read_picture(encoded(nearly), "image"), nearly)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_pictures_stand_upright(orientation: int, format: str) -> None:
    lying = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = scene() if lying is None else scene().transpose(Image.Transpose(lying))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(stored, format, exif=exif.tobytes())
    assert same(read_picture(content, "image"), scene(), 8)
    assert same(read_picture(Image.open(io.BytesIO(content)), "image"), scene(), 8)


def test_a_broken_exif_changes_nothing() -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(30)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for format in ("JPEG", "PNG", "WEBP"):
                assert same(read_picture(encoded(scene(), format, exif=exif), "image"), scene(), 8)


def test_cmyk_as_adobe_stores_it() -> None:
    content = encoded(scene().convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in content
    assert same(read_picture(content, "image"), scene(), 12)
    assert same(read_picture(encoded(scene().convert("CMYK"), "TIFF"), "image"), scene())


def lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def other_profile(old: bytes, new: bytes) -> bytes:
    """sRGB's with some of its numbers exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert old in data
    return data.replace(old, new)


def wide_profile() -> bytes:
    """sRGB's profile with its red and green exchanged, which no colour survives."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = data[green : green + 4], data[red : red + 4]
    return bytes(data)


def test_profiles_lead_to_srgb() -> None:
    exchanged = Image.merge("RGB", [scene().split()[band] for band in (1, 0, 2)])
    for image in (scene(), scene().convert("P", palette=Image.Palette.ADAPTIVE), scene().convert("RGBA")):
        content = encoded(image, icc_profile=wide_profile())
        read = read_picture(content, "image")
        assert same(read, exchanged, 3)
        assert not same(read, scene(), 100)
        assert "icc_profile" not in read.info, "its numbers are no longer of that profile"
    clear = scene().convert("RGBA")
    clear.putalpha(77)
    read = read_picture(encoded(clear, icc_profile=wide_profile()), "image")
    assert same(read.convert("RGB"), exchanged, 3)
    assert read.getchannel("A").getextrema() == (77, 77)


def test_a_profile_that_changes_nothing_changes_no_bit() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert same(read_picture(encoded(noise, icc_profile=srgb), "image"), noise)
    nearly = other_profile(bytes.fromhex("00026666"), bytes.fromhex("00026200"))
    through = ImageCms.profileToProfile(noise, io.BytesIO(nearly), io.BytesIO(srgb))
    assert through is not None
    assert not same(through, noise), "the control: it does round otherwise"
    assert same(read_picture(encoded(noise, icc_profile=nearly), "image"), noise)


def test_a_profile_of_colours_is_good_for_grey() -> None:
    gamma = other_profile(bytes.fromhex("00026666"), bytes.fromhex("00018000"))
    grey = scene().convert("L")
    read = read_picture(encoded(grey, icc_profile=gamma), "image")
    assert same(read, read_picture(encoded(grey.convert("RGB"), icc_profile=gamma), "image"))
    assert abs(array(read) - array(grey.convert("RGB"))).max() > 20


@pytest.mark.parametrize("profile", [b"broken", bytes(200), wide_profile()[:150], lab_profile()])
def test_profiles_that_do_not_fit_are_ignored(profile: bytes) -> None:
    assert same(read_picture(encoded(scene(), icc_profile=profile), "image"), scene())
    cmyk = scene().convert("CMYK")
    assert same(read_picture(encoded(cmyk, "TIFF", icc_profile=profile), "image"), scene())


def test_of_several_frames_the_first() -> None:
    frames = [scene(), Image.new("RGB", scene().size)]
    for format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert same(read_picture(content, "image"), scene(), 8), format


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "NoneType"),
        (3, "int"),
        ([1, 2], "list"),
        (object(), "object"),
        (b"", "0 bytes"),
        ("", "empty"),
        (" \n", "empty"),
        ("no/such/file.png", "does not exist"),
        ("a\0b", "not a path"),
        ("x" * 5000, "base64"),
        ("é/" * 5000, "cannot be opened"),
        (b"hello, this is text", "text"),
        (b"<!doctype html><title>404</title>", "web page"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.7 " + bytes(30), "PDF"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (bytes(range(256)), "damaged"),
        (b"\x89PNG\r\n\x1a\n", ""),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,****", "not valid base64"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:,hello", "text"),
        (io.StringIO("text"), '"rb"'),
        (Image.new("RGB", (0, 5)), "empty"),
        (Image.new("L", (MAX_SIDE + 1, 1)), "too large"),
    ],
    ids=lambda value: repr(value)[:24].partition(" at 0x")[0],
)
def test_what_is_no_picture_is_refused(value: object, word: str) -> None:
    refused(value, word)


def test_folders_devices_and_closed_doors(tmp_path: Path) -> None:
    refused(tmp_path, "folder")
    refused(str(tmp_path), "folder")
    refused("/dev/zero", "not a file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "0 bytes", "empty.png")
    refused(tmp_path / "empty.png" / "below", "Not a directory")


def test_content_stays_out_of_messages() -> None:
    secret = base64.b64encode(random.Random(0).randbytes(3000)).decode()
    for text in (f"data:image/png;base64,{secret}", secret, secret + "!", "data:" + secret):
        message = refused(text)
        assert secret[60:120] not in message
        assert f"{len(text):,} characters" in message


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_pictures_are_refused(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, format)
    for share in (0.02, 0.3, 0.6, 0.9):
        cut = content[: int(len(content) * share)]
        refused(cut)
        try:
            opened = Image.open(io.BytesIO(cut))
        except (OSError, ValueError):
            continue
        refused(opened, "PIL image")


def test_a_picture_whose_file_is_closed(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    refused(image)


def bombs() -> dict[str, bytes]:
    bmp = struct.pack("<2sIHHI", b"BM", 100, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, *[0] * 6
    )
    entries = [(256, 4, 1, 50_000), (257, 4, 1, 50_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 4, 1, 50_000), (279, 4, 1, 100)]  # fmt: skip
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    tiff += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(100)
    jpeg = bytearray(encoded(scene(), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    gif = bytearray(encoded(scene(), "GIF"))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    frame = bytearray(encoded(scene(), "GIF"))
    at = frame.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 40, 30))
    frame[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    webp = (
        struct.pack("<4sI4s4sI", b"RIFF", 60, b"WEBP", b"VP8L", 40)
        + b"\x2f"
        + struct.pack("<I", 0x0FFFFFFF)
        + bytes(39)
    )
    return {
        "png": png_of(60_000, 60_000),
        "png of a width": png_of(20_000, 10),
        "png of over 100 million": png_of(10_001, 10_000),
        "png of a height": png_of(1, 2**31 - 1),
        "bmp": bmp + bytes(100),
        "tiff": tiff,
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "gif frame": bytes(frame),
        "webp": webp,
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_by_their_header(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        refused(bombs()[name], "too large" if name != "webp" else "")


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(encoded(scene()))
    for name, bomb in bombs().items():
        (tmp_path / f"{name}.bomb").write_bytes(bomb)
    code = """
import pathlib, resource, sys, warnings
from flux_engine.pictures import read_picture
warnings.simplefilter("ignore")
read_picture("plain", "image")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in pathlib.Path().glob("*.bomb"):
    try:
        read_picture(path, "image")
    except ValueError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path)
    assert int(done.stdout) < 40, "megabytes"


def test_limits_hold_whatever_pillow_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    refused(png_of(60_000, 60_000), "60000x60000", f"{MAX_PIXELS:,}")


def test_settings_of_pillow_stay() -> None:
    names = ("MAX_IMAGE_PIXELS", "WARN_POSSIBLE_FORMATS")
    before = [getattr(Image, name) for name in names]
    filters = list(warnings.filters)
    read_picture(encoded(scene()), "image")
    refused(png_of(60_000, 60_000))
    assert [getattr(Image, name) for name in names] == before
    assert list(warnings.filters) == filters


def test_a_gif_of_no_size() -> None:
    refused(b"GIF89a" + bytes(7) + b"\x2c" + bytes(9) + b"\x02\x00;")


def test_text_that_unpacks_to_very_much() -> None:
    bomb = b"comment\0\0" + zlib.compress(bytes(8 * 2**20))
    assert len(bomb) < 10_000
    refused(png_of(40, 30, (b"zTXt", bomb)))
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat" * 1000, zip=True)
    assert same(read_picture(encoded(scene(), pnginfo=info), "image"), scene())


@pytest.mark.parametrize("sent", ["bytes", "data", "percent", "base64", "file", "path"])
def test_too_many_bytes(sent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 2**20)
    monkeypatch.setattr(reading, "MAX_PERCENT", 2**20)
    content = encoded(scene())
    assert same(read_picture(content + bytes(2**20 - len(content)), "image"), scene())
    content += bytes(2**20 - len(content) + 1)
    if sent == "path":
        (tmp_path / "a.png").write_bytes(content)
    text = base64.b64encode(content).decode() if sent in ("data", "base64") else ""
    value = {
        "bytes": content,
        "data": "data:image/png;base64," + text,
        "percent": "data:image/png," + "%00" * 2**19,
        "base64": text,
        "file": io.BytesIO(content),
        "path": tmp_path / "a.png",
    }[sent]
    refused(value, "1 MB" if sent == "percent" else "64 MB")


def test_polyglots_are_pictures_or_refused() -> None:
    assert same(read_picture(encoded(scene()) + b"<html><script>alert(1)</script>", "image"), scene())
    assert same(read_picture(encoded(scene(), "BMP") + b"PK\x03\x04" + bytes(50), "image"), scene())
    refused(b"GIF89a/*<svg onload=alert(1)>*/=1;")
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "text")


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PCX", "EPS", "PDF", "SGI"])
def test_other_formats_of_pillow_are_not_read(format: str) -> None:
    refused(encoded(scene(), format))


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_bytes(format: str) -> None:
    content = encoded(
        scene((16, 12)), format, **({"exif": b"Exif\0\0II*\0\x08\0\0\0" + bytes(9)} if format == "JPEG" else {})
    )
    chance = random.Random(format)
    read = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(500):
            mutant = bytearray(content)
            for _ in range(chance.choice((1, 1, 2, 8))):
                mutant[chance.randrange(len(mutant))] ^= 1 << chance.randrange(8)
            try:
                image = read_picture(bytes(mutant), "image")
            except InvalidRequest:
                continue
            assert image.mode in ("RGB", "RGBA")
            assert max(image.size) <= MAX_SIDE
            read += 1
    assert read < 500 or format in ("BMP", "TIFF"), "nothing was broken"


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), zlib.error("bad"), struct.error("short"), KeyError(1)]
)
def test_whatever_a_decoder_raises_is_one_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    refused(encoded(scene()), "PNG or JPEG")


# ---------------------------------------------------------------------------------------------------- masks


def holed(picture: Image.Image) -> Image.Image:
    """Its left half transparent."""
    image = picture.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, image.width // 2, image.height))
    return image


def half(left: int, right: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    image = Image.new("L", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def test_flatten() -> None:
    image = holed(scene())
    for background in ((255, 255, 255), (10, 20, 30)):
        flat = flatten(image, background)
        assert flat.mode == "RGB"
        assert flat.getpixel((0, 0)) == background
        assert flat.getpixel((39, 0)) == (20, 200, 30)
    assert same(flatten(scene()), scene())
    assert flatten(Image.new("RGBA", (1, 1), (255, 0, 0, 51))).getpixel((0, 0)) == (255, 204, 204)


def test_alpha_mask() -> None:
    assert alpha_mask(scene()) is None
    assert alpha_mask(scene().convert("RGBA")) is None
    mask = alpha_mask(holed(scene()))
    assert mask is not None
    assert same(mask, half(255, 0))


def test_an_opaque_mask_counts_by_luminance() -> None:
    for mask in (half(255, 0), half(0, 255), half(255, 128)):
        for mode in ("L", "RGB", "RGBA", "P", "LA"):
            assert same(read_mask(encoded(mask.convert(mode)), "mask"), mask)
    assert same(read_mask(np.asarray(half(255, 0)) > 0, "mask"), half(255, 0))
    assert read_mask(Image.new("RGB", (1, 1), (255, 0, 0)), "mask").getpixel((0, 0)) == 76


def test_a_mask_drawn_on_nothing_repaints_what_is_white() -> None:
    on_nothing = Image.new("RGBA", (40, 30))
    on_nothing.paste((255, 255, 255, 255), (0, 0, 20, 30))
    assert same(read_mask(on_nothing, "mask"), half(255, 0))
    on_nothing.paste((0, 0, 0, 255), (20, 0, 40, 10))
    assert same(read_mask(on_nothing, "mask"), half(255, 0))


@pytest.mark.parametrize("colour", ["picture", "with white", "black", "grey", "red"])
def test_holes_are_repainted_where_colours_say_nothing(colour: str) -> None:
    picture = scene() if colour in ("picture", "with white") else Image.new("RGB", (40, 30), colour)
    if colour == "with white":
        picture.paste((255, 255, 255), (30, 0, 40, 30))
    assert same(read_mask(encoded(holed(picture)), "mask"), half(255, 0))


def test_even_transparency_has_no_holes() -> None:
    mask = half(255, 0).convert("RGBA")
    mask.putalpha(255 // 2)
    assert same(read_mask(mask, "mask"), half(127, 0))
    assert same(read_mask(Image.new("RGBA", (40, 30)), "mask"), half(0, 0))


# ---------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "limit", "multiple", "nearest", "below"),
    [
        ((3000, 2000), 1440, 16, (1440, 960), (1440, 960)),
        ((1500, 1000), 1440, 16, (1440, 960), (1440, 960)),
        ((1000, 1010), 1440, 16, (992, 1008), (992, 1008)),
        ((1023, 1020), 1440, 16, (1024, 1024), (1008, 1008)),
        ((810, 1350), 1440, 32, (800, 1344), (800, 1344)),
        ((1440, 1440), 1440, 16, (1440, 1440), (1440, 1440)),
        ((1441, 1441), 1440, 16, (1440, 1440), (1440, 1440)),
        ((5, 3), 1440, 16, (16, 16), (16, 16)),
        ((10_000, 3), 1440, 16, (1440, 16), (1440, 16)),
        ((1450, 1450), 1450, 16, (1440, 1440), (1440, 1440)),
    ],
)
def test_within(
    size: tuple[int, int], limit: int, multiple: int, nearest: tuple[int, int], below: tuple[int, int]
) -> None:
    assert within(size, limit, multiple) == nearest
    assert within(size, limit, multiple, floor=True) == below
    turned = within((size[1], size[0]), limit, multiple)
    assert turned == (nearest[1], nearest[0])


def test_within_keeps_what_it_says() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        size = chance.randint(1, 9000), chance.randint(1, 9000)
        for floor in (False, True):
            got = within(size, 1440, 16, floor=floor)
            scale = min(1, 1440 / max(size))
            for side, was in zip(got, size, strict=True):
                assert side % 16 == 0
                assert 16 <= side <= 1440
                assert abs(side - was * scale) <= (16 if floor else 8) + 1e-6 or side == 16
                assert not floor or side <= max(was, 16)


@pytest.mark.parametrize(
    ("size", "pixels", "multiple", "wanted"),
    [
        ((1600, 900), 1024 * 1024, 32, (1344, 768)),
        ((1024, 1024), 1024 * 1024, 32, (1024, 1024)),
        ((100, 100), 1024 * 1024, 32, (1024, 1024)),
        ((4096, 4096), 512 * 512, 32, (512, 512)),
        ((10_000, 1), 1024 * 1024, 32, (102_400, 32)),
        ((3, 3), 1, 32, (32, 32)),
    ],
)
def test_of_area(size: tuple[int, int], pixels: int, multiple: int, wanted: tuple[int, int]) -> None:
    assert of_area(size, pixels, multiple) == wanted


def test_tables() -> None:
    assert len(KONTEXT_SIZES) == 17
    assert len(SDXL_BUCKETS) == 41
    for table, multiple in ((KONTEXT_SIZES, 16), (SDXL_BUCKETS, 64)):
        assert len(set(table)) == len(table)
        assert {(h, w) for w, h in table} == set(table)
        assert all(side % multiple == 0 for size in table for side in size)
        assert all(0.85 < w * h / 1024**2 < 1.07 for w, h in table)


def test_nearest_aspect() -> None:
    for table in (KONTEXT_SIZES, SDXL_BUCKETS):
        assert all(nearest_aspect(size, table) == size for size in table)
        assert all(nearest_aspect((3 * w, 3 * h), table) == (w, h) for w, h in table)
    assert nearest_aspect((1600, 900), KONTEXT_SIZES) == (1392, 752)
    assert nearest_aspect((9000, 10), SDXL_BUCKETS) == (2048, 512)
    assert nearest_aspect((1, 1), [(512, 512), (1024, 1024), (768, 768)]) == (1024, 1024)
    assert nearest_aspect((1, 1), [(400, 100), (200, 400)]) == (200, 400), "ratios are compared, not differences"


@pytest.mark.parametrize("how", RESIZES)
def test_fit_gives_the_size_and_a_copy(how: str) -> None:
    for mode in ("RGB", "RGBA", "L"):
        image = scene().convert(mode)
        got = fit(image, (40, 30), how)
        assert same(got, image)
        assert got is not image
        if how != "none":
            assert fit(image, (64, 16), how).size == (64, 16)
            assert fit(image, (16, 64), how).mode == mode


def test_fit_by_name() -> None:
    wide = Image.new("RGB", (200, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (50, 0, 150, 100))
    assert array(fit(wide, (100, 100), "cover"))[:, 3:-3].reshape(-1, 3).tolist() == [[0, 0, 255]] * 9400
    contained = fit(wide, (100, 100), "contain")
    assert contained.getpixel((50, 10)) == (255, 255, 255)
    assert contained.getpixel((2, 50)) == (255, 0, 0)
    assert contained.getpixel((50, 26)) == (0, 0, 255)
    tall = fit(wide.transpose(Image.Transpose.ROTATE_90), (100, 100), "contain")
    assert [tall.getpixel((x, 10)) for x in (23, 26, 73, 76)] == [(255, 255, 255)] + [(255, 0, 0)] * 2 + [
        (255, 255, 255)
    ]
    assert fit(wide, (100, 100), "contain", background=(1, 2, 3)).getpixel((50, 90)) == (1, 2, 3)
    assert fit(half(255, 0), (90, 30), "contain", background=0).getpixel((0, 0)) == 0
    stretched = fit(wide, (100, 100), "stretch")
    assert stretched.getpixel((5, 50)) == (255, 0, 0)
    assert stretched.getpixel((50, 99)) == (0, 0, 255)
    with pytest.raises(InvalidRequest, match="200x100, and 100x100") as caught:
        fit(wide, (100, 100), "none", field="image")
    assert caught.value.field == "image"
    with pytest.raises(InvalidRequest, match="did you mean 'cover'"):
        fit(wide, (100, 100), "covr")


def test_masks_are_interpolated_linearly() -> None:
    """Lanczos overshoots: of two greys it makes a third and a fourth."""
    mask = half(200, 100)
    assert set(np.unique(array(fit(mask, (400, 300), "stretch")))) <= set(range(100, 201))
    assert array(fit(mask, (400, 300), "stretch", resample=Image.Resampling.LANCZOS)).max() > 200
    assert set(np.unique(array(fit(mask, (400, 300), "stretch", resample=Image.Resampling.NEAREST)))) == {100, 200}


@pytest.mark.parametrize("how", ["stretch", "cover", "contain"])
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 96), (333, 64)])
def test_a_mask_stays_on_its_picture(how: str, size: tuple[int, int]) -> None:
    """A square that both show, the mask at half the size of the picture, lies in the same place after."""
    picture, mask = Image.new("RGB", (400, 300)), Image.new("L", (200, 150))
    picture.paste((255, 255, 255), (120, 100, 240, 220))
    mask.paste(255, (60, 50, 120, 110))
    shown = array(fit(picture, size, how, background=(0, 0, 0)).convert("L")) > 128
    masked = array(fit(mask, size, how, background=0)) > 128
    assert shown.any()
    edges = np.abs(np.diff(shown.astype(int), axis=0)).sum() + np.abs(np.diff(shown.astype(int), axis=1)).sum()
    assert (shown != masked).sum() <= edges / 4


def test_place_keeps_the_aspect_and_stays_inside() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        image = chance.randint(1, 3000), chance.randint(1, 3000)
        size = chance.randint(1, 1440), chance.randint(1, 1440)
        for how in ("stretch", "cover", "contain"):
            source, box = place(image, size, how)
            assert 0 <= source[0] < source[2] <= image[0]
            assert 0 <= source[1] < source[3] <= image[1]
            assert 0 <= box[0] < box[2] <= size[0]
            assert 0 <= box[1] < box[3] <= size[1]
            if how == "cover":
                assert box == (0, 0, *size)
                assert (source[2] - source[0]) * size[1] == pytest.approx((source[3] - source[1]) * size[0])
            if how == "contain":
                assert size[0] == box[2] - box[0] or size[1] == box[3] - box[1]


def test_the_thinnest_pictures_fit() -> None:
    for image in (Image.new("RGB", (1, 1)), Image.new("RGB", (MAX_SIDE, 1)), Image.new("L", (1, 3000))):
        for how in ("stretch", "cover", "contain"):
            assert fit(image, (64, 48), how).size == (64, 48)


def test_reading_pictures_needs_no_torch() -> None:
    code = "import flux_engine.pictures, flux_engine.guarded, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
