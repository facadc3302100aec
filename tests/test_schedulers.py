"""Schedules against the published values, and against diffusers' scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flux_engine.checkpoints.export import flux_scheduler_config
from flux_engine.schedulers import flow_match_euler
from flux_engine.sizes import PUBLISHED_SIZES, SizeTable
from flux_engine.specs import FLUX_DEV, FLUX_SCHNELL


def test_schnell_is_even() -> None:
    assert flow_match_euler(FLUX_SCHNELL.schedule, 4, 4096).sigmas == (1.0, 0.75, 0.5, 0.25, 0.0)


@pytest.mark.parametrize(("tokens", "mu"), [(4096, 1.15), (1024, 0.63), (4032, 1.1392), (988, 0.6239), (256, 0.5)])
def test_dev_is_shifted_by_the_number_of_tokens(tokens: int, mu: float) -> None:
    sigmas = flow_match_euler(FLUX_DEV.schedule, 28, tokens).sigmas
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    middle = np.exp(mu) / (np.exp(mu) + 1)  # t = 1/2 goes to e^mu / (e^mu + 1)
    assert sigmas[14] == pytest.approx(middle, abs=2e-5)
    assert all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False))


@pytest.mark.parametrize("spec", [FLUX_SCHNELL, FLUX_DEV], ids=lambda s: s.name)
@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("tokens", [256, 1008, 4096])
def test_schedule_and_step_agree_with_diffusers(spec, steps: int, tokens: int) -> None:
    config = flux_scheduler_config(spec.schedule)
    del config["_class_name"]
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    p = spec.schedule
    slope = (p.max_shift - p.base_shift) / (p.max_tokens - p.base_tokens)
    mu = p.base_shift + slope * (tokens - p.base_tokens)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    ours = flow_match_euler(p, steps, tokens)
    assert ours.sigmas == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)
    x = torch.randn(1, 8, 4)
    reference = x
    for call, t in enumerate(theirs.timesteps):
        velocity = torch.sin(x * (call + 1))
        reference = theirs.step(velocity, t, reference, return_dict=False)[0]
        x = ours.step(velocity, call, x)
    assert torch.allclose(x, reference, atol=1e-5)


def test_published_sizes() -> None:
    table = SizeTable()
    expected = {  # facts read off the hosted models
        ("1:1", "1"): (1024, 1024), ("1:1", "0.25"): (512, 512),
        ("16:9", "1"): (1344, 768), ("16:9", "0.25"): (672, 384),
        ("21:9", "0.25"): (768, 320), ("3:2", "0.25"): (608, 416),
        ("4:5", "1"): (896, 1088), ("9:21", "0.25"): (320, 768),
    }  # fmt: skip
    for (ratio, megapixels), size in expected.items():
        assert table.named(ratio, megapixels) == size
    tokens = {w * h // 256 for ratio in PUBLISHED_SIZES for mp in ("1", "0.25") for w, h in [table.named(ratio, mp)]}
    assert tokens == {4096, 4032, 3952, 3840, 3808, 1024, 1008, 988, 960, 952}


def test_demo_sizes_are_the_published_ones_in_small() -> None:
    table = SizeTable(divisor=4)
    assert table.named("1:1") == (256, 256)
    assert table.named("1:1", "0.25") == (128, 128)
    assert table.named("16:9") == (336, 192)
    for ratio in PUBLISHED_SIZES:
        for megapixels in ("1", "0.25"):
            assert all(side % 16 == 0 for side in table.named(ratio, megapixels))
