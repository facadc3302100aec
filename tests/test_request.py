"""A request is checked and completed before anything is loaded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flux_engine import InvalidRequest, Request
from flux_engine.specs import DEMO_SCHNELL, FLUX_DEV, FLUX_SCHNELL


def test_defaults() -> None:
    job = Request(prompt="x").resolve(FLUX_SCHNELL)
    assert (job.width, job.height) == (1024, 1024)
    assert job.num_inference_steps == 4
    assert job.guidance_scale is None
    assert job.true_cfg_scale == 1.0
    assert len(job.seeds) == 1
    assert job.notes == ()
    assert Request(prompt="x").resolve(FLUX_DEV).guidance_scale == 3.5


def test_zero_is_a_value() -> None:
    job = Request(prompt="", seed=0, guidance_scale=0).resolve(FLUX_DEV)
    assert job.seeds == (0,)
    assert job.guidance_scale == 0.0
    assert job.prompts == ("",)


def test_every_picture_has_its_own_prompt_and_seed() -> None:
    job = Request(prompt=["a", "b"], num_outputs=2, seed=7).resolve(FLUX_SCHNELL)
    assert job.prompts == ("a", "a", "b", "b")
    assert job.seeds == (7, 8, 9, 10)


def test_seeds_wrap_at_the_top() -> None:
    assert Request(prompt="x", seed=2**64 - 1, num_outputs=2).resolve(FLUX_SCHNELL).seeds == (2**64 - 1, 0)


def test_no_seed_draws_one_and_says_which() -> None:
    seeds = {Request(prompt="x").resolve(FLUX_SCHNELL).seeds[0] for _ in range(8)}
    assert len(seeds) > 1


def test_size_off_the_grid_is_rounded_up_and_reported() -> None:
    job = Request(prompt="x", width=769, height=1080).resolve(FLUX_SCHNELL)
    assert (job.width, job.height) == (784, 1088)
    assert job.notes == (
        "width 769 rounded up to 784, a multiple of 16",
        "height 1080 rounded up to 1088, a multiple of 16",
    )
    with pytest.raises(InvalidRequest, match="strict: width 769"):
        Request(prompt="x", width=769, height=1080, strict=True).resolve(FLUX_SCHNELL)


def test_guidance_for_a_model_without_is_reported() -> None:
    job = Request(prompt="x", guidance_scale=3.5).resolve(DEMO_SCHNELL)
    assert job.guidance_scale is None
    assert job.notes == ("guidance_scale 3.5 ignored: demo-schnell takes no guidance",)


def test_a_negative_prompt_turns_guidance_on() -> None:
    assert Request(prompt="x", negative_prompt="y").resolve(DEMO_SCHNELL).true_cfg_scale > 1
    assert Request(prompt="x", negative_prompt="").resolve(DEMO_SCHNELL).true_cfg_scale == 1
    assert Request(prompt="x", true_cfg_scale=3).resolve(DEMO_SCHNELL).true_cfg_scale == 3


def test_numpy_numbers_are_numbers() -> None:
    job = Request(prompt="x", seed=np.int64(3), num_outputs=np.int32(2), true_cfg_scale=np.float32(2)).resolve(
        DEMO_SCHNELL
    )
    assert job.seeds == (3, 4)
    assert type(job.seeds[0]) is int
    assert type(job.true_cfg_scale) is float


BAD = {
    "prompt": [None, 3, b"bytes", [], ["a", None], {"a": 1}, "x" * 200_000, "\ud800"],
    "negative_prompt": [3, ["a"]],
    "aspect_ratio": ["", "1:2", "16x9", 1.5, "1:1 "],
    "megapixels": ["2", True, 0.5, ""],
    "num_outputs": [0, -1, 65, 1.0, "1", True, None, 10**30],
    "num_inference_steps": [0, -4, 1001, 4.0, "4", math.nan],
    "guidance_scale": [math.nan, math.inf, -1, 101, "3", True],
    "true_cfg_scale": [math.nan, -math.inf, 0.5, 101, "3"],
    "seed": [-1, 2**64, 1.5, "1", True, math.nan],
    "output_type": ["jpeg", None, 3],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    fields = {"prompt": "x"} | {field: value}
    with pytest.raises(InvalidRequest) as caught:
        Request(**fields).resolve(FLUX_DEV)  # pyright: ignore[reportArgumentType]
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "size",
    [
        {"width": 0, "height": 256},
        {"width": -16, "height": 256},
        {"width": 256, "height": 10**9},
        {"width": 256.0, "height": 256},
        {"width": "256", "height": 256},
        {"width": 256},
        {"height": 256},
        {"width": 256, "height": 256, "aspect_ratio": "1:1"},
        {"width": 256, "height": 256, "megapixels": "1"},
    ],
)
def test_bad_sizes_are_refused(size: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request(prompt="x", **size).resolve(FLUX_SCHNELL)  # pyright: ignore[reportArgumentType]
    assert caught.value.field in {"width", "height", "aspect_ratio", "megapixels"}


def test_too_many_pictures_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="80 pictures"):
        Request(prompt=["x"] * 20, num_outputs=4).resolve(FLUX_SCHNELL)


def test_invalid_request_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="num_outputs 0"):
        Request(prompt="x", num_outputs=0).resolve(FLUX_SCHNELL)
