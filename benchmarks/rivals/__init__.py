"""Other engines on the same numbers: `python -m benchmarks.rivals CASE [--engines NAME ...]`.

`cases.py` writes weights, noise and a float32 reference once; `engines.py` says which engines there are, and
`environments.py` makes each the virtual environment that it needs; `worker.py` runs in there, with one of `runners`.
"""
