"""Pushes an export to the Hugging Face Hub, by ``huggingface_hub`` and its own credentials."""

from __future__ import annotations

import re
from pathlib import Path

from apt_core import AptError, ConfigError
from apt_core.error_text import one_line
from apt_core.requirements import unmet

REQUIRES = ("huggingface_hub>=1",)

_KEY = "--push"


def check_push(repository: str) -> None:
    """Raise ConfigError for what is no name of a repository, and where the package is missing."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    if not re.fullmatch(rf"{part}(?:/{part})?", repository) or ".." in repository:
        raise ConfigError(f"{repository!r} is no name of a repository", _KEY, hint="USER/NAME")
    if missing := unmet(REQUIRES):
        hint = 'pip install "apt-kernel[export]"'
        raise ConfigError("; ".join(missing), _KEY, hint=hint)


def push(folder: Path, repository: str, *, public: bool, message: str) -> str:
    """Upload all files of ``folder``; the repository is made where there is none, private unless it
    is to be ``public``. Returns the address of the commit. Raises AptError where that fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="apt-kernel")
        name = api.create_repo(repository, private=not public, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:  # whatever a request over the network ends with
        raise AptError(
            f"{folder} is written; pushing it to {repository} failed: {one_line(error)}"
        ) from error
    return str(commit.commit_url)
