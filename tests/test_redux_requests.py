"""Pictures as prompts in whole requests, against diffusers' FluxPriorReduxPipeline before its FluxPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import latent_error
from diffusers import FluxPipeline
from test_redux import DEMO_WIDTH, picture, publish, theirs

import flux_engine
from flux_engine.engine import Engine
from flux_engine.errors import InvalidRequest, UnknownModel, WeightsError
from flux_engine.families.base import generators_of
from flux_engine.families.flux import patchify

PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module", params=["demo-schnell", "demo-dev"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("redux")
    publish(folder, DEMO_WIDTH)
    (folder / "redux.safetensors").rename(folder / "image_embedder.safetensors")
    (folder / "image_embedder").mkdir()
    (folder / "image_embedder.safetensors").rename(folder / "image_embedder" / "model.safetensors")
    return flux_engine.load(request.param, device="cpu", dtype="float32", redux=folder)


def run(engine: Engine, **changed: Any) -> torch.Tensor:
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 3, "output_type": "latent"}
    return torch.stack(list(engine(**(asked | changed))))


def test_words_with_a_picture_agree_with_diffusers(engine: Engine, tmp_path: Path) -> None:
    mine = run(engine, image_prompt=picture(1), width=128, height=96)
    pipe = FluxPipeline.from_pretrained(engine.export(tmp_path / "model"))
    pipe.set_progress_bar_config(disable=True)
    parts = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    prior = theirs(publish(tmp_path / "redux", DEMO_WIDTH), DEMO_WIDTH, **parts)
    text = pipe.encode_prompt(PROMPT, PROMPT, max_sequence_length=engine.spec.max_sequence_length)
    tokens = prior(picture(1), prompt=PROMPT, prompt_2=PROMPT).prompt_embeds[
        :, -9:
    ]  # its words are cut at another length than the model's
    job = flux_engine.Request(prompt=PROMPT, seed=3, width=128, height=96).resolve(engine.spec)
    noise = engine._pipeline.family.noise(generators_of(job), *job.latent_size)
    reference = pipe(
        prompt_embeds=torch.cat((text[0], tokens), dim=1), pooled_prompt_embeds=text[1], latents=patchify(noise),
        width=128, height=96, num_inference_steps=3, guidance_scale=engine.spec.guidance_scale or 0.0,
        output_type="latent",
    ).images  # fmt: skip
    assert latent_error(patchify(mine), reference) <= 1e-4
    for control in ({"image_prompt": picture(2)}, {"image_prompt": None}, {"image_prompt_strength": 0.2}):
        assert latent_error(run(engine, **({"image_prompt": picture(1), "width": 128, "height": 96} | control)), mine) \
            >= 1e-2  # fmt: skip


def test_several_pictures_and_no_words(engine: Engine) -> None:
    one, two = (run(engine, prompt="", image_prompt=pictures) for pictures in ([picture(1)], [picture(1), picture(2)]))
    assert one.isfinite().all()
    assert latent_error(two, one) >= 1e-2
    batch = run(engine, image_prompt=[picture(1)], num_outputs=2)
    singles = torch.cat([run(engine, image_prompt=picture(1), seed=3 + k) for k in range(2)])
    assert torch.equal(batch, singles)


def test_what_cannot_be_is_refused(engine: Engine, tmp_path: Path) -> None:
    for asked in ({"image_prompt": "nothing.jpg"}, {"image_prompt": [picture(1), 3]}):
        with pytest.raises(InvalidRequest) as caught:
            run(engine, **asked)
        assert caught.value.field == "image_prompt"
    with pytest.raises(InvalidRequest, match="without image_prompt"):
        run(engine, image_prompt_strength=0.5)
    with pytest.raises(InvalidRequest, match=r"load\('demo-dev', redux="):
        flux_engine.load("demo-dev", device="cpu")(PROMPT, image_prompt=picture(1))
    with pytest.raises(UnknownModel, match="did you mean 'flux-redux-dev'"):
        flux_engine.load("demo-dev", device="cpu", redux="flux-redux-dv")
    with pytest.raises(WeightsError, match="has no image_embedder"):
        flux_engine.load("demo-dev", device="cpu", redux=tmp_path)
    wide = tmp_path / "wide"
    publish(wide / "parts", 80)
    (wide / "adapter").mkdir(parents=True)
    (wide / "parts" / "redux.safetensors").rename(wide / "adapter" / "model.safetensors")
    (wide / "parts" / "image_encoder").rename(wide / "image_encoder")
    with pytest.raises(WeightsError, match="gives tokens 80 wide"):
        flux_engine.load("demo-dev", device="cpu", redux=wide)
