"""A tokenizer that is trained on the run's own text: once for all runs, kept with each."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from apt_core.data.loading import load_data
from apt_core.data.tokenizers.char import CharTokenizer
from apt_core.data.tokenizers.corpus import train_tokenizer
from apt_core.errors import CheckpointError, ConfigError
from apt_core.kernel import boot
from apt_core.providers import DatasetProvider, Document, Message
from apt_core.providers.dataset import DataSection
from apt_core.runs import open_run
from apt_core.testing import TINY_PROFILE, tiny_run

TRAINED = "is trained on the run's documents"


class Few(DatasetProvider):
    """Texts of its own; with ``known``, it tells by what they are known."""

    texts: Sequence[Any] = ("日本語", "数据 ab", {"prompt": "什么", "response": "ответ"})
    known: str | None = "these"

    def documents(self) -> Iterator[Any]:
        yield from self.texts

    def fingerprint(self) -> str | None:
        return self.known


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO)
    return tmp_path / "cache"


def trained(source: DatasetProvider, **data: Any) -> CharTokenizer:
    section = DataSection.model_validate(data)
    tokenizer = CharTokenizer(section.tokenizer)
    train_tokenizer(tokenizer, [source], section)
    return tokenizer


def test_it_is_trained_once_for_all_runs(cache, caplog):
    first = trained(Few())
    assert set("日本語数据什么ответ") <= set(first.characters)
    assert TRAINED in caplog.text
    caplog.clear()
    again = trained(Few())
    assert again.fingerprint() == first.fingerprint() and TRAINED not in caplog.text
    (kept,) = (cache / "tokenizers").iterdir()
    # Another text, setting or normal form is another vocabulary.
    other = Few()
    other.known, other.texts = "others", ["xyz é"]
    assert trained(other).characters == "é"
    assert trained(other, normalize="NFC").characters == "é"
    assert len(trained(Few(), tokenizer={"vocab_size": 266}).characters) == 3
    assert len([*(cache / "tokenizers").iterdir()]) == 4
    # So is another template, which is kept with it, although its file has the same name.
    template = cache / "own.jinja"
    for said in ("{{ messages[0].content }}", "{{ messages[-1].content }}"):
        template.write_text(said)
        for _ in range(2):
            assert trained(Few(), tokenizer={"chat_template": str(template)}).chat_template == said
    # A damaged one is trained anew.
    (kept / "characters.json").write_text("{")
    caplog.clear()
    assert trained(Few()).characters == first.characters and TRAINED in caplog.text
    caplog.clear()
    trained(Few())
    assert TRAINED not in caplog.text


def test_nothing_is_kept_of_a_source_without_a_fingerprint(cache, caplog):
    source = Few()
    source.known = None
    for _ in range(2):
        caplog.clear()
        assert "日" in trained(source).characters
        assert TRAINED in caplog.text
    assert not (cache / "tokenizers").exists()


def test_the_sample_is_bounded():
    source = Few()
    source.texts = ["а" * 50 + "б", "в" * 50 + "г", "д" * 50]
    limits = {"sample_chars": 80, "sample_chars_per_document": 50}
    assert trained(source, tokenizer=limits).characters == "ав"
    source.texts = [""]
    source.known = "empty"
    with pytest.raises(ConfigError, match="no text to train the tokenizer on"):
        trained(source)


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_a_run_keeps_it_and_is_opened_without_its_data(tmp_path, cache, name):
    if name == "bpe":
        pytest.importorskip("tokenizers")
    text = tmp_path / "text.txt"
    text.write_text("Ein Text über Größen, 数据 и данные. " * 60, encoding="utf-8")
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}!{{ m.content }}{% endfor %}")
    data = {"train_path": str(text), "tokenizer_name": name,
            "tokenizer": {"chat_template": str(template)}}  # fmt: skip
    profile = {**TINY_PROFILE, "data": data}
    overrides = {"model.vocab_size": 320, "evaluation.sample_tokens": 4}
    output = tmp_path / "run"
    run = tiny_run(profile=profile, overrides=overrides, steps=2, output=output)
    assert run.result.status == "finished"
    text.unlink()
    template.unlink()
    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = open_run(output).tokenizer
    asked = Document(messages=(Message("user", "was?"),))
    assert tokenizer.decode(tokenizer.encode_prompt(asked)) == "!was?"
    assert tokenizer.decode(tokenizer.encode("über 数据 \U0001f600")) == "über 数据 \U0001f600"
    if name == "byte":
        return
    assert len(tokenizer.encode("данные")) <= 6
    (kept,) = (output / "tokenizer").glob(
        {"char": "characters.json", "bpe": "tokenizer.json"}[name]
    )
    kept.write_text(json.dumps({"model": {}}))
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        open_run(output)
    shutil.rmtree(output / "tokenizer")
    with pytest.raises(CheckpointError, match=f"the tokenizer '{name}', which was trained, is not"):
        open_run(output)


def test_a_vocabulary_that_the_model_does_not_cover_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(0x4E00 + n) for n in range(400)) * 4, encoding="utf-8")
    data = {"train_path": str(text), "tokenizer_name": "char", "tokenizer": {"vocab_size": 500}}
    with pytest.raises(ConfigError, match=r"model\.vocab_size: is 300, but .*'char' has 500 ids"):
        load_data(boot({"data": data, "model": {"vocab_size": 300}}))
    del data["tokenizer"]  # then it has as many as the model
    assert load_data(boot({"data": data, "model": {"vocab_size": 300}})).tokenizer.vocab_size == 300
