"""SDXL: whole requests against diffusers' pipelines, on the same weights through our converters, float32."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sdxl_models
import torch
from conftest import latent_error
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import flux_engine
from flux_engine import hub
from flux_engine.checkpoints.inspect import inspect
from flux_engine.checkpoints.keys import to_theirs
from flux_engine.checkpoints.tables import unet_sgm
from flux_engine.engine import Engine
from flux_engine.errors import InvalidRequest, RequestCancelled, UnknownModel
from flux_engine.families.load import load_family
from flux_engine.memory import Place
from flux_engine.params import DiffusionSchedule
from flux_engine.pipeline import Step
from flux_engine.request import Request
from flux_engine.schedulers import scheduler_config
from flux_engine.specs import SCHEDULERS, SDXL_TURBO, SDXLSpec

PROMPT = "a large red circle on a blue background"
NEGATIVE = "a small star, top left"
SIZE = {"width": 96, "height": 64}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(sdxl_models.family())


@pytest.fixture(scope="module")
def refined() -> Engine:
    return Engine(sdxl_models.family().refined_by(sdxl_models.family(sdxl_models.REFINER)))


@pytest.fixture(scope="module")
def theirs(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    folder = engine.export(tmp_path_factory.mktemp("base") / "model")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def their_refiner(
    refined: Engine, theirs: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory
) -> StableDiffusionXLImg2ImgPipeline:
    folder = refined._pipeline.family.refiner.export(tmp_path_factory.mktemp("refiner") / "model")
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_scheduler(pipe: Any, name: str, engine: Engine) -> Any:
    import diffusers

    config = scheduler_config(engine.spec.schedule, name)
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    return pipe


def generator(seed: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed)]


def run(engine: Engine, **changed: Any) -> torch.Tensor:
    asked = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": 3, "guidance_scale": 4.0, "output_type": "latent",
    } | SIZE  # fmt: skip
    return torch.stack(list(engine(**(asked | changed))))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_request_agrees_with_diffusers_for_every_scheduler(
    engine: Engine, theirs: StableDiffusionXLPipeline, scheduler: str
) -> None:
    mine = run(engine, scheduler=scheduler, num_inference_steps=5)
    with_scheduler(theirs, scheduler, engine)
    reference = theirs(
        PROMPT, negative_prompt=NEGATIVE, generator=generator(), guidance_scale=4.0, num_inference_steps=5,
        output_type="latent", **SIZE,
    ).images  # fmt: skip
    assert latent_error(mine, reference) <= 1e-4
    for control in (
        {"negative_prompt": "a blue background"},
        {"prompt": "a green cross"},
        {"guidance_scale": 1.0},
        {"original_size": (640, 640)},
        {"crop_top_left": (40, 0)},
        {"target_size": (32, 32)},
        {"seed": 4},
    ):
        assert latent_error(run(engine, **({"scheduler": scheduler, "num_inference_steps": 5} | control)), mine) >= 1e-2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("mode", ["expert_ensemble_refiner", "base_image_refiner"])
def test_refiner_agrees_with_diffusers(
    refined: Engine,
    theirs: StableDiffusionXLPipeline,
    their_refiner: StableDiffusionXLImg2ImgPipeline,
    mode: str,
    scheduler: str,
) -> None:
    asked: dict[str, Any] = {"refine": mode, "scheduler": scheduler, "num_inference_steps": 6, "guidance_scale": 4.0}
    both: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    first, second = dict(both), dict(both)
    if mode == "expert_ensemble_refiner":
        asked["high_noise_frac"] = first["denoising_end"] = second["denoising_start"] = 0.6
    else:
        asked["refine_steps"] = second["num_inference_steps"] = 8
    mine = run(refined, **asked)
    drawn = generator()  # one for both, as the hosted model has it
    for pipe in (theirs, their_refiner):
        with_scheduler(pipe, scheduler, refined)
    latent = theirs(PROMPT, generator=drawn, output_type="latent", **first, **SIZE).images
    reference = their_refiner(
        PROMPT, image=latent, generator=drawn, original_size=(64, 96), target_size=(64, 96), output_type="latent",
        **second,
    ).images  # fmt: skip
    assert latent_error(mine, reference) <= 1e-4
    without = {name: asked[name] for name in ("scheduler", "num_inference_steps", "guidance_scale")}
    assert latent_error(run(refined, **without), mine) >= 1e-2
    assert latent_error(run(refined, **(asked | {"negative_prompt": "a blue background"})), mine) >= 1e-2


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_ensemble_may_leave_either_nothing_to_do(refined: Engine, fraction: float) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 4}
    mine = run(refined, refine="expert_ensemble_refiner", high_noise_frac=fraction, **asked)
    base = run(refined, **asked)
    assert torch.equal(mine, base) == (fraction == 1.0)
    assert mine.isfinite().all()


@pytest.fixture(scope="module")
def folders(refined: Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and refiner as diffusers keeps them."""
    family, root = refined._pipeline.family, tmp_path_factory.mktemp("folders")
    return family.export(root / "base"), family.refiner.export(root / "refiner")


def test_a_folder_loads_with_its_refiner_bit_for_bit(refined: Engine, folders: tuple[Path, Path]) -> None:
    base, refiner = folders
    loaded = flux_engine.load(str(base), device="cpu", dtype="float32", refiner=str(refiner))
    assert loaded.spec.unet == refined.spec.unet
    assert loaded.spec.vae == refined.spec.vae
    assert loaded.spec.schedule == refined.spec.schedule
    assert set(loaded.describe()["parts"]) == {"unet", "vae", "text_encoder", "text_encoder_2", "refiner"}
    for refine in ("no_refiner", "expert_ensemble_refiner", "base_image_refiner"):
        asked: dict[str, Any] = {"refine": refine, "num_inference_steps": 4, "width": 128, "height": 128}
        assert torch.equal(run(loaded, **asked), run(refined, **asked))


def test_a_single_file_with_all_parts_gives_the_same_bits(
    engine: Engine, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """As SDXL's single files have them: SGM's names, and OpenCLIP for the second encoder."""
    family = engine._pipeline.family
    first, second = (reader.clip.state_dict() for reader in family.text.readers)
    first = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in first.items()}
    attention = [depth > 0 for depth in engine.spec.unet.transformer_depth]
    tensors = {
        **prefixed("model.diffusion_model.", to_theirs(family.net.state_dict(), unet_sgm(attention))),
        **prefixed("first_stage_model.", family.vae.state_dict()),
        **prefixed("conditioner.embedders.0.transformer.", first),
        **prefixed("conditioner.embedders.1.model.", as_open_clip(second)),
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "all.safetensors")
    written = load_file(engine.export(tmp_path / "sgm", layout="sgm") / "small-sdxl.safetensors")
    assert written.keys() == tensors.keys() - {"conditioner.embedders.1.model.logit_scale"}
    assert all(torch.equal(written[name], tensors[name]) for name in written)
    report = inspect(tmp_path / "all.safetensors")
    assert [part["missing"] for part in report["parts"]] == [[]] * 4
    lost = [
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.conv_in.bias",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.bias",
        "conditioner.embedders.1.model.transformer.resblocks.2.ln_1.weight",
    ]
    save_file({k: v for k, v in written.items() if k not in lost}, tmp_path / "lacking.safetensors")
    report = inspect(tmp_path / "lacking.safetensors")
    assert [part["missing"] for part in report["parts"]] == [[name] for name in lost]
    with pytest.raises(InvalidRequest, match="'diffusers' or 'sgm'"):
        engine.export(tmp_path / "bfl", layout="bfl")
    files = dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), tmp_path / "all.safetensors") | {
        part: folders[0] / part
        for part in ("tokenizer", "tokenizer_2", "text_encoder/config.json", "text_encoder_2/config.json")
    }
    loaded = Engine(load_family(engine.spec, files, Place(), embedding_cache=0))
    assert torch.equal(run(loaded, num_inference_steps=2), run(engine, num_inference_steps=2))


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def as_open_clip(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names -> OpenCLIP's, written out by hand."""
    stored = {name.removeprefix("text_model."): value for name, value in stored.items()}
    out = {
        "token_embedding.weight": stored["embeddings.token_embedding.weight"],
        "positional_embedding": stored["embeddings.position_embedding.weight"],
        "text_projection": stored["text_projection.weight"].T,
        "logit_scale": torch.tensor(1.0),
        **{f"ln_final.{leaf}": stored[f"final_layer_norm.{leaf}"] for leaf in ("weight", "bias")},
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for i in range(3):
        there, here = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            joined = [stored[f"{here}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            out[f"{there}.attn.in_proj_{leaf}"] = torch.cat(joined)
            out[f"{there}.attn.out_proj.{leaf}"] = stored[f"{here}.self_attn.out_proj.{leaf}"]
            out |= {f"{there}.{theirs}.{leaf}": stored[f"{here}.{ours}.{leaf}"] for ours, theirs in names.items()}
    return out


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"refine": "expert_ensemble_refiner"}, "refine"),
        ({"high_noise_frac": 0.5}, "high_noise_frac"),
        ({"refine_steps": 5}, "refine_steps"),
        ({"scheduler": "Euler"}, "scheduler"),
        ({"scheduler": 7}, "scheduler"),
        ({"scheduler": "LCM", "num_inference_steps": 51}, "num_inference_steps"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale"),
        ({"refine": "twice"}, "refine"),
        ({"original_size": (64,)}, "original_size"),
        ({"crop_top_left": (-1, 0)}, "crop_top_left"),
        ({"target_size": "64x64"}, "target_size"),
        ({"prompt_weights": "yes"}, "prompt_weights"),
    ],
)
def test_bad_requests_name_the_field(engine: Engine, asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine(PROMPT, **asked)
    assert caught.value.field == field
    if field == "scheduler":
        assert all(name in str(caught.value) for name in SCHEDULERS)


def test_what_a_model_has_no_use_for_is_ignored_and_reported(engine: Engine, refined: Engine) -> None:
    turbo = replace(SDXL_TURBO, sizes=engine.spec.sizes)
    job = Request(prompt=PROMPT, guidance_scale=7.0, negative_prompt=NEGATIVE).resolve(turbo)
    assert (job.true_cfg_scale, job.guidance_scale) == (1.0, None)
    assert [note.split(" ")[0] for note in job.notes] == ["guidance_scale", "negative_prompt"]
    job = Request(prompt=PROMPT, refine="base_image_refiner", high_noise_frac=0.5).resolve(refined.spec)
    assert job.notes == ("high_noise_frac 0.5 ignored by base_image_refiner",)
    with pytest.raises(InvalidRequest, match="too few"):
        Request(prompt=PROMPT, refine="base_image_refiner", refine_steps=3).resolve(refined.spec)
    job = Request(prompt=PROMPT, width=61, height=64).resolve(engine.spec)
    assert (job.width, job.notes) == (64, ("width 61 rounded up to 64, a multiple of 8",))
    with pytest.raises(InvalidRequest, match="rounded up"):
        Request(prompt=PROMPT, width=61, height=64, strict=True).resolve(engine.spec)


def test_presets_have_the_published_defaults() -> None:
    wanted = {
        "sdxl": (50, 7.5, "K_EULER", "leading", "1"),
        "sdxl-turbo": (1, None, "K_EULER_ANCESTRAL", "trailing", "0.25"),
        "sdxl-lightning-2step": (2, 1.0, "K_EULER", "trailing", "1"),
        "sdxl-lightning-4step": (4, 1.0, "K_EULER", "trailing", "1"),
        "sdxl-lightning-8step": (8, 1.0, "K_EULER", "trailing", "1"),
        "sdxl-lcm": (4, 8.0, "LCM", "leading", "1"),
    }
    for name, values in wanted.items():
        spec = hub.find(name).model_spec()
        assert isinstance(spec, SDXLSpec)
        schedule = spec.schedule
        found = (spec.num_inference_steps, spec.guidance_scale, schedule.scheduler, schedule.timestep_spacing)
        assert (*found, spec.sizes.classes[0]) == values
    assert Request(prompt="x").resolve(SDXL_TURBO).width == 512


def test_a_refiner_goes_with_sdxl_only(folders: tuple[Path, Path]) -> None:
    base, refiner = map(str, folders)
    for model, beside, words in (
        (refiner, None, "refines what another model drew"),
        (base, base, "is no refiner"),
        ("demo-schnell", refiner, "is no SDXL model"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            flux_engine.load(model, refiner=beside)
    with pytest.raises(UnknownModel, match="not by 3"):
        flux_engine.load(base, refiner=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheduler", ["K_EULER_ANCESTRAL", "DPM++2MSDE", "LCM"])
def test_a_batch_is_its_singles(dtype: torch.dtype, scheduler: str) -> None:
    """Also where noise is drawn on the way: from each picture's own generator."""
    family = sdxl_models.family()
    for network in family.networks().values():
        network.to(dtype)
    engine = Engine(family)
    asked: dict[str, Any] = {"scheduler": scheduler, "num_inference_steps": 3}
    batch = run(engine, num_outputs=3, seed=10, **asked)
    singles = torch.cat([run(engine, seed=10 + k, **asked) for k in range(3)])
    assert latent_error(batch, singles) <= (1e-5 if dtype == torch.float32 else 0)


@pytest.mark.parametrize(("scheduler", "calls"), [("K_EULER", 4), ("HeunDiscrete", 7), ("PNDM", 5)])
def test_every_call_is_told_with_what_is_foreseen(engine: Engine, scheduler: str, calls: int) -> None:
    """Calls, not steps; the last foresees what comes out."""
    seen: list[Step] = []
    result = engine(
        PROMPT, scheduler=scheduler, num_inference_steps=4, guidance_scale=1.0, seed=3, output_type="latent",
        on_step=seen.append, **SIZE,
    )  # fmt: skip
    assert [(step.index, step.total) for step in seen] == [(i + 1, calls) for i in range(calls)]
    assert 1 > seen[0].timestep > seen[-1].timestep >= 0
    assert seen[0].preview()[0].size == (SIZE["width"] // 8, SIZE["height"] // 8)
    if scheduler == "K_EULER":  # whose last step goes to where no noise is left
        assert latent_error(seen[-1].latent[0], result[0]) <= 1e-5


def test_cancelled_between_the_stages(refined: Engine) -> None:
    cancel = threading.Event()
    seen: list[int] = []

    def stop(step: Step) -> None:
        seen.append(step.index)
        if step.index == 4:
            cancel.set()

    asked: dict[str, Any] = {"refine": "base_image_refiner", "refine_steps": 10, "num_inference_steps": 4}
    with pytest.raises(RequestCancelled):
        refined(PROMPT, cancel=cancel, on_step=stop, **asked, **SIZE)
    assert seen == [1, 2, 3, 4]
    assert run(refined, num_inference_steps=2).isfinite().all()


TURBO = DiffusionSchedule(scheduler="K_EULER_ANCESTRAL", timestep_spacing="trailing")
PRESETS = {
    "turbo": (replace(sdxl_models.BASE, schedule=TURBO, guidance_scale=None), 2, 0.0),
    "lightning": (replace(sdxl_models.BASE, schedule=replace(TURBO, scheduler="K_EULER"), guidance_scale=None), 4, 0.0),
    "v": (replace(sdxl_models.BASE, schedule=DiffusionSchedule(prediction_type="v_prediction")), 4, 3.0),
    "LCM": (
        replace(
            sdxl_models.BASE,
            unet=replace(sdxl_models.BASE.unet, guidance_embed=True),
            schedule=DiffusionSchedule(scheduler="LCM"),
            guidance_embedded=True,
            guidance_scale=8.0,
        ),
        4,
        8.0,
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_agree_with_diffusers(name: str, tmp_path: Path) -> None:
    """With their own defaults; and no more network rows than needed where there is no classifier-free guidance."""
    spec, steps, scale = PRESETS[name]
    engine = Engine(sdxl_models.family(spec))
    pipe = StableDiffusionXLPipeline.from_pretrained(engine.export(tmp_path / "model"), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    rows: list[int] = []
    handle = engine._pipeline.family.net.conv_in.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    mine = torch.stack(list(engine(PROMPT, num_inference_steps=steps, seed=3, output_type="latent", **SIZE)))
    handle.remove()
    asked: dict[str, Any] = {"guidance_scale": 3.0} if name == "v" else {}
    if asked:
        mine = run(engine, num_inference_steps=steps, negative_prompt=None, **asked)
    assert set(rows) == ({2} if name == "v" else {1})
    reference = pipe(
        PROMPT, generator=generator(), num_inference_steps=steps, guidance_scale=scale, output_type="latent", **SIZE
    ).images
    assert latent_error(mine, reference) <= 1e-4
    other = torch.stack(list(engine("a green cross", num_inference_steps=steps, seed=3, output_type="latent", **SIZE)))
    assert latent_error(other, mine) >= 1e-2
