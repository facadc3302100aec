r"""Weights in prompts, as AUTOMATIC1111's web UI has them.

`(word)` counts 1.1 times as much, `(word:1.3)` 1.3 times, `[word]` 1 / 1.1 times, and they nest; `\(` is a bracket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEP = 1.1
_PIECES = re.compile(r"\\.|[()\[\]]|:\s*[+-]?\d*\.?\d+\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


@dataclass
class Piece:
    """A stretch of a prompt, and how much it counts."""

    text: str
    weight: float


def weighted(prompt: str) -> list[Piece]:
    """A prompt's stretches with their weights; brackets that are never closed count to the end."""
    pieces: list[Piece] = []
    open_brackets: list[tuple[str, int]] = []  # which, and how many pieces came before

    def close(bracket: str, factor: float) -> bool:
        if not open_brackets or open_brackets[-1][0] != bracket:
            return False
        _, first = open_brackets.pop()
        for piece in pieces[first:]:
            piece.weight *= factor
        return True

    for match in _PIECES.finditer(prompt):
        part = match[0]
        if part in ("(", "["):
            open_brackets.append((part, len(pieces)))
        elif part == ")":
            if not close("(", STEP):
                pieces.append(Piece(part, 1.0))
        elif part == "]":
            if not close("[", 1 / STEP):
                pieces.append(Piece(part, 1.0))
        elif part.startswith(":") and part.endswith(")"):
            if not close("(", float(part[1:-1])):
                pieces.append(Piece(part, 1.0))
        else:
            pieces.append(Piece(part[1:] if len(part) == 2 and part[0] == "\\" else part, 1.0))
    while open_brackets:
        close(open_brackets[-1][0], STEP if open_brackets[-1][0] == "(" else 1 / STEP)

    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight:
            joined[-1].text += piece.text
        else:
            joined.append(piece)
    return joined
