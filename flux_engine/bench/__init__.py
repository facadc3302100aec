"""How fast a model runs here, and how fast it could: `flux-engine bench`."""
