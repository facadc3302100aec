"""What an engine promises: seeds, batches, callbacks, cancellation, two callers, failures that leave no trace."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_the_same, relative_error
from PIL import Image

import flux_engine
from flux_engine import (
    EngineConfig,
    InvalidRequest,
    OutOfMemory,
    Request,
    RequestCancelled,
    UnknownModel,
    UnsupportedError,
    hardware,
)
from flux_engine.engine import Engine
from flux_engine.pipeline import Step

PROMPT = "a large red circle on a blue background"
SQUARE = (256, 256)
OTHER = "a small yellow star at the top left on a black background"


def bits(engine: Engine, prompt: str = PROMPT, **fields) -> torch.Tensor:
    return torch.stack(list(engine(prompt, output_type="latent", **fields)))


def test_a_seed_gives_the_same_bits_again(engine: Engine) -> None:
    first = bits(engine, seed=0)
    assert torch.equal(first, bits(engine, seed=0))
    assert not torch.equal(first, bits(engine, seed=1))


def test_noise_is_what_torch_and_diffusers_draw(engine: Engine) -> None:
    family = engine._pipeline.family
    noise = family.noise([torch.Generator().manual_seed(seed) for seed in (5, 6)], 4, 6)
    for row, seed in enumerate((5, 6)):
        reference = torch.randn(1, 16, 4, 6, generator=torch.Generator("cpu").manual_seed(seed))
        assert torch.equal(noise[row : row + 1], reference)
    assert torch.isfinite(family.noise([torch.Generator().manual_seed(2**64 - 1)], 4, 4)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_is_its_singles(dtype: str) -> None:
    engine = flux_engine.load("demo-schnell", device="cpu", dtype=dtype)
    batch = bits(engine, num_outputs=4, seed=10)
    singles = torch.cat([bits(engine, seed=10 + k) for k in range(4)])
    if dtype == "float32":
        assert relative_error(batch, singles) <= 1e-5
    else:
        assert_the_same(batch, singles, torch.bfloat16)
    mixed = engine([PROMPT, OTHER], seed=10, output_type="latent")
    alone = torch.stack([bits(engine, seed=10)[0], bits(engine, OTHER, seed=11)[0]])
    if dtype == "float32":
        assert relative_error(torch.stack(list(mixed)), alone) <= 1e-5
    else:
        assert torch.equal(torch.stack(list(mixed)), alone)


def test_the_embedding_cache_changes_nothing(engine: Engine) -> None:
    without = flux_engine.load("demo-schnell", device="cpu", dtype="float32", embedding_cache=0)
    for _ in range(2):
        assert torch.equal(bits(engine, seed=2), bits(without, seed=2))
    assert len(without._pipeline.family.text._cache) == 0
    small = flux_engine.load("demo-schnell", device="cpu", dtype="float32", embedding_cache=2)
    for prompt in ("a", "b", "c"):
        bits(small, prompt, seed=0, num_inference_steps=1)
    assert list(small._pipeline.family.text._cache) == ["b", "c"]


def test_output_types(engine: Engine) -> None:
    pil = engine(PROMPT, seed=0)
    assert isinstance(pil.image, Image.Image)
    assert pil.image.size == SQUARE
    array = engine(PROMPT, seed=0, output_type="np").image
    assert array.dtype == np.uint8
    assert np.array_equal(array, np.asarray(pil.image))
    tensor = engine(PROMPT, seed=0, output_type="pt").image
    assert tensor.shape == (3, *SQUARE)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    latent = engine(PROMPT, seed=0, output_type="latent").image
    assert latent.shape == (16, 32, 32)
    assert latent.dtype == torch.float32
    assert not latent.is_inference()  # the caller may go on with it, with gradients too
    assert not tensor.is_inference()


def test_callback_sees_every_step_and_a_preview(engine: Engine) -> None:
    steps: list[Step] = []
    result = engine(PROMPT, seed=0, num_outputs=2, on_step=steps.append)
    assert [(s.index, s.total) for s in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [s.timestep for s in steps] == [1.0, 0.75, 0.5, 0.25]
    previews = steps[-1].preview()
    assert [p.size for p in previews] == [(32, 32)] * 2
    small = np.asarray(result.image.resize((32, 32), Image.Resampling.BOX), float)
    shown = np.asarray(previews[0], float)
    other = np.asarray(engine(OTHER, seed=0).image.resize((32, 32), Image.Resampling.BOX), float)
    # The preview shows the picture, roughly, and not another one.
    assert 2 * np.abs(small - shown).mean() < np.abs(other - shown).mean()


def test_a_callback_does_not_change_the_picture(engine: Engine) -> None:
    assert torch.equal(bits(engine, seed=4), bits(engine, seed=4, on_step=lambda step: None))


def test_cancelled_between_steps(engine: Engine) -> None:
    before = bits(engine, seed=1)
    cancel = threading.Event()
    seen: list[int] = []

    def stop_at_two(step: Step) -> None:
        seen.append(step.index)
        if step.index == 2:
            cancel.set()

    with pytest.raises(RequestCancelled):
        engine(OTHER, seed=1, on_step=stop_at_two, cancel=cancel)
    assert seen == [1, 2]
    assert torch.equal(bits(engine, seed=1), before)


def test_cancelled_from_another_thread(engine: Engine) -> None:
    cancel = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            engine(PROMPT, num_inference_steps=1000, cancel=cancel)
        except RequestCancelled as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    cancel.set()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_a_cancelled_request_does_not_wait_for_its_turn(engine: Engine) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold(step: Step) -> None:
        entered.set()
        leave.wait(30)

    first = threading.Thread(target=lambda: engine(PROMPT, num_inference_steps=1, on_step=hold))
    first.start()
    assert entered.wait(30)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(RequestCancelled):
        engine(PROMPT, cancel=cancel)
    leave.set()
    first.join(30)


def test_two_callers_take_turns(engine: Engine) -> None:
    alone = {seed: bits(engine, seed=seed) for seed in (20, 21)}
    results: dict[int, torch.Tensor] = {}
    running, most = 0, 0

    def count(step: Step) -> None:
        nonlocal running, most
        if step.index == 1:
            running += 1
            most = max(most, running)
        if step.index == step.total:
            running -= 1

    def work(seed: int) -> None:
        results[seed] = bits(engine, seed=seed, on_step=count)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (20, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert all(torch.equal(results[seed], alone[seed]) for seed in (20, 21))


def test_a_failing_callback_leaves_the_engine_usable(engine: Engine) -> None:
    before = bits(engine, seed=1)

    def fail(step: Step) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        engine(PROMPT, on_step=fail)
    assert torch.equal(bits(engine, seed=1), before)


def test_a_callback_cannot_wait_for_itself(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="callback"):
        engine(PROMPT, on_step=lambda step: engine(OTHER))
    assert engine(PROMPT, seed=0).image.size == SQUARE


def test_run_refuses_what_is_not_a_request(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="not a str"):
        engine.run(PROMPT)  # pyright: ignore[reportArgumentType]


def test_out_of_memory_is_typed_and_leaves_the_engine_usable(engine: Engine) -> None:
    def fail(step: Step) -> None:
        torch.empty(2**60)  # what torch itself says when memory runs out

    with pytest.raises(OutOfMemory, match="256x256"):
        engine(PROMPT, on_step=fail)
    assert engine(PROMPT, seed=0).image.size == SQUARE


def test_long_prompts_are_cut_and_reported(engine: Engine) -> None:
    long = PROMPT + " and more" * 100
    result = engine(long, seed=0, num_inference_steps=1)
    assert len(result.notes) == 1
    assert "cut to 40 tokens" in result.notes[0]
    with pytest.raises(InvalidRequest, match="strict"):
        engine(long, strict=True)
    again = engine(long, seed=0, num_inference_steps=1)
    assert again.notes == result.notes  # also when it comes from the cache


def test_unicode_and_empty_prompts_run(engine: Engine) -> None:
    for prompt in ("", "ein roter Kreis auf blauem Grund, größer 🎨", "赤い丸", "\n\t"):
        assert engine(prompt, seed=0, num_inference_steps=1).image.size == SQUARE


def test_a_misspelt_field_is_refused_with_the_right_one(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'num_outputs'"):
        engine(PROMPT, num_output=2)


def test_run_takes_a_request(engine: Engine) -> None:
    request = Request(prompt=PROMPT, seed=0, output_type="latent")
    assert torch.equal(engine.run(request).image, bits(engine, seed=0)[0])


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownModel, match="did you mean 'demo-schnell'"):
        flux_engine.load("demo-schnel")
    with pytest.raises(UnsupportedError, match="dtype 'int4'"):
        flux_engine.load("demo-schnell", dtype="int4")
    with pytest.raises(UnsupportedError, match="quantization 'int4' is not one of auto, none, int8"):
        flux_engine.load("demo-schnell", quantization="int4")
    with pytest.raises(UnsupportedError, match="device 'tpu'"):
        flux_engine.load("demo-schnell", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="0 CUDA devices"):
            flux_engine.load("demo-schnell", device="cuda")


def test_result_saves_and_shows_itself(engine: Engine, tmp_path: Path) -> None:
    result = engine(PROMPT, seed=0, num_outputs=2)
    assert len(result) == 2
    assert result.seeds == (0, 1)
    png = result._repr_png_()
    assert png is not None
    assert png.startswith(b"\x89PNG")
    path = result.save(tmp_path / "a.png", 1)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(result[1]))
    assert "seed 0" in repr(result)


def test_torch_names_are_understood() -> None:
    engine = flux_engine.load("demo-schnell", device=torch.device("cpu"), dtype=torch.float32)
    assert repr(engine) == "<Engine: demo-schnell on cpu, float32>"


def test_describe_says_what_is_in_force(engine: Engine) -> None:
    facts = engine.describe()
    assert facts["model"] == "demo-schnell"
    assert facts["parts"]["transformer"]["dtype"] == "float32"
    assert facts["parts"]["transformer"]["parameters"] > 1_000_000


def test_what_people_call_a_field_leads_to_it(engine: Engine) -> None:
    for name, meant in {"steps": "num_inference_steps", "on_stp": "on_step", "size": "width"}.items():
        with pytest.raises(InvalidRequest, match=f"did you mean '{meant}'"):
            engine("a circle", **{name: 3})


@pytest.mark.parametrize(
    ("quota", "bound", "wanted"),
    [("max 100000", 6, 6), ("200000 100000", 6, 2), ("150000 100000", 6, 2), ("50000 100000", 6, 1), ("", 6, 6),
     ("900000 100000", 6, 6), ("nonsense", 3, 3)],
)  # fmt: skip
def test_threads_are_for_the_processors_of_this_process(
    quota: str, bound: int, wanted: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(hardware, "CGROUP", str(tmp_path))
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(bound)))
    assert hardware.processors() == wanted
    before = torch.get_num_threads()
    try:
        for threads, left in ((wanted + 2, wanted), (1, 1)):
            torch.set_num_threads(threads)
            hardware.limit_threads()
            assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)


def test_a_number_of_threads_that_was_said_stays() -> None:
    assert not EngineConfig.from_environment(environment={"OMP_NUM_THREADS": "9"}).limit_threads
    assert EngineConfig.from_environment(environment={}).limit_threads
