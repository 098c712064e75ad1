"""Promise 3 and 6 of the text: the dataset that was asked for is used, with its own settings, and
no path that nothing reads goes unsaid."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from apt_core import ProviderSpec, SectionSpec, hookimpl
from apt_core.config import Section, parse_override
from apt_core.data.loading import load_text
from apt_core.errors import ConfigError, ProviderError
from apt_core.kernel import Kernel, boot
from apt_core.planning.plan import make_plan
from apt_core.plugin_manager import PluginManager
from apt_core.providers import DatasetProvider, TextData


class Settings(Section):
    words: int = Field(default=3, description="How many words.")


class Words(DatasetProvider):
    def load(self) -> TextData:
        data = self.data_section
        assert data is not None
        words = f"{self.config.words} words of {data.train_path}, {data.max_length}"
        return TextData(words, "held out", words)


class OfData(DatasetProvider):
    def load(self) -> TextData:
        return TextData(
            str(self.config.max_length), "held out", str(self.data_section is self.config)
        )


class NoText(DatasetProvider):
    def load(self) -> Any:
        return ("train", "val")


class Datasets:
    @hookimpl
    def apt_register_config(self) -> list[SectionSpec]:
        return [SectionSpec("counted", Settings)]

    @hookimpl
    def apt_register_providers(self) -> list[ProviderSpec]:
        return [
            ProviderSpec("dataset", "words", Words, config=Settings, section="counted"),
            ProviderSpec("dataset", "files", Words, config=Settings, files=("train_path",)),
            ProviderSpec("dataset", "of_data", OfData),
            ProviderSpec("dataset", "no_text", NoText),
        ]


def start(data: dict[str, Any], *, strict: bool = False, **profile: Any) -> Kernel:
    manager = PluginManager()
    manager.register(Datasets(), "datasets")
    profile = {"data": {"max_length": 16, **data}, "hardware": {"device": "cpu"}, **profile}
    return boot(profile, manager=manager, strict=strict)


def used(kernel: Kernel) -> tuple[str, str]:
    (row,) = [r for r in kernel.registry.resolutions.values() if r.kind == "dataset"]
    return row.asked, row.used


@pytest.mark.parametrize(
    "data", [{"loader": "words"}, {"loader": "words", "train_path": "a query"}, {"source": "words"}]
)
def test_a_dataset_gets_its_own_section_and_sees_data(data):
    kernel = start(data, strict=True, counted={"words": 5})
    assert load_text(kernel).train == f"5 words of {data.get('train_path')}, 16"
    assert used(kernel) == ("words", "words")


def test_the_plan_shows_the_dataset_that_was_asked_for():
    plan = make_plan(start({"loader": "words"}), None)
    assert [r["asked"] for r in plan["providers"] if r["kind"] == "dataset"] == ["words"]


def test_settings_of_a_dataset_that_is_not_used_do_nothing():
    manager = PluginManager()
    manager.register(Datasets(), "datasets")
    overrides = [parse_override("counted.words=4")]
    (item,) = boot({}, manager=manager, overrides=overrides).inactive
    assert (item.key, item.reason) == ("counted.words", "dataset:words is not used")


def test_a_dataset_without_a_section_of_its_own_gets_data():
    assert load_text(start({"loader": "of_data"})).train == "16"
    assert load_text(start({"loader": "of_data"})).description == "True"


def test_the_default_loader_without_a_path_leaves_the_choice_to_the_built_in_text(tmp_path):
    kernel = start({"loader": "text_default"}, strict=True)
    whole = load_text(kernel)
    assert used(kernel) == ("pydoc", "pydoc")
    held_out = tmp_path / "val.txt"
    held_out.write_text("a text of one's own", encoding="utf-8")
    text = load_text(start({"val_path": str(held_out)}, strict=True))
    assert text.val == "a text of one's own" and text.train == whole.train + whole.val
    with pytest.raises(ConfigError, match=r"data\.val_path: there is no file 'gone.txt'"):
        start({"val_path": "gone.txt"})


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"loader": "pydoc", "train_path": "x.txt"}, "data.train_path"),
        ({"loader": "files", "train_path": __file__, "val_path": "x.txt"}, "data.val_path"),
    ],
)
def test_a_path_that_the_dataset_does_not_read_is_inactive(data, key):
    assert [item.key for item in start(data).inactive] == [key]
    with pytest.raises(
        ConfigError, match=rf"{key}: it does nothing here: dataset:{data['loader']}"
    ):
        start(data, strict=True)


def test_files_are_looked_for_where_the_dataset_says_that_it_reads_them():
    with pytest.raises(ConfigError, match=r"data\.train_path: there is no file 'gone.txt'"):
        start({"loader": "files", "train_path": "gone.txt"})


def test_a_source_and_a_loader_are_not_both_taken():
    with pytest.raises(ConfigError, match=r"data\.source: .*'pydoc' and data\.loader is 'words'"):
        start({"source": "pydoc", "loader": "words"})
    start({"source": "words", "loader": "words"})
    start({"source": "words", "loader": "text_default"})


def test_what_is_no_text_names_the_dataset():
    with pytest.raises(ProviderError, match=r"dataset:no_text \(plugin datasets\).*a tuple"):
        load_text(start({"loader": "no_text"}))
