"""A published schema in front of an engine: what a hosted model's `predict` does, without needing Cog.

    predictor = Predictor("flux-schnell", model="demo-schnell")
    paths = predictor.predict(prompt="a red circle", seed=1)

Inputs are validated and defaulted by the schema's declaration (replicate/), and become a Request here. `Hosted` is for
hosts, which cancel from outside.
"""

from flux_engine.predictor.hosted import Hosted
from flux_engine.predictor.predictor import Predictor

__all__ = ["Hosted", "Predictor"]
