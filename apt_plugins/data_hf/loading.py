"""Opens what a path names with ``datasets``, running nothing that is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import datasets
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from apt_core import ConfigError
from apt_core.data.sources.files import split_suffixes
from apt_core.error_text import shown, text_of
from apt_core.errors import did_you_mean
from apt_core.profile_paths import is_pattern, is_url
from apt_plugins.data_hf.settings import HfSettings

FORMATS = {
    **{".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"},
    **{".parquet": "parquet", ".tsv": "csv", ".txt": "text"},
}
"""The builder of ``datasets`` for each suffix. Others, of which some unpickle, are not used."""

SAVED = ("state.json", "dataset_dict.json")
"""What is in a folder of ``save_to_disk``: of one split, or of several."""

_HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_UNREACHED = {"TransportError", "OfflineModeIsEnabled"}
"""Classes of what the client of the hub raises without a network: which client depends on its
version."""

_SCRIPTS = "Dataset scripts are no longer supported"


class Opening:
    """One dataset by its path: ``key`` is the profile's key that names it, ``settings_key`` that of
    the settings. What cannot be opened raises ConfigError."""

    def __init__(
        self, paths: str | list[str], settings: HfSettings, key: str, settings_key: str
    ) -> None:
        self.paths = [paths] if isinstance(paths, str) else paths
        self.settings, self.key, self.settings_key = settings, key, settings_key

    @property
    def name(self) -> str:
        return ", ".join(self.paths)

    @property
    def saved(self) -> bool:
        """Whether it is a folder of ``save_to_disk``."""
        first = self.paths[0]
        return len(self.paths) == 1 and any(
            os.path.isfile(os.path.join(first, name)) for name in SAVED
        )

    @property
    def on_hub(self) -> bool:
        """Whether it is a name on the hub, as nothing local has it."""
        first = self.paths[0]
        return len(self.paths) == 1 and not os.path.exists(first) and bool(_HUB.fullmatch(first))

    def fail(self, message: str, setting: str = "", hint: str = "") -> NoReturn:
        """Raise ConfigError about the path or one of the settings."""
        key = f"{self.settings_key}.{setting}" if setting else self.key
        raise ConfigError(message, key=key, where=self.name, hint=hint) from None

    def split(self, name: str, setting: str) -> Any:
        """The split of this name, a Dataset or IterableDataset."""
        try:
            found = self._splits()
        except ConfigError:
            raise
        except Exception as error:  # files of any content
            self._explain(error)
        if not isinstance(found, Mapping):
            if setting == "val_split":
                self.fail("has no splits", setting, "name another dataset by data.val_path")
            return found
        if name not in found:
            names = ", ".join(map(repr, found))
            self.fail(
                f"there is no split {name!r}; there are {names}", setting, did_you_mean(name, found)
            )
        return found[name]

    def commit(self) -> str:
        """The commit that a name on the hub stands for now."""
        from huggingface_hub import HfApi

        try:
            found = HfApi().dataset_info(self.paths[0], revision=self.settings.revision)
        except Exception as error:  # what a connection raises
            self._explain(error)
        return str(found.sha)

    def _splits(self) -> Any:
        if self.saved:
            return datasets.load_from_disk(self.paths[0])
        builder = self._builder()
        kinds = {each.__module__ for each in type(builder).__mro__}
        if not kinds & {f"datasets.packaged_modules.{each}.{each}" for each in FORMATS.values()}:
            kind = type(builder).__module__.rpartition(".")[2]
            self.fail(
                f"is of the format {kind!r}, which is not read",
                hint=f"there are {', '.join(dict.fromkeys(FORMATS.values()))}",
            )
        if self.settings.streaming:
            return builder.as_streaming_dataset()
        builder.download_and_prepare()
        return builder.as_dataset()

    def _builder(self) -> Any:
        first, settings = self.paths[0], self.settings
        if first.endswith(".py"):
            self.fail("is a script, and nothing that is read may run code")
        if len(self.paths) == 1 and os.path.isdir(first):
            return datasets.load_dataset_builder(os.path.abspath(first), settings.config)
        if self.on_hub:
            if "/" not in first and first in _packaged():
                self.fail(
                    "is a format, not a dataset", hint="name the files: their suffix tells the rest"
                )
            return datasets.load_dataset_builder(first, settings.config, revision=settings.revision)
        missing = [
            path
            for path in self.paths
            if not os.path.exists(path) and not is_url(path) and not is_pattern(path)
        ]
        if missing:
            self.fail(f"there is no file or folder {missing[0]!r}")
        suffixes = {split_suffixes(path)[0] for path in self.paths}
        formats = {FORMATS.get(suffix, "") for suffix in suffixes}
        if len(formats) != 1 or "" in formats:
            self.fail(
                f"has the suffixes {', '.join(sorted(suffixes))}: one format is read at a time",
                hint=f"there are {', '.join(FORMATS)}",
            )
        more: dict[str, Any] = {"sep": "\t"} if suffixes == {".tsv"} else {}
        return datasets.load_dataset_builder(formats.pop(), data_files=self.paths, **more)

    def _explain(self, error: Exception) -> NoReturn:
        reason = shown(error)
        if _SCRIPTS in reason:
            self.fail(
                f"needs a script ({reason.rpartition(' ')[2]}), and nothing that is read may run "
                "code",
                hint="on the hub, the revision refs/convert/parquet may have its data as files",
            )
        if isinstance(error, GatedRepoError) or "gated dataset" in reason:
            hint = "ask for access on its page, and log in: hf auth login"
            self.fail(f"is gated: {reason}", hint=hint)
        if isinstance(error, RevisionNotFoundError) or reason.startswith("Revision "):
            self.fail(f"there is no such revision: {reason}", "revision")
        if isinstance(error, DatasetNotFoundError | RepositoryNotFoundError):
            self.fail(f"there is no such dataset: {reason}", hint="or it is private: hf auth login")
        if isinstance(error, DataFilesNotFoundError | EmptyDatasetError):
            self.fail(f"holds no data files: {reason}")
        if isinstance(error, ConnectionError) or _UNREACHED.intersection(
            each.__name__ for each in type(error).__mro__
        ):
            self.fail(
                f"the hub cannot be reached: {reason}",
                hint="save_to_disk keeps a dataset in a folder, which needs no network",
            )
        if isinstance(error, ValueError) and "config" in reason.lower():
            lines = text_of(error).splitlines()[:2]  # the names that there are, then an example
            self.fail(" ".join(lines), "config")
        self.fail(f"cannot be opened: {type(error).__name__}: {reason}")


def _packaged() -> Mapping[str, Any]:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    found: Mapping[str, Any] = _PACKAGED_DATASETS_MODULES
    return found
