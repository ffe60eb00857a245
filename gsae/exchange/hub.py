"""The Hugging Face hub. In: a repository's name. Out: its files in the cache of this machine, or a directory's files in it."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from gsae.errors import CheckpointError, ConfigError

TIMEOUT_SECONDS = 10
NAME = re.compile(r"[\w.-]+/[\w.-]+")
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The directory, in the hub's cache, that holds a repository's files of these patterns; fetched where they are not there.

    The hub is asked once, without the client's minutes of retries; when it does not answer, the cache may do.

    Raises:
        CheckpointError: there is no such repository or revision, or it is not in the cache and the hub cannot be reached.
    """
    refusal: Exception | None = None
    with _quiet():
        try:
            HfApi().model_info(name, revision=revision, timeout=TIMEOUT_SECONDS)
        except Exception as error:  # besides its own errors the client raises those of the HTTP library it uses
            refusal = error
        if isinstance(refusal, RevisionNotFoundError):
            raise CheckpointError(f"{revision!r} is no branch, tag or commit of {_page(name)}; check what follows the @")
        if isinstance(refusal, RepositoryNotFoundError):
            raise CheckpointError(
                f"{name!r} is no directory here and no public repository at {constants.ENDPOINT}; check the spelling, or {LOG_IN}"
            )
        try:
            found = snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=refusal is not None)
        except Exception as error:
            raise CheckpointError(
                f"{name!r} is no directory here and could not be fetched from {_page(name)} ({_first_line(refusal or error)}); "
                "check the path, or the way to the hub"
            ) from None
    return Path(found)


def upload(directory: Path, name: str, *, private: bool) -> str:
    """Put a directory's files into a repository, made if need be; gives the address of its page.

    Raises:
        ConfigError: nobody is logged in, the repository may not be written, it is public and should not be, or the hub cannot be reached.
    """
    again = f"hf upload {name} {directory}{' --private' if private else ''}"
    with _quiet():
        try:
            api = HfApi()
            api.create_repo(name, private=private or None, exist_ok=True)
            if private and not api.model_info(name, timeout=TIMEOUT_SECONDS).private:
                raise ConfigError(f"{_page(name)} is there already and public: nothing was pushed; choose another name ({directory} stays)")
            api.upload_folder(repo_id=name, folder_path=directory, commit_message="Upload by gsae export")
        except ConfigError:
            raise
        except Exception as error:  # besides its own errors the client raises those of the HTTP library it uses
            raise ConfigError(f"{_why_not_pushed(name, error)}; {directory} stays, `{again}` pushes it later") from None
    return _page(name)


def _why_not_pushed(name: str, error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f"{constants.ENDPOINT} does not know you: {LOG_IN}"
    if status == 403:
        return f"you may not write {_page(name)}: use a token that may, or another name"
    if isinstance(error, HFValidationError):
        return f"--push {name!r} is not a repository's name (OWNER/NAME)"
    return f"{_page(name)} could not be written ({_first_line(error)})"


def _page(name: str) -> str:
    return f"{constants.ENDPOINT}/{name}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which huggingface_hub shows no progress bars and reports errors only."""
    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    try:
        disable_progress_bars()
        logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()
