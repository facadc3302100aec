"""Ways to ask, each with the scene it means: what the README shows and the tests count."""

from __future__ import annotations

from benchmarks.world import Ground, Scene, Thing


def _one(shape: str, color: str, size: str, place: str, ground: Ground | str, outline: str = "") -> Scene:
    return Scene((Thing(shape, color, size, place, outline),), _ground(ground))


def _two(first: Thing, relation: str, second: Thing, ground: Ground | str) -> Scene:
    return Scene((first, second), _ground(ground), relation)


def _ground(ground: Ground | str) -> Ground:
    return Ground("plain", ground) if isinstance(ground, str) else ground


PLAIN: tuple[tuple[str, Scene], ...] = (
    ("a large red circle on a blue background", _one("circle", "red", "large", "", "blue")),
    ("a small yellow star on a black background", _one("star", "yellow", "small", "", "black")),
    ("green square", _one("square", "green", "", "", "")),
    ("a purple triangle at the bottom on a pink background", _one("triangle", "purple", "", "bottom", "pink")),
    ("An orange diamond in the top left corner.", _one("diamond", "orange", "", "top left", "")),
    ("big white cross on a red background", _one("cross", "white", "large", "", "red")),
    ("a tiny cyan circle on the right, gray background", _one("circle", "cyan", "small", "right", "gray")),
    ("on a yellow background, a black star in the middle", _one("star", "black", "", "center", "yellow")),
    ("a blue square in the bottom right corner on an orange background",
     _one("square", "blue", "", "bottom right", "orange")),
    ("a green background with a huge pink triangle", _one("triangle", "pink", "large", "", "green")),
    ("a picture of a little red diamond at the top", _one("diamond", "red", "small", "top", "")),
    ("violet plus sign on the left on a white background", _one("cross", "purple", "", "left", "white")),
    ("A grey disc at the bottom left on a purple background.", _one("circle", "gray", "", "bottom left", "purple")),
    ("a large orange five-pointed star on a cyan background", _one("star", "orange", "large", "", "cyan")),
    ("small white square, in the top right corner, blue background",
     _one("square", "white", "small", "top right", "blue")),
    ("a drawing of a black triangle on a gray background", _one("triangle", "black", "", "", "gray")),
    ("a cyan diamond on the right side on a black background", _one("diamond", "cyan", "", "right", "black")),
    ("a small green cross at the bottom on a white background", _one("cross", "green", "small", "bottom", "white")),
    ("a huge yellow circle on a purple background", _one("circle", "yellow", "large", "", "purple")),
    ("a pink star in the upper left on a green background", _one("star", "pink", "", "top left", "green")),
)  # fmt: skip
"""One object on a plain background."""

WIDE: tuple[tuple[str, Scene], ...] = (
    ("a yellow circle with a black outline on a pink background", _one("circle", "yellow", "", "", "pink", "black")),
    ("large red square outlined in white, blue background", _one("square", "red", "large", "", "blue", "white")),
    ("a black diamond on red and white stripes",
     _one("diamond", "black", "", "", Ground("striped", "red", "white"))),
    ("a large green circle on vertical yellow and purple stripes",
     _one("circle", "green", "large", "", Ground("striped", "yellow", "purple", "x"))),
    ("a white star on a gradient from blue on the top to purple on the bottom",
     _one("star", "white", "", "", Ground("gradient", "blue", "purple", "y"))),
    ("a red triangle on a background fading from white on the left to cyan on the right",
     _one("triangle", "red", "", "", Ground("gradient", "white", "cyan", "x"))),
    ("a yellow square on a background that is green on the left and black on the right",
     _one("square", "yellow", "", "", Ground("split", "green", "black", "x"))),
    ("a black circle in the center, half pink top, half cyan bottom background",
     _one("circle", "black", "", "center", Ground("split", "pink", "cyan", "y"))),
    ("a red circle to the left of a blue square",
     _two(Thing("circle", "red"), "left of", Thing("square", "blue"), "")),
    ("a small yellow star above a medium green diamond, black background",
     _two(Thing("star", "yellow", "small"), "above", Thing("diamond", "green", "medium"), "black")),
    ("a pink cross is below a white circle on a blue background",
     _two(Thing("cross", "pink"), "below", Thing("circle", "white"), "blue")),
    ("a purple triangle on the right and an orange circle on the left, gray background",
     _two(Thing("triangle", "purple"), "right of", Thing("circle", "orange"), "gray")),
)  # fmt: skip
"""Outlines, other backgrounds, two objects."""

PROMPTS = (*PLAIN, *WIDE)
