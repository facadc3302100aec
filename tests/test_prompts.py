"""What brackets in a prompt mean, and what they do to what the networks read and draw."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import sdxl_models
import torch
from conftest import latent_error

from flux_engine.engine import Engine
from flux_engine.errors import InvalidRequest
from flux_engine.text.prompts import STEP, weighted

PROMPT = "a large red circle on a blue background"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 3, "guidance_scale": 9.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(sdxl_models.family())


def draw(engine: Engine, prompt: str, **asked: Any) -> torch.Tensor:
    return engine(prompt, **(SMALL | asked)).image


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", []),
        ("a b", [("a b", 1)]),
        ("(a)", [("a", STEP)]),
        ("[a]", [("a", 1 / STEP)]),
        ("(a:1.2)", [("a", 1.2)]),
        ("(a: 1.2 )", [("a", 1.2)]),
        ("(a:2)", [("a", 2)]),
        ("(a:2.)", [("a", 2)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("(a:0)", [("a", 0)]),
        ("(a:+1.5)", [("a", 1.5)]),
        ("(a:b)", [("a:b", STEP)]),
        ("(a:1.2.3)", [("a:1.2.3", STEP)]),
        ("(a:)", [("a:", STEP)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("a:1.2", [("a:1.2", 1)]),
        ("a:1.2)", [("a:1.2)", 1)]),
        ("[a:1.2)", [("a:1.2)", 1 / STEP)]),
        ("x ((a) b) y", [("x ", 1), ("a", STEP * STEP), (" b", STEP), (" y", 1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        ("(a:1.5) (b:1.5)", [("a", 1.5), (" ", 1), ("b", 1.5)]),
        ("(a:1.5)(b:1.5)", [("ab", 1.5)]),
        ("([a])", [("a", 1)]),
        ("(a [b) c]", [("a ", STEP), ("b", 1), (" c", 1 / STEP)]),
        ("[a (b] c)", [("a ", 1 / STEP), ("b", 1), (" c", STEP)]),
        ("a (b", [("a ", 1), ("b", STEP)]),
        ("a ((b", [("a ", 1), ("b", STEP * STEP)]),
        ("a [b (c", [("a ", 1), ("b ", 1 / STEP), ("c", 1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("()", []),
        ("((((", []),
        ("[]()[(])", []),
        ("))]]", [("))]]", 1)]),
        (r"\(a\)", [("(a)", 1)]),
        (r"\[a\]", [("[a]", 1)]),
        (r"(a\):1.2)", [("a)", 1.2)]),
        (r"\\(a)", [("\\", 1), ("a", STEP)]),
        ("a\\", [("a\\", 1)]),
        ("(a\nb)", [("a\nb", STEP)]),
        ("(größer 🎨:1.3)", [("größer 🎨", 1.3)]),
    ],
)
def test_the_grammar(prompt: str, wanted: list[tuple[str, float]]) -> None:
    found = [(piece.text, piece.weight) for piece in weighted(prompt)]
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted], abs=0)


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 10_000 + "a" + ")" * 10_000,
        "[" * 10_000 + "a",
        "(a" * 50_000,
        "(a" * 30_000 + ")" * 30_000,
        "[(" * 25_000 + "a" + ")]" * 25_000,
        ")" * 100_000,
        ":" + "1" * 100_000,
        "(:" + " " * 100_000,
        ":1" * 50_000,
        "\\" * 100_000,
    ],
    ids=lambda prompt: prompt[:6],
)
def test_hostile_prompts_are_read_at_once(prompt: str) -> None:
    """A request holds up to 100,000 characters: what takes the square of them takes minutes."""
    began = time.perf_counter()
    weighted(prompt)
    assert time.perf_counter() - began < 2


def test_many_brackets_multiply() -> None:
    (piece,) = weighted("(" * 40 + "a" + ")" * 40)
    assert piece.weight == pytest.approx(STEP**40)
    (piece,) = weighted("[" * 10_000 + "a" + "]" * 10_000)
    assert piece.weight == pytest.approx(0)
    (piece,) = weighted("(" * 10_000 + "a")
    assert piece.weight == math.inf


@pytest.mark.parametrize("prompt", ["(a:1.0)", "((a red:1) circle:1.0)", "(a red:1)(circle:1)"])
def test_weight_one_has_the_bits_of_no_weight(engine: Engine, prompt: str) -> None:
    text = engine._pipeline.family.text
    plain = "".join(piece.text for piece in weighted(prompt))
    found, wanted = text.encode([prompt], weights=True), text.encode([plain])
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.pooled, wanted.pooled)
    assert torch.equal(draw(engine, f"{prompt} on blue", prompt_weights=True), draw(engine, f"{plain} on blue"))


def test_the_words_in_brackets_are_scaled_and_the_mean_stays(engine: Engine) -> None:
    text = engine._pipeline.family.text
    plain, more = text.encode(["a red circle"]), text.encode(["a (red:1.7) circle"], weights=True)
    widths = list(sdxl_models.WIDTHS)
    for before, after in zip(plain.tokens.split(widths, -1), more.tokens.split(widths, -1), strict=True):
        assert after.mean().item() == pytest.approx(before.mean().item(), rel=1e-4)
        ratio = (after / before)[0].median(dim=-1).values  # of each token: begin, a, red, circle, end, padding
        assert ratio[2].item() == pytest.approx(1.7 * ratio[1].item(), rel=1e-5)
        others = torch.cat((ratio[:2], ratio[3:]))
        assert torch.allclose(others, others[:1].expand_as(others), rtol=1e-5)
    assert torch.equal(plain.pooled, more.pooled)


def test_weights_change_the_picture(engine: Engine) -> None:
    plain = draw(engine, PROMPT)
    for prompt in (
        "a large (red:1.6) circle on a blue background",
        "a large red circle on a [[[[[blue]]]]] background",
    ):
        assert latent_error(draw(engine, prompt, prompt_weights=True), plain) >= 1e-2
    negative = draw(engine, PROMPT, negative_prompt="a small star")
    other = draw(engine, PROMPT, negative_prompt="a (small:1.9) star", prompt_weights=True)
    assert latent_error(other, negative) >= 1e-3


def test_without_weights_brackets_are_text(engine: Engine) -> None:
    text = engine._pipeline.family.text
    prompt = "a (red:1.6) circle"
    plain = text.readers[0].tokenizer(prompt).input_ids[1:-1]
    (found, _) = text._tokens(prompt, weights=False)
    assert found == [(number, 1.0) for number in plain]
    unasked = draw(engine, prompt)
    assert not torch.equal(unasked, draw(engine, prompt, prompt_weights=True))
    # Escaped, they are the same text.
    assert torch.equal(unasked, draw(engine, r"a \(red:1.6\) circle", prompt_weights=True))


@pytest.mark.parametrize("prompt", ["(" * 10_000 + "a", "(a:1001)", "(a:-1001)", f"(a:{'9' * 400})"])
def test_weights_that_cannot_be_are_refused(engine: Engine, prompt: str) -> None:
    with pytest.raises(InvalidRequest, match=r"counts 'a' .* times; at most 1000") as caught:
        draw(engine, prompt, prompt_weights=True)
    assert caught.value.field == "prompt"
    assert draw(engine, prompt).isfinite().all()  # as text


def test_words_may_count_nothing(engine: Engine) -> None:
    for prompt in ("(a red circle:0)", "[" * 10_000 + "a", "", "()"):
        assert draw(engine, prompt, prompt_weights=True).isfinite().all()
