"""Twenty ways to ask, each with the scene it means: what the README shows and the tests count."""

from __future__ import annotations

from benchmarks.world import Scene

PROMPTS: tuple[tuple[str, Scene], ...] = (
    ("a large red circle on a blue background", Scene("circle", "red", "large", "center", "blue")),
    ("a small yellow star on a black background", Scene("star", "yellow", "small", "center", "black")),
    ("green square", Scene("square", "green")),
    ("a purple triangle at the bottom on a pink background", Scene("triangle", "purple", "medium", "bottom", "pink")),
    ("An orange diamond in the top left corner.", Scene("diamond", "orange", "medium", "top left")),
    ("big white cross on a red background", Scene("cross", "white", "large", "center", "red")),
    ("a tiny cyan circle on the right, gray background", Scene("circle", "cyan", "small", "right", "gray")),
    ("on a yellow background, a black star in the middle", Scene("star", "black", "medium", "center", "yellow")),
    ("a blue square in the bottom right corner on an orange background",
     Scene("square", "blue", "medium", "bottom right", "orange")),
    ("a green background with a huge pink triangle", Scene("triangle", "pink", "large", "center", "green")),
    ("a picture of a little red diamond at the top", Scene("diamond", "red", "small", "top")),
    ("violet plus sign on the left on a white background", Scene("cross", "purple", "medium", "left", "white")),
    ("A grey disc at the bottom left on a purple background.",
     Scene("circle", "gray", "medium", "bottom left", "purple")),
    ("a large orange five-pointed star on a cyan background", Scene("star", "orange", "large", "center", "cyan")),
    ("small white square, in the top right corner, blue background",
     Scene("square", "white", "small", "top right", "blue")),
    ("a drawing of a black triangle on a gray background", Scene("triangle", "black", "medium", "center", "gray")),
    ("a cyan diamond on the right side on a black background", Scene("diamond", "cyan", "medium", "right", "black")),
    ("a small green cross at the bottom on a white background", Scene("cross", "green", "small", "bottom", "white")),
    ("a huge yellow circle on a purple background", Scene("circle", "yellow", "large", "center", "purple")),
    ("a pink star in the upper left on a green background", Scene("star", "pink", "medium", "top left", "green")),
)  # fmt: skip
