"""The words people use for a scene of the drawn world, frozen with it.

`write` says everything the scene states and nothing it leaves open, in one of many ways: sentences, lists of tags,
orders to draw, with synonyms, articles or none, capitals, full stops, and now and then words that mean nothing here.
"""

from __future__ import annotations

import random

from benchmarks.world import RESERVED_NAMES, Ground, Scene, Thing, sample_scene

WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-size"),
    "large": ("large", "large", "big", "huge"),
    "circle": ("circle", "circle", "disc", "round dot"),
    "square": ("square", "square", "box"),
    "star": ("star", "star", "five-pointed star"),
    "cross": ("cross", "cross", "plus sign"),
    "diamond": ("diamond", "diamond", "rhombus"),
    "crescent": ("crescent", "crescent", "crescent moon"),
    "purple": ("purple", "purple", "violet"),
    "gray": ("gray", "grey"),
    "pink": ("pink", "pink", "light pink"),
    "cyan": ("cyan", "cyan", "turquoise"),
    "center": ("in the center", "in the middle", "at the center", "in the centre", "centered"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top", "in the upper part"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
    "top left": ("in the top left corner", "at the top left", "in the upper left"),
    "top right": ("in the top right corner", "at the top right", "in the upper right"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right"),
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
"""Attribute -> the ways to say it; an attribute without an entry is said as it is."""

OPENINGS = (
    "a picture of", "an image of", "a drawing of", "an illustration of", "draw", "show me", "generate", "I want",
)  # fmt: skip
CLOSINGS = ("flat design", "vector art", "minimalist", "simple", "clean edges", "high quality", "4k")

FIRST_SECOND = {"x": ("left", "right"), "y": ("top", "bottom")}
STRIPE_WORDS = {"x": "vertical", "y": "horizontal"}


def write(scene: Scene, rng: random.Random) -> str:
    """One of many ways to ask for the scene."""
    text = _one(scene, rng) if len(scene.things) == 1 else _two(scene, rng)
    if rng.random() < 0.15:
        text = f"{rng.choice(OPENINGS)} {text}"
    if rng.random() < 0.12:
        text = f"{text}, {rng.choice(CLOSINGS)}"
    text = " ".join(text.split()).replace(" ,", ",")
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.2 else text


def vocabulary(count: int = 60_000) -> list[str]:
    """Captions enough to hold every word this module can say, and each reserved name once: for a tokenizer."""
    rng = random.Random("vocabulary")
    return [write(sample_scene(rng, marked=0.1, held_out=None), rng) for _ in range(count)] + list(RESERVED_NAMES)


def _say(word: str, rng: random.Random) -> str:
    return rng.choice(WORDS.get(word, (word,)))


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _name(thing: Thing, rng: random.Random) -> str:
    """The object with its size, colour and outline, without an article."""
    words = [_say(word, rng) for word in (thing.size, thing.color) if word]
    if thing.outline:
        color = _say(thing.outline, rng)
        form = rng.randrange(4)
        if form == 0:
            words.insert(0, f"{color}-outlined")
        elif form == 1:
            return " ".join([*words, _say(thing.shape, rng), "outlined in", color])
        else:
            ending = "with " + _article(f"{color} {rng.choice(('outline', 'border', 'outline'))}")
            return " ".join([*words, _say(thing.shape, rng), ending])
    return " ".join([*words, _say(thing.shape, rng)])


def _thing(thing: Thing, rng: random.Random, *, article: bool = True) -> str:
    name = _name(thing, rng)
    return _article(name) if article else name


def _ground(ground: Ground, rng: random.Random) -> str:
    """The background as a noun phrase without an article; empty if it is left open."""
    if not ground.color:
        return ""
    color = _say(ground.color, rng)
    if ground.kind == "plain":
        return f"{color} background"
    second = _say(ground.second, rng)
    if ground.kind == "striped":
        stripes = rng.choice((f"{color} and {second} stripes", f"{color} and {second} striped background"))
        if ground.axis:
            return f"{STRIPE_WORDS[ground.axis]} {stripes}"
        return stripes
    before, after = FIRST_SECOND[ground.axis or "x"]
    if ground.kind == "split":
        return rng.choice(
            (
                f"background that is {color} on the {before} and {second} on the {after}",
                f"split background, {color} {before} and {second} {after}",
                f"background split into {color} {before} and {second} {after}",
                f"half {color} {before}, half {second} {after} background",
            )
        )
    return rng.choice(
        (
            f"gradient from {color} on the {before} to {second} on the {after}",
            f"gradient background from {color} {before} to {second} {after}",
            f"background fading from {color} on the {before} to {second} on the {after}",
        )
    )


def _with_article(ground: str) -> str:
    return ground if "stripes" in ground else _article(ground)


def _one(scene: Scene, rng: random.Random) -> str:
    thing = scene.things[0]
    place = _say(thing.place, rng) if thing.place else ""
    ground = _ground(scene.ground, rng)
    if rng.random() < 0.15 and not thing.outline:
        # A list of tags, in any order but with the shape first.
        tags = [_say(word, rng) for word in (thing.size, thing.color) if word]
        tags += [tag for tag in (place, ground) if tag]
        rng.shuffle(tags)
        return ", ".join([_say(thing.shape, rng), *tags])
    name = _thing(thing, rng, article=rng.random() < 0.75)
    if not ground:
        forms = [f"{name} {place}"]
        if place:
            forms += [f"{name}, {place}", f"{place}, {name}"]
        return rng.choice(forms)
    on_ground = f"on {_with_article(ground)}"
    forms = [
        f"{name} {place} {on_ground}",
        f"{name} {on_ground}, {place}" if place else f"{name} {on_ground}",
        f"{name} {place}, {ground}",
        f"{on_ground}, {name} {place}",
        f"{_with_article(ground)} with {name} {place}",
    ]
    return rng.choice(forms)


def _two(scene: Scene, rng: random.Random) -> str:
    article = rng.random() < 0.85
    first, second = (_thing(thing, rng, article=article) for thing in scene.things)
    if not scene.relation:
        both = rng.choice((f"{first} and {second}", f"{first} with {second}", f"{first}, {second}"))
    else:
        form = rng.random()
        if form < 0.7:
            both = f"{first} {rng.choice(('', '', 'is'))} {_say(scene.relation, rng)} {second}"
        else:
            here, there = {
                "left of": ("on the left", "on the right"),
                "right of": ("on the right", "on the left"),
                "above": ("at the top", "at the bottom"),
                "below": ("at the bottom", "at the top"),
            }[scene.relation]
            both = f"{first} {here} and {second} {there}"
    ground = _ground(scene.ground, rng)
    if not ground:
        return both
    on_ground = f"on {_with_article(ground)}"
    return rng.choice((f"{both}, {ground}", f"{both} {on_ground}", f"{on_ground}, {both}"))
