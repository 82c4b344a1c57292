"""What can go wrong while weights are fetched, said in one sentence each: network, repository, access, file format."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator

_NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib", "urllib3"}


@contextlib.contextmanager
def fetching(name: str) -> Iterator[None]:
    """Within the context, errors of the hub, of downloads and of unreadable weights get a message for the user.

    ConnectionError: not in the cache and not to be had; PermissionError: a gated repository; ValueError: no such
    repository, revision or file, or a pickle that holds more than tensors. All others pass through.
    """
    try:
        yield
    except Exception as error:
        named = _named(name, list(_chain(error)))
        if named is None:
            raise
        raise named from error


def missing_library(library: str, extra: str, model: str | None = None) -> ImportError:
    """The error for a model of a library that is not installed. model: its name, where that does not say it."""
    what = f"models of {library} need" if model is None else f"{model} is a model of {library}, and needs"
    return ImportError(f"{what} the package {library}: pip install deltalens[{extra}]")


def _named(name: str, errors: list[BaseException]) -> Exception | None:
    from huggingface_hub import errors as hub

    def any_of(*classes: type[BaseException]) -> bool:
        return any(isinstance(error, classes) for error in errors)

    if any_of(hub.GatedRepoError):
        return PermissionError(
            f"{name!r} is a gated repository: accept its terms on its page of the Hugging Face Hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if any_of(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        return _not_fetched(name, errors)
    if any_of(hub.RepositoryNotFoundError, hub.HFValidationError):
        return ValueError(
            f"the Hugging Face Hub has no repository for {name!r}, or it is private: check the name, or log in with "
            "`hf auth login`"
        )
    if any_of(hub.RevisionNotFoundError):
        return ValueError(f"the repository of {name!r} has no such revision: {_first_line(errors)}")
    if any_of(hub.EntryNotFoundError):
        return ValueError(f"the repository of {name!r} lacks a file that is needed: {_first_line(errors)}")
    if any_of(pickle.UnpicklingError) or any("weights_only" in str(error) for error in errors):
        return ValueError(
            f"the weights of {name!r} are a pickle that holds more than tensors, and are not loaded, because such a "
            "file can run code: convert them to .safetensors and pass checkpoint="
        )
    return _not_fetched(name, errors) if any(_is_of_the_network(error) for error in errors) else None


def _not_fetched(name: str, errors: list[BaseException]) -> ConnectionError:
    return ConnectionError(
        f"the weights of {name!r} are not in the local cache and could not be fetched: {_first_line(errors)}. Go "
        "online, set HF_ENDPOINT to a mirror, pass checkpoint= with a weights file, or use deltalens/swin-mini"
    )


def _is_of_the_network(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    package = type(error).__module__.partition(".")[0]
    return isinstance(error, (HfHubHTTPError, ConnectionError)) or package in _NETWORK_PACKAGES


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_line(errors: list[BaseException]) -> str:
    return str(errors[0]).strip().partition("\n")[0].rstrip(".") or type(errors[0]).__name__
