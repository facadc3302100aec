"""A published schema in front of an engine: what a hosted model's `predict` does, without needing Cog.

    predictor = Predictor("flux-schnell", model="demo-schnell")
    paths = predictor.predict(prompt="a red circle", seed=1)

Inputs are validated and defaulted by the schema's declaration (replicate/), and become a Request here.
"""

from flux_engine.predictor.predictor import Predictor

__all__ = ["Predictor"]
