"""Promise 3 and 6 of the text: the dataset that was asked for is used, with its own settings, and
no path that nothing reads goes unsaid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import Field

from apt_core import ProviderSpec, SectionSpec, hookimpl
from apt_core.config import Section, parse_override
from apt_core.data.loading import load_data
from apt_core.data.store.format import PARTS
from apt_core.errors import ConfigError
from apt_core.kernel import Kernel, boot
from apt_core.planning.plan import make_plan
from apt_core.plugin_manager import PluginManager
from apt_core.providers import DatasetProvider

ENDLESS = """
import os, signal
from apt_core import ProviderSpec, hookimpl
from apt_core.providers import DatasetProvider

class Endless(DatasetProvider):
    name = "endless"

    def documents(self):
        for number in range(10**9):
            if number == 100:
                os.kill(os.getpid(), signal.SIGTERM)
            yield f"document {number}"

    def fingerprint(self):
        return "endless"

@hookimpl
def apt_register_providers():
    return [ProviderSpec("dataset", "endless", Endless)]
"""


class Settings(Section):
    words: int = Field(default=3, description="How many words.")


class Words(DatasetProvider):
    def documents(self) -> Iterator[str]:
        section = self.data_section
        for number in range(40):
            yield f"{number}: {self.config.words} words of {section.train_path}, {section.errors}"


class OfData(DatasetProvider):
    def documents(self) -> Iterator[str]:
        for number in range(40):
            yield f"{number}: {self.config.errors}, {self.data_section is self.config}"


class NoDocuments(DatasetProvider):
    def documents(self) -> Any:
        return [("train", "val")]


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
            ProviderSpec("dataset", "no_text", NoDocuments),
        ]


def start(data: dict[str, Any], *, strict: bool = False, **profile: Any) -> Kernel:
    manager = PluginManager()
    manager.register(Datasets(), "datasets")
    profile = {"data": {"max_length": 16, **data}, "hardware": {"device": "cpu"}, **profile}
    return boot(profile, manager=manager, strict=strict)


def text_of(kernel: Kernel, part: str = "train") -> str:
    data = load_data(kernel)
    tokens = data.sources[0].store.part(part)  # type: ignore[arg-type]
    return data.tokenizer.decode(tokens.read(0, tokens.num_tokens).tolist())


def test_the_stores_of_a_run_share_the_memory_that_holds_small_ones(monkeypatch):
    def held(data: dict[str, Any], limit: int) -> list[bool]:
        monkeypatch.setattr("apt_core.data.loading.IN_MEMORY", limit)
        return [each.store.part("train").in_memory for each in load_data(start(data)).sources]

    mixture = [{"name": name, "source": "pydoc"} for name in ("one", "two")]
    (source,) = load_data(start({"source": "pydoc"})).sources
    size = sum(source.store.part(name).num_tokens for name in PARTS)  # bytes are the tokens
    assert held({"source": "pydoc"}, size) == [True]
    assert held({"source": "pydoc"}, size - 1) == [False]
    assert held({"mixture": mixture}, 2 * size) == [True, True]
    assert held({"mixture": mixture}, 2 * size - 2) == [False, False]


def used(kernel: Kernel) -> tuple[str, str]:
    (row,) = [r for r in kernel.registry.resolutions.values() if r.kind == "dataset"]
    return row.asked, row.used


@pytest.mark.parametrize(
    "data", [{"loader": "words"}, {"loader": "words", "train_path": "a query"}, {"source": "words"}]
)
def test_a_dataset_gets_its_own_section_and_sees_data(data):
    kernel = start(data, strict=True, counted={"words": 5})
    assert f": 5 words of {data.get('train_path')}, strict" in text_of(kernel)
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
    assert ": replace, True" in text_of(start({"loader": "of_data", "errors": "replace"}))


def test_the_default_loader_without_a_path_leaves_the_choice_to_the_built_in_text(tmp_path):
    kernel = start({"loader": "text_default"}, strict=True)
    text_of(kernel)
    assert used(kernel) == ("pydoc", "pydoc")
    held_out = tmp_path / "val.txt"
    held_out.write_text("a text of one's own", encoding="utf-8")
    assert text_of(start({"val_path": str(held_out)}, strict=True), "val") == "a text of one's own"
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
    with pytest.raises(ConfigError, match=r"NoDocuments.*is a tuple, not a document"):
        load_data(start({"loader": "no_text"}))


def test_a_signal_ends_the_build_of_the_data(apt_train, tmp_path, monkeypatch):
    """At once, since there is nothing to save yet, for a trained tokenizer and for a store."""
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    plugin = tmp_path / "endless.py"
    plugin.write_text(ENDLESS, encoding="utf-8")
    words = ["--plugin", str(plugin), "--data.loader", "endless"]
    for more in (["--data.tokenizer_name", "char"], []):
        done = apt_train(*words, *more)
        assert (done.code, done.err) == (143, "interrupted\n")
        assert not done.folder.exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
