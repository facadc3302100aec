"""Files from the Hugging Face hub, through its own library: its cache, its tokens, its environment variables.

Downloads resume, are verified, and are published by rename; two processes that want the same file take turns
(huggingface_hub). What is added here is one clear error for each way it can fail.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from flux_engine.errors import UnknownModel, WeightsError

T = TypeVar("T")

SITE = "https://huggingface.co"
AT_ONCE = 4
"""Files of a model that are fetched at the same time: one connection seldom fills a line."""


def fetch(repository: str, file: str, *, revision: str = "main", offline: bool = False) -> Path:
    """The path of a file of a repository in the local cache; downloaded if it is not there.

    `offline`, like HF_HUB_OFFLINE=1, takes it from the cache only. Raises UnknownModel for a repository or revision
    that does not exist, WeightsError for everything else that stands in the way.
    """
    from huggingface_hub import hf_hub_download

    with _said(repository, file, revision, offline):
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=offline))


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What each call returns, in order; some are made at the same time, in threads of their own.

    Raises the first error as soon as it is known, as an interrupt is at once: then no other call begins, and those that
    have begun end by themselves, or with the process.
    """
    if len(calls) <= 1:
        return [call() for call in calls]
    # Here, as threads that import the same at once get in each other's way.
    from huggingface_hub import constants, errors, hf_hub_download  # noqa: F401

    waiting = queue.SimpleQueue[tuple[int, Callable[[], T]]]()
    answers = queue.SimpleQueue[tuple[int, T | None, BaseException | None]]()
    for numbered in enumerate(calls):
        waiting.put(numbered)
    stop = threading.Event()

    def work() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                number, call = waiting.get_nowait()
                try:
                    answers.put((number, call(), None))
                except BaseException as error:  # noqa: BLE001  raised below, in the caller's thread
                    answers.put((number, None, error))

    found: dict[int, T] = {}
    try:
        for _ in range(min(AT_ONCE, len(calls))):
            # A thread that a process does not wait for when it ends: an interrupt is not held up by gigabytes.
            threading.Thread(target=work, name="fetching", daemon=True).start()
        while len(found) < len(calls):
            number, answer, error = answers.get()
            if error is not None:
                raise error
            found[number] = answer  # pyright: ignore[reportArgumentType]
    finally:
        stop.set()
    return [found[number] for number in range(len(calls))]


def listing(repository: str, *, revision: str = "main", offline: bool = False) -> list[str]:
    """The names of a repository's files; without a connection, of those in the local cache.

    Raises what `fetch` raises.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _said(repository, "the list of files", revision, offline):
        if not (offline or constants.HF_HUB_OFFLINE):
            try:
                return sorted(HfApi().list_repo_files(repository, revision=revision))
            except Exception as error:  # its client's errors have no base of their own: looked at, or raised again
                answered = getattr(error, "response", None) is not None
                if answered or not (isinstance(error, OfflineModeIsEnabled | OSError) or _of_the_network(error)):
                    raise
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _of_the_network(error: Exception) -> bool:
    """Whether the hub library's own client raised it, whose errors are no OSError and change with its version."""
    return type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "requests", "urllib3"))


@contextmanager
def _said(repository: str, file: str, revision: str, offline: bool) -> Iterator[None]:
    """Turn each way to fail into its error."""
    from huggingface_hub import constants, errors

    what = f"{file} of {repository}"
    cache = constants.HF_HUB_CACHE
    try:
        try:
            yield
        except OSError as error:
            refused = _refused(repository, error)
            if refused:
                raise refused from None
            raise
    except errors.HFValidationError as error:
        raise UnknownModel(f"{repository!r} is not the name of a repository, OWNER/NAME: {error}") from None
    except ValueError as error:  # of the library, on a file name that leads out of the repository
        raise UnknownModel(f"{what} cannot be asked for: {_first(error)}") from None
    except errors.GatedRepoError:
        raise WeightsError(
            f"{repository} is gated: accept its licence at {SITE}/{repository}, then log in with `hf auth login` or "
            "set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UnknownModel(f"{repository} has no revision {revision!r}: see {SITE}/{repository}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise UnknownModel(
            f"there is no repository {repository!r} at {SITE}, or it is private: then log in with `hf auth login` or "
            "set HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        why = (
            "nothing is fetched offline"
            if offline or constants.HF_HUB_OFFLINE
            else f"it cannot be fetched: {_first(error)}"
        )
        raise WeightsError(
            f"{what} (revision {revision}) is not in the cache {cache}, and {why}. Connect, or copy a cache there and "
            "set HF_HUB_CACHE"
        ) from None
    except errors.EntryNotFoundError:
        raise WeightsError(
            f"{repository} at {revision} has no file {file!r}: see {SITE}/{repository}/tree/main"
        ) from None
    except errors.HfHubHTTPError as error:
        raise WeightsError(f"{what} cannot be fetched: {_first(error)}. Try again; what has come is kept") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WeightsError(f"no room for {what} in {cache}: free some, or set HF_HUB_CACHE") from None
        raise WeightsError(f"{what} cannot be fetched: {_first(error)}. Try again; what has come is kept") from None


def _refused(repository: str, error: BaseException) -> WeightsError | None:
    """Where the hub does not let in who asks, and a token was sent: why. Without one it is enough to say: log in."""
    from huggingface_hub import errors, get_token

    answered: BaseException | None = error
    while answered is not None and getattr(answered, "response", None) is None:
        answered = answered.__cause__
    status = getattr(getattr(answered, "response", None), "status_code", None)
    if status not in (401, 403) or get_token() is None:
        return None
    if status == 401:
        return WeightsError(
            f"{repository} cannot be fetched: the hub does not accept the token that is set here; log in anew with "
            "`hf auth login`, or correct or unset HF_TOKEN"
        )
    if isinstance(answered, errors.GatedRepoError):
        return WeightsError(
            f"{repository} is gated, and the account that is logged in has not accepted its licence, or has no access "
            f"yet: see {SITE}/{repository}"
        )
    return WeightsError(
        f"{repository} cannot be fetched: the token that is set here may not read it; see {SITE}/settings/tokens"
    )


def _first(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
