"""Safety: checkers of pictures, and hooks that read prompts. What fails counts as unsafe.

    engine = flux_engine.load("demo-schnell", safety="demo")
    engine("a red crescent", seed=0).verdicts      # (Verdict(unsafe=True, scores={"crescent": ...}, by="demo:..."),)

A checker is anything with a `name` and a `check` that takes several pictures and gives a Verdict for each. An engine
tells and never drops a picture; the Predictor drops what is unsafe, as the hosted models do.
"""

from flux_engine.safety.finding import find_checker
from flux_engine.safety.guarding import Checker, Guard, PromptHook, Unavailable, guarded
from flux_engine.safety.options import CompVis, Demo, Falconsai, OpenNSFW, Published
from flux_engine.verdicts import Verdict

__all__ = [
    "Checker",
    "CompVis",
    "Demo",
    "Falconsai",
    "Guard",
    "OpenNSFW",
    "PromptHook",
    "Published",
    "Unavailable",
    "Verdict",
    "find_checker",
    "guarded",
]
