"""The section ``data_hf`` of the profile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from apt_core import Problem
from apt_core.providers.dataset import SourceSection
from apt_core.sections import Name, Section

if TYPE_CHECKING:
    from apt_core.config import Config

SECTION = "data_hf"
PROVIDER = "hf_datasets"


class HfSettings(Section):
    """``data_hf``: which part of the dataset that ``data.train_path`` names is read, and how."""

    config: Name | None = Field(
        default=None, description="Configuration (subset) of the dataset, where it has several."
    )
    split: Name = Field(default="train", description="The split to train on.")
    val_split: Name | None = Field(
        default=None,
        description="The split to evaluate on, of data.val_path where that is given; without "
        "either, val_fraction is held out.",
    )
    revision: Name | None = Field(
        default=None, description="Commit, tag or branch of a dataset on the hub."
    )
    streaming: bool = Field(
        default=True,
        description="Read files as they come, one shard after the other; false: first copy them to "
        "the cache of Hugging Face, which also works offline once it is there.",
    )


def wrong(section: SourceSection, place: str) -> Iterator[Problem]:
    """What keeps a source from being read, as far as that can be told without reading."""
    if section.train_path is None:
        hint = "give a folder, data files, or a name on the hub such as OWNER/NAME"
        yield Problem("no dataset is named", f"{place}.train_path", hint=hint)


def contradictions(config: Config) -> Iterator[Problem]:
    """Problems of the sources that the profile uses, those of its mixture included."""
    for place, section in config.data.sections():
        if section.dataset_name == PROVIDER:
            yield from wrong(section, place)
