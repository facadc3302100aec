"""ControlNets in whole requests, against diffusers' pipelines: same weights through our files, same noise, float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import sdxl_models
import torch
from conftest import assert_the_same, latent_error, randomise
from diffusers import ControlNetModel, FluxControlNetModel, FluxMultiControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import flux_engine
from flux_engine import Control, InvalidRequest, UnknownModel, WeightsError
from flux_engine.checkpoints import export
from flux_engine.engine import Engine
from flux_engine.families.flux import FluxFamily, patchify
from flux_engine.families.sdxl import SDXLFamily
from flux_engine.models.flux_controlnet import FluxControlNet
from flux_engine.models.unet_controlnet import UNetControlNet
from flux_engine.params import FluxControlNetParams, UNetControlNetParams
from flux_engine.specs import DEMO_DEV, ControlNetSpec

PROMPT = "a large red circle on a blue background"
SIZE = (128, 96)
STEPS = 6


@pytest.fixture(autouse=True)
def the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own norms, theirs and ours where no kernel computes them, in float64. In float32 and channels last they
    lose digits where a group's mean is many times its deviation (12 here): 1e-4 of the latent. The kernels do not."""
    norm = functional.group_norm

    def exact(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return norm(x.double(), groups, weight.double(), bias.double(), eps).to(x.dtype)

    monkeypatch.setattr(functional, "group_norm", exact)


def edges(left: int = 32) -> Image.Image:
    image = Image.new("RGB", SIZE, "black")
    ImageDraw.Draw(image).rectangle((left, 16, left + 48, 72), outline="white", width=3)
    return image


def control(kind: str = "canny", **changed: Any) -> Control:
    return replace(Control(kind=kind, image=edges(), preprocess=False, scale=1.2), **changed)


def flux_controlnet(seed: int, **params: Any) -> FluxControlNet:
    depths = {name: params.pop(name) for name in ("depth", "depth_single_blocks")}
    net = FluxControlNet(replace(FluxControlNetParams.of(DEMO_DEV.transformer, **depths), **params))
    randomise(net, seed)
    return net


def unet_controlnet(seed: int) -> UNetControlNet:
    net = UNetControlNet(UNetControlNetParams.of(sdxl_models.BASE.unet))
    randomise(net, seed)
    net.controlnet_cond_embedding.conv_out.weight.mul_(256)  # each SiLU before it makes less of a picture
    return net


def saved(net: FluxControlNet | UNetControlNet, path: Path) -> Path:
    flux = isinstance(net, FluxControlNet)
    tensors = export.flux_controlnet_tensors(net) if flux else export.unet_controlnet_tensors(net)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """demo-dev with two ControlNets of unequal depths."""
    root = tmp_path_factory.mktemp("flux")
    nets = {
        "canny": saved(flux_controlnet(1, depth=1, depth_single_blocks=3), root / "edges.safetensors"),
        "depth": saved(flux_controlnet(2, depth=2, depth_single_blocks=0), root / "far.safetensors"),
    }
    return flux_engine.load("demo-dev", device="cpu", dtype="float32", controlnets=nets)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A small SDXL with two ControlNets."""
    root = tmp_path_factory.mktemp("sdxl")
    nets = [
        (ControlNetSpec(name=kind, kinds={kind: None}), saved(unet_controlnet(seed), root / f"{kind}.safetensors"))
        for seed, kind in enumerate(("canny", "depth"), start=7)
    ]
    return Engine(sdxl_models.family().with_controlnets(nets))


@pytest.fixture(params=["flux", "sdxl"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


def run(engine: Engine, **changed: Any) -> torch.Tensor:
    asked: dict[str, Any] = {
        "prompt": PROMPT, "seed": 3, "num_inference_steps": STEPS, "output_type": "latent", "width": SIZE[0],
        "height": SIZE[1],
    }  # fmt: skip
    if "image" in changed:
        del asked["width"], asked["height"]
    return torch.stack(list(engine(**(asked | changed))))


def their_flux(engine: Engine, folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    engine.export(folder)
    nets: list[Any] = []
    for one in engine._pipeline.family.controlnets:
        config = export.flux_controlnet_config(one.net.params)
        del config["_class_name"]
        net = FluxControlNetModel(**config)
        net.load_state_dict(export.flux_controlnet_tensors(one.net), strict=True)
        nets.append(net.eval())
    pipe = getattr(diffusers, kind).from_pretrained(folder, controlnet=FluxMultiControlNetModel(nets))
    pipe.set_progress_bar_config(disable=True)
    said = {"guidance_scale": 3.5, "max_sequence_length": engine.spec.max_sequence_length, "control_mode": [None, None]}
    return pipe, said


def their_sdxl(engine: Engine, folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    engine.export(folder)
    nets: list[Any] = []
    for one in engine._pipeline.family.controlnets:
        config = export.unet_controlnet_config(one.net.params)
        del config["_class_name"]
        net = ControlNetModel(**config)
        net.load_state_dict(export.unet_controlnet_tensors(one.net), strict=True)
        nets.append(net.eval())
    pipe = getattr(diffusers, kind).from_pretrained(folder, controlnet=nets, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"guidance_scale": 4.0, "negative_prompt": "a star"}


def reference(pipe: Any, said: dict[str, Any], **asked: Any) -> torch.Tensor:
    common: dict[str, Any] = {
        "prompt": PROMPT, "num_inference_steps": STEPS, "generator": [torch.Generator().manual_seed(3)],
        "output_type": "latent",
    }  # fmt: skip
    return pipe(**(common | said | asked)).images


BOTH = [control(), control("depth", image=edges(48), scale=6.0, start=0.2, end=0.7)]
WINDOWS: dict[str, Any] = {
    "controlnet_conditioning_scale": [1.2, 6.0],
    "control_guidance_start": [0.0, 0.2],
    "control_guidance_end": [1.0, 0.7],
}


def test_several_on_sdxl_agree_with_diffusers(sdxl: Engine, tmp_path: Path) -> None:
    guided = {"guidance_scale": 4.0, "negative_prompt": "a star"}
    mine = run(sdxl, control=BOTH, **guided)
    pipe, said = their_sdxl(sdxl, tmp_path / "model", "StableDiffusionXLControlNetPipeline")
    theirs = reference(pipe, said, image=[edges(), edges(48)], width=SIZE[0], height=SIZE[1], **WINDOWS)
    assert latent_error(mine, theirs) <= 1e-4
    check_controls(lambda nets: run(sdxl, control=nets, **guided), mine)


def test_several_on_flux_agree_with_diffusers_one_by_one(flux: Engine, tmp_path: Path) -> None:
    """Of two with unequal numbers of blocks diffusers adds up as many as the shorter has, and drops the rest: each is
    compared alone, and the sum with the sum of both."""
    pipe, said = their_flux(flux, tmp_path / "model", "FluxControlNetPipeline")
    nets = list(pipe.controlnet.nets)
    for one, number in zip(BOTH, (0, 1), strict=True):
        mine = run(flux, control=[one])
        pipe.controlnet = nets[number]
        windows = {name: values[number] for name, values in WINDOWS.items()}
        alone = reference(
            pipe, said | {"control_mode": None}, control_image=one.image, width=SIZE[0], height=SIZE[1], **windows
        )
        assert latent_error(patchify(mine), alone) <= 1e-4
    check_controls(lambda nets: run(flux, control=nets), run(flux, control=BOTH))


def check_controls(draw: Callable[[list[Control]], torch.Tensor], mine: torch.Tensor) -> None:
    first, second = BOTH
    for nets in (
        [second],
        [first],
        [replace(first, scale=0.2), second],
        [first, replace(second, start=0.4)],
        [first, replace(second, end=1.0)],
    ):
        assert latent_error(draw(nets), mine) >= 1e-2
    for one in BOTH:
        whole = replace(one, start=0.0, end=1.0)
        white = replace(whole, image=Image.new("RGB", SIZE, "white"))
        assert latent_error(draw([white]), draw([whole])) >= 1e-2


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpaint"])
def test_with_a_picture_to_start_from_on_sdxl(sdxl: Engine, tmp_path: Path, masked: bool) -> None:
    start = Image.new("RGB", SIZE, "green")
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (32, 16, 96, 80))
    guided = {"guidance_scale": 4.0, "negative_prompt": "a star", "strength": 0.7}
    mine = run(sdxl, control=BOTH, image=start, **guided, **({"mask": mask} if masked else {}))
    kind = f"StableDiffusionXLControlNet{'Inpaint' if masked else 'Img2Img'}Pipeline"
    pipe, said = their_sdxl(sdxl, tmp_path / "model", kind)
    asked: dict[str, Any] = {"image": start, "control_image": [edges(), edges(48)], "strength": 0.7} | WINDOWS
    asked |= {"mask_image": mask} if masked else {}
    theirs = reference(pipe, said, width=SIZE[0], height=SIZE[1], **asked)
    assert latent_error(mine, theirs) <= 1e-4
    without = run(sdxl, image=start, **guided, **({"mask": mask} if masked else {}))
    assert latent_error(without, mine) >= 1e-2


@pytest.mark.parametrize("masked", [False, True], ids=["img2img", "inpaint"])
def test_with_a_picture_to_start_from_on_flux(flux: Engine, tmp_path: Path, masked: bool) -> None:
    start = Image.new("RGB", SIZE, "green")
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (32, 16, 96, 80))
    extra = {"mask": mask} if masked else {}
    mine = run(flux, control=BOTH[0], image=start, strength=0.7, **extra)
    kind = f"FluxControlNet{'Inpaint' if masked else 'Img2Img'}Pipeline"
    pipe, said = their_flux(flux, tmp_path / "model", kind)
    pipe.controlnet = pipe.controlnet.nets[0]
    asked: dict[str, Any] = {"image": start, "control_image": edges(), "strength": 0.7}
    asked |= {"mask_image": mask} if masked else {}
    theirs = reference(
        pipe, said | {"control_mode": None}, controlnet_conditioning_scale=1.2, width=SIZE[0], height=SIZE[1], **asked
    )
    assert latent_error(patchify(mine), theirs) <= 1e-4
    assert latent_error(run(flux, image=start, strength=0.7, **extra), mine) >= 1e-2


def test_a_union_is_told_which_kind_it_gets(tmp_path: Path) -> None:
    net = flux_controlnet(5, depth=1, depth_single_blocks=1, num_modes=5)
    path = saved(net, tmp_path / "union.safetensors")
    engine = flux_engine.load("demo-dev", device="cpu", dtype="float32", controlnets={"canny": path, "pose": path})
    mine = run(engine, control=control("pose"))
    assert latent_error(run(engine, control=control("canny")), mine) >= 1e-2
    engine.export(tmp_path / "model")
    config = export.flux_controlnet_config(net.params)
    del config["_class_name"]
    other = FluxControlNetModel(**config)
    other.load_state_dict(export.flux_controlnet_tensors(net), strict=True)
    pipe = diffusers.FluxControlNetPipeline.from_pretrained(tmp_path / "model", controlnet=other.eval())
    pipe.set_progress_bar_config(disable=True)
    theirs = reference(
        pipe, {"guidance_scale": 3.5, "max_sequence_length": engine.spec.max_sequence_length}, control_image=edges(),
        control_mode=4, controlnet_conditioning_scale=1.2, width=SIZE[0], height=SIZE[1],
    )  # fmt: skip
    assert latent_error(patchify(mine), theirs) <= 1e-4
    with pytest.raises(WeightsError, match="'normal' is none"):
        flux_engine.load("demo-dev", device="cpu", controlnets={"normal": path})


def test_scale_0_is_none_and_two_halves_are_one(engine: Engine) -> None:
    plain = run(engine)
    assert torch.equal(run(engine, control=control(scale=0.0)), plain)
    assert torch.equal(run(engine, control=control(start=0.99, end=1.0)), plain)
    once = run(engine, control=control(scale=1.0))
    twice = run(engine, control=[control(scale=0.5), control(scale=0.5)])
    assert latent_error(twice, once) <= 1e-6
    assert latent_error(once, plain) >= 1e-2


def test_outside_its_window_a_controlnet_is_not_run(engine: Engine) -> None:
    net = engine._pipeline.family.controlnets[0].net
    calls: list[int] = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    try:
        run(engine, control=control(start=0.3, end=0.7))
    finally:
        handle.remove()
    assert len(calls) == 2  # of six calls those whole between 0.3 and 0.7


def test_a_controlnet_that_counts_at_no_step_is_said(engine: Engine) -> None:
    asked = {"control": control(start=0.3, end=0.35), "num_inference_steps": 2, "output_type": "latent"}
    (note,) = engine(PROMPT, seed=0, **asked).notes
    assert "counts at no step: none lies whole between 0.3 and 0.35" in note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_has_the_bits_of_single_requests(engine: Engine, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        import copy

        family = copy.deepcopy(engine._pipeline.family)
        for net in (family.net, family.vae, *(one.net for one in family.controlnets)):
            net.to(dtype)
        engine = Engine(family)
    asked: dict[str, Any] = {"control": BOTH, "num_inference_steps": 2, "negative_prompt": "a star"}
    batch = run(engine, num_outputs=3, **asked)
    singles = torch.cat([run(engine, **(asked | {"seed": 3 + k})) for k in range(3)])
    assert_the_same(batch, singles, dtype)


def test_the_control_pictures_come_with_the_result(engine: Engine) -> None:
    photo = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(photo).ellipse((32, 16, 90, 80), fill="red")
    result = engine(PROMPT, control=Control(kind="canny", image=photo), num_inference_steps=1, seed=0)
    (made,) = result.controls
    assert made.size == SIZE == result.image.size
    assert made.convert("L").getextrema() == (0, 255)
    assert made.getpixel((60, 48)) == (0, 0, 0)


def test_what_cannot_be_is_refused(flux: Engine, sdxl: Engine, tmp_path: Path) -> None:
    for asked in (
        control("dept"),
        control(scale=-1.0),
        control(scale=float("nan")),
        control(start=0.8, end=0.2),
        control(end=1.5),
        control(preprocess="nothing known"),
        control(image=None),
        [control(), "canny"],
    ):
        with pytest.raises(InvalidRequest) as caught:
            flux(PROMPT, control=asked)
        assert caught.value.field == "control"
    with pytest.raises(UnknownModel, match="no ControlNet 'cany'"):
        flux_engine.load("demo-dev", device="cpu", controlnets=["cany"])
    with pytest.raises(InvalidRequest, match="neither a list nor a mapping"):
        flux_engine.load("demo-dev", device="cpu", controlnets="canny")
    path = saved(unet_controlnet(1), tmp_path / "sdxl.safetensors")
    with pytest.raises(InvalidRequest, match="say what"):
        flux_engine.load("demo-dev", device="cpu", controlnets=[path])
    with pytest.raises(WeightsError, match="it holds a ControlNet for SDXL"):
        flux_engine.load("demo-dev", device="cpu", controlnets={"canny": path})
    wider = flux_controlnet(1, depth=1, depth_single_blocks=0)
    params = replace(wider.params, hidden_size=384, num_heads=6)
    with pytest.raises(WeightsError, match="its hidden_size is 384"):
        flux_engine.load(
            "demo-dev",
            device="cpu",
            controlnets={"canny": saved(FluxControlNet(params), tmp_path / "wide.safetensors")},
        )
    assert isinstance(flux._pipeline.family, FluxFamily)
    assert isinstance(sdxl._pipeline.family, SDXLFamily)
