"""The networks of preprocessors that were used last, so that a second picture does not load them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

KEPT = 2
"""How many: a network for depth is 1.3 GB."""
_networks: OrderedDict[tuple[str, ...], Any] = OrderedDict()
_lock = Lock()


def get(key: tuple[str, ...], load: Callable[[], Any]) -> Any:
    """What is kept under this key, loaded if it is not there. Only one thread loads at a time."""
    with _lock:
        if key not in _networks:
            while len(_networks) >= KEPT:
                _networks.popitem(last=False)
            _networks[key] = load()
        _networks.move_to_end(key)
        return _networks[key]


def drop_models() -> None:
    """Keep none of the networks that preprocessors loaded."""
    with _lock:
        _networks.clear()
