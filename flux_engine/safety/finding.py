"""What names a checker -> the checker, loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flux_engine.checks import shown
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest, UnknownModel, UnsupportedError, WeightsError
from flux_engine.hardware import pick_device
from flux_engine.memory import memory_errors
from flux_engine.safety.guarding import Checker, Unavailable
from flux_engine.safety.options import CompVis, Demo, Falconsai, OpenNSFW, Options, Published, parsed

if TYPE_CHECKING:
    from flux_engine.safety.files import Where


def find_checker(
    asked: Checker | Options | str | None,
    *,
    device: str | torch.device = "cpu",
    offline: bool = False,
    config: EngineConfig | None = None,
    required: bool = True,
) -> Checker | None:
    """The checker that is meant, loaded: None for None, a checker for itself, or by name, as "published",
    "compvis:threshold=0.01", "falconsai", "opennsfw", "demo".

    Weights are taken from the hub's cache, or fetched unless `offline`. Networks of torch run on `device`.
    Raises InvalidRequest for a name that is none, WeightsError for weights that are not there or do not fit,
    UnsupportedError for a package that is not installed; or, where it is not `required`, gives a checker to which every
    picture is unsafe. Also OutOfMemory.
    """
    if asked is None:
        return None
    options = parsed(asked) if isinstance(asked, str) else asked
    if not isinstance(options, Options):
        if not callable(getattr(options, "check", None)) or not hasattr(options, "name"):
            raise InvalidRequest(f"safety {shown(asked)} is no checker: it needs `name` and `check`", field="safety")
        return options
    options = options.checked()
    try:
        from flux_engine.safety.files import Where

        place = Where(config or EngineConfig.from_environment(), pick_device(str(device)), offline)
        with memory_errors(f"loading the safety checker {options}", "Load it on the processor"):
            return _load(options, place)
    except (WeightsError, UnsupportedError, UnknownModel) as error:
        if required:
            raise
        return Unavailable(str(options), str(error))


def _load(options: Options, where: Where) -> Checker:
    """Imported one by one: each needs libraries that the others do not."""
    match options:
        case CompVis():
            from flux_engine.safety.compvis import load_compvis

            return load_compvis(options, where)
        case Falconsai():
            from flux_engine.safety.falconsai import load_falconsai

            return load_falconsai(options, where)
        case Published():
            from flux_engine.safety.published import load_published

            return load_published(options, where)
        case OpenNSFW():
            from flux_engine.safety.opennsfw import load_opennsfw

            return load_opennsfw(options)
        case Demo():
            from flux_engine.safety.demo import load_demo

            return load_demo(options, where)
