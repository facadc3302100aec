"""From the content of a file to a picture in plain sRGB, upright."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

from flux_engine.pictures.arrays import Refuse, check_size, of_numbers

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}


def decode(content: bytes, refuse: Refuse) -> Image.Image:
    """A picture from the content of a file: of one of FORMATS, whole, and not too large."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise refuse(f"is too large: {error} Scale it down") from None
    except Image.UnidentifiedImageError:
        raise refuse(_what_else(content)) from None
    with image:
        check_size(image.size, refuse)
        image.load()
        return plain(image, refuse)


def _what_else(content: bytes) -> str:
    """Why content is no picture."""
    start = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not content:
        return "is empty: 0 bytes"
    if b"<svg" in start:
        return "is SVG, a drawing: render it to PNG"
    if start.startswith((b"<!doctype html", b"<html")) or b"<html" in start:
        return "is a web page, not a picture: take the picture's own address"
    if content[4:8] == b"ftyp" and content[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return "is HEIC: save it as JPEG or PNG"
    if start.startswith(b"%pdf"):
        return "is PDF: render a page to PNG"
    if not content[:1024].translate(None, bytes(range(32, 127)) + b"\t\r\n"):
        return f"is text, not a picture: {', '.join(FORMATS)} are read"
    return f"is not a picture that can be read: damaged, or none of {', '.join(FORMATS)}"


def plain(image: Image.Image, refuse: Refuse) -> Image.Image:
    """RGB or RGBA in sRGB, upright. `image` is loaded, and ours to change."""
    turn = _turn(image)
    if image.mode[0] in "IF":
        image = of_numbers(image, refuse)
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    alpha = None
    if image.mode in ("LA", "PA", "RGBA") or (image.mode in ("1", "L", "P", "RGB") and image.has_transparency_data):
        alpha = image.convert("RGBA").getchannel("A")
    image.info.pop("transparency", None)
    result = _in_srgb(image)
    if alpha is not None and extremes(alpha)[0] < 255:
        result.putalpha(alpha)
    result = result if turn is None else result.transpose(turn)
    result.info = {}
    return result


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings a picture upright: its EXIF or XMP says."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  of many types: a broken note is no reason to refuse a whole picture
        return None


def _in_srgb(image: Image.Image) -> Image.Image:
    """A new RGB picture: through the profile where there is one that is valid and of this kind of picture."""
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and profile:
        try:
            converted = _through(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")


def _through(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image | None:
    """None where the profile is for other pictures, or changes nothing."""
    space = profile.profile.xcolor_space  # pyright: ignore[reportAttributeAccessIssue]
    mode = SPACES.get(space.strip())
    kind = image.mode if image.mode in ("CMYK", "LAB") else "L" if image.mode in ("1", "L", "LA") else "RGB"
    if mode is None or (mode != kind and (mode, kind) != ("RGB", "L")):
        return None
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode in ("L", "RGB"):
        steps = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), -1).reshape(64, 64, 3)
        probe = Image.fromarray(steps).convert(mode)
        changed = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
        if abs(changed).max() <= 1:
            return None
    return ImageCms.applyTransform(image.convert(mode), transform)


def extremes(band: Image.Image) -> tuple[int, int]:
    """The lowest and the highest value of one channel."""
    low, high = band.getextrema()
    return int(low), int(high)  # pyright: ignore[reportArgumentType]
