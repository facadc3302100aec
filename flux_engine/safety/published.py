"""Both published checkers as the hosted FLUX.1 models ask them: the second is asked of what the first flags."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from flux_engine.safety.compvis import load_compvis
from flux_engine.safety.falconsai import load_falconsai
from flux_engine.safety.files import Where
from flux_engine.safety.guarding import Checker, closed
from flux_engine.safety.options import CompVis, Falconsai, Published
from flux_engine.verdicts import Verdict


class PublishedChecker:
    """Unsafe is what both call so. What the first one fails at is unsafe and the second is not asked."""

    def __init__(self, flags: Checker, confirms: Checker, name: str) -> None:
        self.flags, self.confirms, self.name = flags, confirms, name

    def check(self, pictures: Sequence[Image.Image]) -> Sequence[Verdict]:
        """Scores go by the name of the checker and its own."""
        verdicts = [_renamed("compvis", verdict, self.name) for verdict in closed(self.flags, pictures)]
        asked = [index for index, verdict in enumerate(verdicts) if verdict.unsafe and not verdict.reason]
        for index, second in zip(asked, closed(self.confirms, [pictures[index] for index in asked]), strict=True):
            scores = {**verdicts[index].scores, **_renamed("falconsai", second, self.name).scores}
            verdicts[index] = Verdict(second.unsafe, scores, self.name, second.reason)
        return verdicts


def _renamed(prefix: str, verdict: Verdict, by: str) -> Verdict:
    scores = {f"{prefix} {name}": score for name, score in verdict.scores.items()}
    return Verdict(verdict.unsafe, scores, by, verdict.reason)


def load_published(options: Published, where: Where) -> PublishedChecker:
    """Both, from their manifests. Raises WeightsError for files that are missing or do not fit."""
    return PublishedChecker(
        load_compvis(CompVis(options.compvis), where), load_falconsai(Falconsai(options.falconsai), where), str(options)
    )
