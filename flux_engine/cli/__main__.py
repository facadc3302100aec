"""`python -m flux_engine.cli`."""

from flux_engine.cli import entry

entry()
