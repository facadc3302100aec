"""SDXL's prompts: agreement with diffusers, what is over one chunk, and what several chunks are."""

from __future__ import annotations

from typing import Any

import pytest
import sdxl_models
import torch
from conftest import latent_error, relative_error
from diffusers import StableDiffusionXLPipeline

from flux_engine.engine import Engine
from flux_engine.errors import InvalidRequest
from flux_engine.families.base import Condition
from flux_engine.result import Result

PROMPT = "a large red circle on a blue background"
NEGATIVE = "a small star"
LONG = " ".join(["a small star"] * 25 + ["and"] * 5)
"""80 tokens, five more than are read."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(sdxl_models.family())


@pytest.fixture(scope="module")
def theirs(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    folder = engine.export(tmp_path_factory.mktemp("base") / "model")
    return StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)


def draw(engine: Engine, prompt: str | list[str], **asked: Any) -> Result:
    small = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 3, "guidance_scale": 9.0}
    return engine(prompt, output_type="latent", **(small | asked))


@pytest.mark.parametrize("prompt", [PROMPT, "", LONG, LONG + " red" * 300, "größer 🎨, (red:1.3)"])
@pytest.mark.parametrize("negative", [NEGATIVE, "", LONG, None])
def test_prompts_are_encoded_as_diffusers_encodes_them(
    engine: Engine, theirs: StableDiffusionXLPipeline, prompt: str, negative: str | None
) -> None:
    job = draw(engine, prompt, negative_prompt=negative, num_inference_steps=1).job
    encoded = engine._pipeline.family.encode(job, Condition())
    rows = [encoded.text.tokens[row] for row in encoded.rows], [encoded.text.pooled[row] for row in encoded.rows]
    tokens, negative_tokens, pooled, negative_pooled = theirs.encode_prompt(
        prompt, negative_prompt=negative, do_classifier_free_guidance=True
    )
    for found, wanted in zip(rows, ((negative_tokens, tokens), (negative_pooled, pooled)), strict=True):
        for one, reference in zip(found, wanted, strict=True):
            if reference.any():
                assert relative_error(one, reference[0]) <= 1e-5
            assert torch.equal(one == 0, reference[0] == 0)
            assert bool(reference.any()) == (reference is wanted[1] or negative is not None)


def test_no_negative_prompt_is_not_an_empty_one(engine: Engine) -> None:
    none, empty = (draw(engine, PROMPT, negative_prompt=negative).image for negative in (None, ""))
    assert latent_error(empty, none) >= 1e-3


def test_what_is_over_is_cut_and_reported(engine: Engine) -> None:
    cut = draw(engine, LONG)
    (note,) = cut.notes
    assert note.startswith("prompt cut to 77 tokens, the last 5 are not read; prompt_chunks=True reads them: 'a small")
    assert torch.equal(cut.image, draw(engine, LONG.removesuffix(" and" * 5)).image)
    assert torch.equal(cut.image, draw(engine, LONG + " red").image)
    assert draw(engine, LONG.removesuffix(" and" * 5)).notes == ()
    for fields in ({"prompt": LONG}, {"prompt": PROMPT, "negative_prompt": LONG}):
        with pytest.raises(
            InvalidRequest, match=r"strict: (negative )?prompt cut to 77 tokens, the last 5.*=True"
        ) as caught:
            draw(engine, **fields, strict=True)
        assert caught.value.field == "prompt"
    assert len(draw(engine, [LONG, LONG + " red red", PROMPT], negative_prompt=LONG + " x").notes) == 3


def test_chunks_read_all_of_it(engine: Engine) -> None:
    first = draw(engine, LONG, prompt_chunks=True, strict=True)
    assert first.notes == ()
    assert latent_error(first.image, draw(engine, LONG).image) >= 1e-3
    other = draw(engine, LONG + " red green blue white black", prompt_chunks=True).image
    assert latent_error(other, first.image) >= 1e-3
    assert torch.equal(draw(engine, PROMPT, prompt_chunks=True).image, draw(engine, PROMPT).image)


def test_negative_and_positive_may_have_other_numbers_of_chunks(engine: Engine) -> None:
    text = engine._pipeline.family.text
    longer = LONG * 2
    asked = ((PROMPT, LONG), (LONG, NEGATIVE), (longer, LONG), (LONG, None), (LONG, ""))
    pictures = [draw(engine, prompt, negative_prompt=negative, prompt_chunks=True).image for prompt, negative in asked]
    assert all(picture.isfinite().all() for picture in pictures)
    changed = draw(engine, PROMPT, negative_prompt=LONG + " red green blue", prompt_chunks=True).image
    assert latent_error(changed, pictures[0]) >= 1e-3
    # The shorter one is filled with chunks that are empty.
    both = text.encode([longer, PROMPT], chunks=True)
    assert both.tokens.shape == (2, 3 * 77, sum(sdxl_models.WIDTHS))
    assert torch.equal(both.tokens[1:, :77], text.encode([PROMPT]).tokens)
    for chunk in (1, 2):
        assert torch.equal(both.tokens[1:, 77 * chunk : 77 * chunk + 77], text.encode([""]).tokens)


def test_chunks_are_read_one_by_one_and_the_first_is_pooled(engine: Engine) -> None:
    text = engine._pipeline.family.text
    found = text.encode([LONG], chunks=True)
    begin, end = LONG.removesuffix(" and" * 5), "and and and and and"
    assert torch.equal(found.tokens, torch.cat((text.encode([begin]).tokens, text.encode([end]).tokens), dim=1))
    assert torch.equal(found.pooled, text.encode([begin]).pooled)
    assert relative_error(found.pooled, text.encode([end]).pooled) >= 1e-2


def test_a_batch_of_long_prompts_is_its_singles(engine: Engine) -> None:
    prompts = [LONG, LONG + " red", LONG + " green"]
    batch = draw(engine, prompts, prompt_chunks=True)
    for number, prompt in enumerate(prompts):
        alone = draw(engine, prompt, prompt_chunks=True, seed=3 + number).image
        assert latent_error(batch[number], alone) <= 1e-5


def test_weights_reach_into_later_chunks(engine: Engine) -> None:
    plain = draw(engine, LONG, prompt_chunks=True).image
    more = draw(engine, LONG.replace("and and", "(and:1.9) and", 1), prompt_chunks=True, prompt_weights=True).image
    assert not torch.equal(more, plain)
    text = engine._pipeline.family.text
    found = text.encode([LONG + " (red:1.5)"], weights=True, chunks=True).tokens
    assert torch.equal(found[:, 77:], text.encode(["and and and and and (red:1.5)"], weights=True).tokens)
