"""Asking a checker or a prompt hook so that whatever goes wrong counts as unsafe."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from flux_engine.checks import shown
from flux_engine.errors import UnsafePrompt
from flux_engine.verdicts import Verdict

log = logging.getLogger(__name__)

TIMEOUT = 60.0
"""Seconds that a checker has for the pictures of a request."""
UNCHECKED = Verdict(None, reason="no checker was asked for")

PromptHook = Callable[[Sequence[str]], "str | None"]
"""Reads the prompts of a request before any work is done for it. It returns None where they may be drawn; it returns
why not, or raises, where they may not."""


class Checker(Protocol):
    """Looks at pictures."""

    @property
    def name(self) -> str:
        """Told in every verdict and log."""
        ...

    def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
        """A verdict for each picture, in their order. It may raise: then all of them are unsafe."""
        ...


@dataclass(frozen=True)
class Unavailable:
    """Stands for a checker that is not here: to it every picture is unsafe."""

    name: str
    reason: str

    def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
        return [Verdict(True, by=self.name, reason=self.reason)] * len(pictures)


@dataclass(frozen=True)
class Guard:
    """What looks at an engine's requests."""

    checker: Checker | None = None
    hook: PromptHook | None = None
    timeout: float = TIMEOUT
    """Seconds for the pictures of a request."""

    def read(self, prompts: Sequence[str]) -> None:
        """Raises UnsafePrompt if the hook does not let them pass, or fails."""
        if self.hook is None:
            return
        try:
            why = self.hook(tuple(dict.fromkeys(prompts)))
        except UnsafePrompt:
            raise
        except Exception as error:
            raise UnsafePrompt(f"the prompt was not let pass: the hook that reads it failed, {_said(error)}") from error
        if why is not None:
            raise UnsafePrompt(f"the prompt was not let pass: {why if isinstance(why, str) else shown(why)}")

    def look(self, pictures: Sequence[Image.Image]) -> tuple[Verdict, ...]:
        """One verdict for each picture; without a checker all are unchecked."""
        if self.checker is None:
            return (UNCHECKED,) * len(pictures)
        return tuple(guarded(self.checker, pictures, self.timeout))


def guarded(checker: Checker, pictures: Sequence[Image.Image], timeout: float = TIMEOUT) -> list[Verdict]:
    """A verdict for each picture, whatever the checker does: what it fails at is unsafe, with a reason.

    `timeout` is in seconds. A checker that is not ready by then is left alone in its thread, on copies of the pictures.
    """
    answer: list[list[Verdict]] = []
    copies = [picture.copy() for picture in pictures]

    def work() -> None:
        try:
            answer.append(closed(checker, copies))
        except BaseException as error:  # noqa: BLE001  also an exit: a thread that just ends would have said nothing
            answer.append(_refused(checker, len(copies), f"the checker failed, {_said(error)}"))

    thread = threading.Thread(target=work, name="safety checker", daemon=True)
    try:
        thread.start()
        thread.join(timeout)
    except RuntimeError as error:
        return _refused(checker, len(copies), f"the checker could not be started, {_said(error)}")
    return answer[0] if answer else _refused(checker, len(copies), f"the checker was not ready after {timeout:g} s")


def closed(checker: Checker, pictures: Sequence[Image.Image]) -> list[Verdict]:
    """The same without a limit of time, in this thread."""
    if not pictures:
        return []
    try:
        verdicts = list(checker.check(pictures))
    except Exception as error:  # noqa: BLE001  whatever it is, nothing is known of the pictures
        return _refused(checker, len(pictures), f"the checker failed, {_said(error)}")
    if len(verdicts) != len(pictures):
        return _refused(
            checker, len(pictures), f"the checker gave {len(verdicts)} verdicts on {len(pictures)} pictures"
        )
    return [_checked(checker, verdict) for verdict in verdicts]


def _checked(checker: Checker, verdict: object) -> Verdict:
    """A verdict that can be relied on."""
    if not isinstance(verdict, Verdict) or not isinstance(verdict.unsafe, bool):
        return _refused(checker, 1, f"the checker gave {shown(verdict)}, which is no verdict")[0]
    scores = verdict.scores
    if not isinstance(scores, Mapping) or not all(_finite(score) for score in scores.values()):
        return _refused(checker, 1, f"the checker measured {shown(scores)}")[0]
    return verdict if verdict.by else replace(verdict, by=_name(checker))


def _finite(score: object) -> bool:
    try:
        return math.isfinite(score)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        return False


def _refused(checker: Checker, count: int, reason: str) -> list[Verdict]:
    name = _name(checker)
    if count:
        log.warning("safety: %d picture%s unsafe, %s: %s", count, " is" if count == 1 else "s are", name, reason)
    return [Verdict(True, by=name, reason=reason)] * count


def _name(checker: Checker) -> str:
    """Also of one that cannot say it."""
    try:
        return str(checker.name)
    except Exception:  # noqa: BLE001  a name is no reason to lose the verdict
        return type(checker).__name__


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
