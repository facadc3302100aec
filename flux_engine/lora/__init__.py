"""LoRAs and their relatives: files of any published kind, merged into a loaded model and taken out again.

`names.py` says which weight a name means, `reading.py` reads a file, `changes.py` has the arithmetic, `state.py`
applies.
"""
