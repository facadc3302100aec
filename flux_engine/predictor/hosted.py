"""A predictor as a host drives it: cancelled from outside at any moment, for weeks in one process.

A host that cancels raises an exception in the thread that predicts, wherever that is. So the work is done in a thread
of its own, one for all predictions, and the host's thread only waits: what is raised there asks the work to stop
between two steps, and nothing is ever left half done.
"""

from __future__ import annotations

import contextvars
import ctypes
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flux_engine.predictor.predictor import Predictor

T = TypeVar("T")

POLL = 0.05
"""Seconds between two moments at which the waiting thread can be interrupted: a host's exception is raised only between
two of Python's own instructions."""
KEPT = 2
"""Predictions whose files are still there: a host may read those of one while the next has begun."""


class Hosted:
    """Runs a Predictor's predictions one after another for a host such as Cog."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        # One thread for all, also for loading: threads of torch and of the kernels belong to the one that calls them.
        # A process that ends does not wait for it.
        self._waiting = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]()
        threading.Thread(target=_work, args=(self._waiting,), name="flux-engine", daemon=True).start()
        self._folders: deque[Path] = deque()

    def setup(self) -> None:
        """Fetch what is missing, load the model, compile what is to be compiled, and run it once.

        Raises what `Predictor.setup` and `Predictor.warm_up` raise.
        """
        self._do(self._get_ready)

    def _get_ready(self) -> None:
        self.predictor.setup()
        self.predictor.warm_up()

    def predict(self, scope: Any, /, **inputs: Any) -> list[Path]:
        """The files of one prediction, which stay until two more have begun. `scope` is told its metrics by
        `scope.record_metric(name, value)`, as Cog's `current_scope()`.

        Raises what `Predictor.predict` raises, and whatever the host raises in this thread, after the work has stopped.
        """
        cancel = threading.Event()
        metrics: dict[str, float] = {}
        written = self._do(lambda: self._predict(cancel, metrics, inputs), cancel)
        for name, value in metrics.items():
            scope.record_metric(name, value)
        return written

    def _predict(self, cancel: threading.Event, metrics: dict[str, float], inputs: dict[str, Any]) -> list[Path]:
        while len(self._folders) >= KEPT:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        written = self.predictor.predict(cancel=cancel, record=metrics.__setitem__, **inputs)
        written = written if isinstance(written, list) else [written]
        self._folders.append(written[0].parent)
        return written

    def _do(self, work: Callable[[], T], cancel: threading.Event | None = None) -> T:
        future: Future[T] = Future()
        # With the host's context: it tells by that to which prediction a line of the log belongs.
        self._waiting.put((future, partial(contextvars.copy_context().run, work)))
        # A bare lock, as everything else that waits would itself be left locked by an exception out of nowhere.
        done = threading.Lock()
        done.acquire()
        future.add_done_callback(lambda _: done.release())
        try:
            _wait(future, done)
        except BaseException:
            if cancel is not None:  # loading cannot be stopped, and need not be waited for
                cancel.set()
                _wait(future, done)
            raise
        try:
            return future.result()
        finally:
            del future  # an error keeps this frame, and with it all that the work had in its hands


def _work(waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
    while True:
        future, call = waiting.get()
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised again where the result is asked for
            future.set_exception(error)
        del future, call  # nothing of a prediction is held until the next one comes
        _give_back()


def _give_back() -> None:
    """Give the system what is free: the C library would keep it, piece by piece, for a larger prediction than any that
    comes. Nobody waits for it, as the answer is out; where it is another C library nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _wait(future: Future[Any], done: threading.Lock) -> None:
    while not future.done():
        done.acquire(timeout=POLL)
