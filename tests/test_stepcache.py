"""What is left out of a walk because a request asks for it: by a step cache, or by guidance in an interval."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import flux_models
import numpy as np
import pytest
import sdxl_models
import torch
from conftest import latent_error, relative_error
from PIL import Image
from torch import Tensor, nn

import flux_engine
from flux_engine import Control, FirstBlockCache, InvalidRequest, Request, RequestCancelled, TaylorCache, cli
from flux_engine.conditions import build_condition
from flux_engine.engine import Engine
from flux_engine.footprint import work_of
from flux_engine.images import read_parameters
from flux_engine.placing import extent_of
from flux_engine.request import Job
from flux_engine.specs import DEMO_SCHNELL, FLUX_DEV, SDXL
from flux_engine.stepcache import Taylor, extrapolated

SIZE = {"width": 128, "height": 128}
STEPS = 12
FIRST_BLOCK, TAYLOR = FirstBlockCache(threshold=0.12), TaylorCache(warmup=3)
CACHES = pytest.mark.parametrize("cache", [FIRST_BLOCK, TAYLOR], ids=lambda cache: cache.name)


@pytest.fixture(scope="module")
def dev() -> Engine:
    """demo-dev with the ControlNet that ships."""
    return flux_engine.load("demo-dev", device="cpu", dtype="float32", controlnets=["canny"])


@pytest.fixture(scope="module")
def sdxl() -> Engine:
    return flux_engine.load("demo-sdxl", device="cpu", dtype="float32", controlnets=["canny"])


@pytest.fixture(scope="module")
def refined() -> Engine:
    return Engine(sdxl_models.family().refined_by(sdxl_models.family(sdxl_models.REFINER)))


def run(engine: Engine, prompt: Any = "a large red circle on a blue background", **fields: Any) -> Any:
    said = {"seed": 3, "num_inference_steps": STEPS, "output_type": "latent"}
    return engine(prompt, **(said | ({} if "image" in fields else SIZE) | fields))


def bits(engine: Engine, **fields: Any) -> Tensor:
    return torch.stack(list(run(engine, **fields)))


def picture() -> Image.Image:
    image = Image.new("RGB", (128, 128), "green")
    image.paste("red", (32, 32, 96, 96))
    return image


def hole() -> Image.Image:
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (16, 16, 112, 80))
    return mask


@contextmanager
def rows_read(module: nn.Module) -> Iterator[list[int]]:
    """How many rows a module reads, every time."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, read: seen.append(len(read[0])))
    try:
        yield seen
    finally:
        handle.remove()


# --- what changes nothing


@torch.inference_mode()
def test_the_parts_of_the_forward_pass_are_the_whole(dev: Engine) -> None:
    """Block by block as it was before it had parts, to the bit, with a ControlNet's residuals."""
    family = dev._pipeline.family
    net = family.net
    job = Request(prompt=["a red star", "x"], seed=0, **SIZE).resolve(dev.spec)
    stage = family.stages(job, build_condition(job, family))[0]
    statics = family.statics(job, family.encode(job, stage.condition), stage)
    x = stage.begin(None).x
    generator = torch.Generator().manual_seed(0)
    count = len(net.double_blocks) + len(net.single_blocks)
    tokens = (2, x.shape[1], net.params.hidden_size)
    added = [torch.randn(tokens, generator=generator) if n % 2 == 0 else None for n in range(count)]
    for residuals in (None, tuple(added)):
        slots = iter(residuals or [None] * count)
        img, txt = net.img_in(x), statics.txt
        for block, (img_mod, txt_mod), slot in zip(net.double_blocks, statics.double, slots, strict=False):
            img, txt = block(img, txt, img_mod[1], txt_mod[1], statics.cos, statics.sin)
            img = img if slot is None else img + slot
        joined = torch.cat((txt, img), dim=1)
        slots = (residuals or [None] * count)[len(net.double_blocks) :]
        for block, mod, slot in zip(net.single_blocks, statics.single, slots, strict=True):
            joined = block(joined, mod[1], statics.cos, statics.sin)
            if slot is not None:
                joined = torch.cat((joined[:, : txt.shape[1]], joined[:, txt.shape[1] :] + slot), dim=1)
        expected = net.final_layer(joined[:, txt.shape[1] :], statics.final[1])
        assert torch.equal(net(x, 1, statics, residuals), expected)


@pytest.mark.parametrize(
    "cache", ["first-block:threshold=0", "first-block:max_skips=0,threshold=5", "taylor:interval=1", "taylor:warmup=99"]
)
@pytest.mark.parametrize("guided", [False, True])
def test_a_cache_that_leaves_nothing_out_changes_no_bit(dev: Engine, cache: str, guided: bool) -> None:
    asked: dict[str, Any] = {"num_outputs": 2, "num_inference_steps": 5}
    asked |= {"negative_prompt": "a star"} if guided else {}
    result = run(dev, step_cache=cache, **asked)
    assert torch.equal(torch.stack(list(result)), bits(dev, **asked))
    assert result.skipped == ((), ())
    assert result.notes[-1].endswith("0 of 5 calls were not computed whole")


def test_off_is_silent(dev: Engine) -> None:
    result = run(dev, num_inference_steps=2)
    assert result.notes == () and result.skipped == ((),)
    assert "cache" not in result.parameters() and "interval" not in result.parameters()


def test_guidance_in_all_of_the_interval_is_guidance(dev: Engine, sdxl: Engine) -> None:
    for engine in (dev, sdxl):
        asked = {"negative_prompt": "a star", "num_inference_steps": 4}
        assert torch.equal(bits(engine, guidance_interval=(0, 1), **asked), bits(engine, **asked))


# --- what is left out


def test_errors_grow_with_what_is_left_out(dev: Engine) -> None:
    exact = bits(dev, num_inference_steps=28)
    for caches, bounds in (
        ([FirstBlockCache(threshold, max_skips=9) for threshold in (0.05, 0.1, 0.3)], (0.02, 0.04, 0.3)),
        ([TaylorCache(interval) for interval in (2, 3, 6)], (0.01, 0.03, 0.2)),
    ):
        results = [run(dev, num_inference_steps=28, step_cache=cache) for cache in caches]
        errors = [latent_error(result[0], exact[0]) for result in results]
        assert errors == sorted(errors) and errors[0] > 0
        assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors
        counts = [len(result.skipped[0]) for result in results]
        assert counts == sorted(set(counts))


def test_the_blocks_that_are_left_out_do_not_run(dev: Engine) -> None:
    net = dev._pipeline.family.net
    for cache, every in ((FIRST_BLOCK, STEPS), (TAYLOR, None)):
        with rows_read(net.double_blocks[0]) as first, rows_read(net.single_blocks[-1]) as last:
            result = run(dev, step_cache=cache)
        skipped = len(result.skipped[0])
        assert 0 < skipped < STEPS and len(last) == STEPS - skipped
        assert len(first) == (every or len(last))
        assert result.notes == (f"step_cache {cache}: {skipped} of {STEPS} calls were not computed whole",)
        assert f'Step cache: "{cache}"' in result.parameters()


def test_so_many_calls_in_a_row_are_left_out_and_no_more(dev: Engine) -> None:
    result = run(dev, step_cache=FirstBlockCache(threshold=10, max_skips=2))
    assert result.skipped == ((2, 3, 5, 6, 8, 9, 11, 12),)


def test_taylor_computes_the_calls_that_it_says(dev: Engine) -> None:
    assert run(dev, step_cache="taylor:interval=4,warmup=2").skipped == ((3, 4, 5, 7, 8, 9, 11),)
    assert run(dev, step_cache="taylor:interval=4,warmup=0,order=0").skipped == ((2, 3, 4, 6, 7, 8, 10, 11),)


class Told:
    """A network that answers with a polynomial in the number of the call."""

    def __init__(self, degree: int) -> None:
        self.degree = degree
        self.calls: list[int] = []

    def __call__(self, seen: Tensor, call: int) -> Tensor:
        self.calls.append(call)
        return self.at(call).expand_as(seen)

    def at(self, call: int) -> Tensor:
        return torch.tensor(sum((power + 2) * (call / 8 - 1) ** power for power in range(self.degree + 1)))

    def steered(self, call: int) -> tuple[bool, ...]:
        return ()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_is_foreseen(order: int) -> None:
    for degree in (order, order + 1):
        network = Told(degree)
        predict = Taylor(TaylorCache(interval=3, order=order, warmup=0), 1, 20)
        errors = [float((predict(network, torch.zeros(1, 2), n) - network.at(n)).abs().max()) for n in range(20)]  # pyright: ignore[reportArgumentType]
        assert len(network.calls) < 12
        assert (max(errors) < 1e-5) == (degree == order)


def test_nodes_need_not_be_evenly_spaced() -> None:
    known = [(call, torch.tensor(float(call**2))) for call in (1, 2, 5)]
    assert float(extrapolated(known, 9)) == pytest.approx(81)


@CACHES
def test_nothing_outlives_a_request(dev: Engine, cache: Any) -> None:
    before = bits(dev)
    first = bits(dev, step_cache=cache)
    bits(dev, prompt="a green square", step_cache=cache, seed=9)
    assert torch.equal(bits(dev, step_cache=cache), first)
    assert torch.equal(bits(dev), before) and not torch.equal(first, before)


@CACHES
def test_a_cancelled_request_leaves_nothing(dev: Engine, cache: Any) -> None:
    whole = bits(dev, step_cache=cache)
    cancel = threading.Event()
    with pytest.raises(RequestCancelled):
        run(dev, step_cache=cache, cancel=cancel, on_step=lambda step: cancel.set() if step.index == 6 else None)
    assert torch.equal(bits(dev, step_cache=cache), whole)


@pytest.mark.parametrize(
    ("cache", "guided"), [(FIRST_BLOCK, False), (FIRST_BLOCK, True), (TAYLOR, True)], ids=["alone", "guided", "taylor"]
)
def test_a_picture_of_a_batch_is_as_it_would_be_alone(dev: Engine, cache: Any, guided: bool) -> None:
    """Pictures decide for themselves: here they leave out other calls."""
    prompts = ["a large red circle on a blue background", "a small yellow star at the top left", "x"]
    asked = {"step_cache": cache} | ({"negative_prompt": "a green square"} if guided else {})
    batch = run(dev, prompt=prompts, **asked)
    alone = [run(dev, prompt=prompt, seed=3 + k, **asked) for k, prompt in enumerate(prompts)]
    assert batch.skipped == tuple(one.skipped[0] for one in alone)
    if cache is FIRST_BLOCK:
        assert len(set(batch.skipped)) > 1, "or this shows nothing"
    assert relative_error(torch.stack(list(batch)), torch.stack([one[0] for one in alone])) <= 1e-5


# --- guidance in an interval


@torch.inference_mode()
def by_hand(engine: Engine, job: Job, guided: range) -> Tensor:
    family = engine._pipeline.family
    stage = family.stages(job, build_condition(job, family))[0]
    schedule, x = stage.schedule, stage.begin(None).x
    plain = replace(job, true_cfg_scale=1.0)
    both, positive = (family.statics(one, family.encode(one, stage.condition), stage) for one in (job, plain))
    for call in range(len(schedule.timesteps)):
        seen = schedule.input(x, call)
        if call in guided:
            low, high = family.net(torch.cat((seen, seen)), call, both).float().chunk(2)
            prediction = low + job.true_cfg_scale * (high - low)
        else:
            prediction = family.net(seen, call, positive)
        x = schedule.step(prediction, call, x)
    return family.to_latent(x, *job.latent_size)


@pytest.mark.parametrize("name", ["dev", "sdxl"])
def test_guidance_in_an_interval(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    asked = {"negative_prompt": "a blue star", "num_outputs": 2, "num_inference_steps": 8}
    with rows_read(engine._pipeline.family.net) as rows:
        result = run(engine, guidance_interval=(0.25, 0.7), **asked)
    assert rows == [2, 2, 4, 4, 4, 2, 2, 2]
    assert result.notes == ("guidance_interval 0.25 to 0.7: 3 of 8 calls were guided",)
    assert "CFG interval: 0.25-0.7" in result.parameters()
    assert relative_error(torch.stack(list(result)), by_hand(engine, result.job, range(2, 5))) <= 1e-6


@pytest.mark.parametrize("name", ["dev", "sdxl"])
def test_guidance_in_an_interval_beside_a_cache(name: str, request: pytest.FixtureRequest) -> None:
    """Where guidance comes in, a call is computed; where it ends, what is known of the positive rows serves on."""
    engine: Engine = request.getfixturevalue(name)
    caches = [
        "taylor:interval=3,order=0,warmup=0",
        *(["first-block:threshold=10,max_skips=2"] if name == "dev" else []),
    ]
    for cache in caches:
        with rows_read(engine._pipeline.family.net) as rows:
            result = run(engine, negative_prompt="a star", guidance_interval=(0.4, 0.7), step_cache=cache)
        assert result.skipped == ((2, 3, 5, 7, 8, 10, 11),)  # guided from call 6 to call 8
        if cache.startswith("taylor"):
            assert rows == [1, 1, 2, 1, 1]


def test_an_interval_that_holds_no_call_is_told(dev: Engine) -> None:
    result = run(dev, negative_prompt="a star", guidance_interval=(0.5, 0.51), num_inference_steps=2)
    assert result.notes == ("guidance_interval 0.5 to 0.51: 0 of 2 calls were guided",)
    job = Request(prompt="x", guidance_interval=(0, 0.5)).resolve(FLUX_DEV)
    assert job.guidance_interval is None
    assert job.notes == ("guidance_interval ignored: there is no classifier-free guidance to leave out",)
    with pytest.raises(InvalidRequest, match="strict: guidance_interval ignored"):
        Request(prompt="x", guidance_interval=(0, 0.5), strict=True).resolve(FLUX_DEV)


# --- beside everything else


@pytest.mark.parametrize(
    "asked",
    [
        {"image": picture(), "strength": 0.7},
        {"image": picture(), "mask": hole()},
        {"control": Control(kind="canny", image=picture(), preprocess=False, end=0.5)},
        {"control": Control(kind="canny", image=picture(), preprocess=False), "negative_prompt": "a star"},
    ],
    ids=["img2img", "inpaint", "ControlNet", "ControlNet with guidance"],
)
@pytest.mark.parametrize("name", ["dev", "sdxl"])
def test_tasks(name: str, asked: dict[str, Any], request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    exact = bits(engine, **asked)
    for cache in [TAYLOR, *([FIRST_BLOCK] if name == "dev" else [])]:
        result = run(engine, step_cache=cache, **asked)
        assert result.skipped[0]
        assert 0 < latent_error(result[0], exact[0]) < 0.1


@CACHES
def test_a_controlnet_that_comes_or_goes_is_seen(dev: Engine, cache: Any) -> None:
    """It counts from call 6 to call 9; it is computed only with the rest of the network."""
    asking = {"control": Control(kind="canny", image=picture(), preprocess=False, start=5 / 12, end=9 / 12)}
    eager = replace(cache, **({"threshold": 10} if cache is FIRST_BLOCK else {"interval": 9, "order": 0, "warmup": 0}))
    with rows_read(dev._pipeline.family.controlnets[0].net) as rows:
        skipped = run(dev, step_cache=eager, **asking).skipped[0]
    assert not {6, 10} & set(skipped) and {7, 8, 9, 11} <= set(skipped)
    assert rows == [1]


def test_tokens_behind_the_pictures_own(dev: Engine) -> None:
    kontext = flux_models.engine_of("reference", dev)
    asked: dict[str, Any] = {"image": picture(), **SIZE}
    exact = bits(kontext, **asked)
    for cache in (FirstBlockCache(threshold=0.5), TAYLOR):
        result = run(kontext, step_cache=cache, **asked)
        assert result.skipped[0] and 0 < latent_error(result[0], exact[0]) < 0.2


def test_every_stage_has_a_cache_of_its_own(refined: Engine) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 10, "scheduler": "HeunDiscrete", "negative_prompt": "a star"}
    for mode in ("expert_ensemble_refiner", "base_image_refiner"):
        base, refiner = refined._pipeline.family.net, refined._pipeline.family.refiner.net
        with rows_read(base) as first, rows_read(refiner) as second:
            result = run(refined, refine=mode, step_cache="taylor:warmup=2,order=0,interval=2", **asked)
        assert len(first) + len(second) + len(result.skipped[0]) == int(result.notes[-1].split(" of ")[1].split()[0])
        assert len(second) >= 2, "warmed up anew"


def test_callbacks_are_called_at_every_call(dev: Engine) -> None:
    seen: list[int] = []
    run(dev, step_cache=TAYLOR, on_step=lambda step: seen.append(step.index))
    assert seen == list(range(1, STEPS + 1))


def test_a_plan_counts_what_is_kept() -> None:
    def denoise(spec: Any, cache: Any) -> int:
        job = Request(prompt="x", step_cache=cache).resolve(spec)
        return work_of(spec, "bfloat16", False, extent_of(job))["denoise"]

    tokens = 2 * 4096 * FLUX_DEV.transformer.hidden_size
    assert denoise(FLUX_DEV, FIRST_BLOCK) - denoise(FLUX_DEV, None) == pytest.approx(4 * tokens, abs=2)
    assert denoise(SDXL, TAYLOR) > denoise(SDXL, None)


# --- how it is asked for


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("first-block", FirstBlockCache()),
        ("first-block:threshold=0.2", FirstBlockCache(0.2)),
        ("first-block:max_skips=5,threshold=1", FirstBlockCache(1.0, 5)),
        ("taylor", TaylorCache()),
        ("taylor:interval=5,order=2,warmup=0", TaylorCache(5, 2, 0)),
        (TaylorCache(interval=np.int64(4)), TaylorCache(4)),  # pyright: ignore[reportArgumentType]
    ],
)
def test_texts_and_objects_mean_the_same(said: Any, meant: Any) -> None:
    made = Request(prompt="x", step_cache=said).resolve(FLUX_DEV).step_cache
    assert made == meant
    assert Request(prompt="x", step_cache=str(made)).resolve(FLUX_DEV).step_cache == meant


nan = float("nan")
BAD: list[tuple[str, Any, str]] = [
    ("step_cache", "", "no step_cache ''. Known: first-block, taylor"),
    ("step_cache", "tailor", "did you mean 'taylor'"),
    ("step_cache", "first-block:", "'' is not KEY=VALUE"),
    ("step_cache", "first-block:0.1", "'0.1' is not KEY=VALUE"),
    ("step_cache", "first-block:threshold", "of threshold, max_skips"),
    ("step_cache", "first-block:threshold=", "threshold '' is not a number"),
    ("step_cache", "first-block:threshold=nan", "threshold nan is outside 0 to 10"),
    ("step_cache", "first-block:threshold=-1", "threshold -1.0 is outside"),
    ("step_cache", "first-block:interval=3", "'interval=3' is not KEY=VALUE"),
    ("step_cache", "taylor:order=1,order=2", "each once"),
    ("step_cache", "taylor:order=3", "order 3 is outside 0 to 2"),
    ("step_cache", "taylor:interval=0", "interval 0 is outside 1 to"),
    ("step_cache", "taylor:interval=2.5", "interval 2.5 is not an integer"),
    ("step_cache", "taylor:warmup=many", "warmup 'many' is not an integer"),
    ("step_cache", FirstBlockCache(threshold=nan), "threshold nan"),
    ("step_cache", FirstBlockCache(max_skips=-1), "max_skips -1"),
    ("step_cache", TaylorCache(interval=True), "interval True is not an integer"),
    ("step_cache", 0.1, "step_cache 0.1 is no FirstBlockCache"),
    ("step_cache", {"threshold": 0.1}, "is no FirstBlockCache"),
    ("step_cache", TaylorCache, "is no FirstBlockCache"),
    ("guidance_interval", 0.5, "no pair of shares"),
    ("guidance_interval", "0.2-0.8", "no pair of shares"),
    ("guidance_interval", (0.2,), "no pair of shares"),
    ("guidance_interval", (0.2, nan), "end nan is outside 0 to 1"),
    ("guidance_interval", (-0.1, 0.5), "start -0.1 is outside"),
    ("guidance_interval", (0, 1.5), "end 1.5 is outside"),
    ("guidance_interval", ("0", "1"), "start '0' is not a number"),
    ("guidance_interval", (0.8, 0.2), "start 0.8 is not before end 0.2"),
    ("guidance_interval", (0.5, 0.5), "is not before"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD)
def test_bad_values_are_refused_by_name(field: str, value: Any, message: str) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(InvalidRequest) as caught:
        Request(prompt="x", **fields).resolve(DEMO_SCHNELL)
    assert caught.value.field == field
    assert field in str(caught.value) and message in str(caught.value)


def test_a_unet_has_no_first_block() -> None:
    with pytest.raises(InvalidRequest, match=r"step_cache 'first-block' is for FLUX.1: .* Say 'taylor'"):
        Request(prompt="x", step_cache="first-block").resolve(SDXL)
    assert Request(prompt="x", step_cache="taylor").resolve(SDXL).step_cache == TaylorCache()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    asked = ["generate", "a red circle", "--model", "demo-dev", "--steps", "6", "--seed", "1", "--width", "64"]
    asked += ["--height", "64", "--output", str(out), "--json"]
    options = ["--step-cache", "taylor:warmup=2", "--true-cfg", "2", "--guidance-interval", "0-.5"]
    assert cli.main([*asked, *options]) == 0
    assert '"guidance_interval 0 to 0.5: 3 of 6 calls were guided"' in capsys.readouterr().out
    parameters = read_parameters(out) or ""
    assert 'CFG interval: 0-0.5, Step cache: "taylor:interval=3,order=1,warmup=2"' in parameters
    for bad, message in ((["--step-cache", "no"], "no step_cache 'no'"), (["--guidance-interval", "1"], "START-END")):
        assert cli.main([*asked, *bad]) != 0
        assert message in capsys.readouterr().err
