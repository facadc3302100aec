r"""Weights in prompts, as AUTOMATIC1111's web UI has them.

`(word)` counts 1.1 times as much, `(word:1.3)` 1.3 times, `[word]` 1 / 1.1 times, and they nest; `\(` is a bracket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEP = 1.1
_PIECES = re.compile(r"\\.|[()\[\]]|:\s*+[+-]?(?:\d++(?:\.\d*+)?|\.\d++)\s*+\)|[^\\()\[\]:]+|.", re.DOTALL)
"""Nothing is tried twice, however long a number is that no bracket follows."""


@dataclass
class Piece:
    """A stretch of a prompt, and how much it counts."""

    text: str
    weight: float


def weighted(prompt: str) -> list[Piece]:
    """A prompt's stretches with their weights.

    Brackets that are never closed count to the end; those that close nothing are text. Round and square ones need not
    nest in one another.
    """
    parts = _PIECES.findall(prompt)
    factors, closing = _brackets(parts)
    in_force = {"(": [1.0], "[": [1.0]}
    pieces: list[Piece] = []
    for number, part in enumerate(parts):
        if number in factors:
            in_force[part].append(in_force[part][-1] * factors[number])
        elif number in closing:
            in_force["[" if part == "]" else "("].pop()
        else:
            text = part[1:] if len(part) == 2 and part[0] == "\\" else part
            weight = in_force["("][-1] * in_force["["][-1]
            if pieces and pieces[-1].weight == weight:
                pieces[-1].text += text
            else:
                pieces.append(Piece(text, weight))
    return pieces


def _brackets(parts: list[str]) -> tuple[dict[int, float], set[int]]:
    """Which parts open a bracket, with what each of them multiplies by, and which close one."""
    factors: dict[int, float] = {}
    closing: set[int] = set()
    open_ones: dict[str, list[int]] = {"(": [], "[": []}
    for number, part in enumerate(parts):
        if part in open_ones:
            factors[number] = STEP if part == "(" else 1 / STEP
            open_ones[part].append(number)
        elif part[-1] in ")]" and part[0] != "\\":
            opened = open_ones["[" if part == "]" else "("]
            if opened:
                first = opened.pop()
                closing.add(number)
                if part[0] == ":":
                    factors[first] = float(part[1:-1])
    return factors, closing
