"""The tokenizers that a GGUF holds: llama.cpp gives their ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.optional import optional

optional("gguf", "what writes GGUF is not installed")
optional("xllamacpp", "what runs the exports is not installed")

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from apt_core.data.tokenizers.bpe import SYMBOLS
from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.modeling.plain import plain_model
from apt_core.runs import Session
from apt_core.testing.tiny import TEXT
from apt_plugins.export.exporting import prove
from apt_plugins.export.gguf.byte_level import PRE_TOKENIZERS
from apt_plugins.export.gguf.exporter import GGUFExporter
from apt_plugins.export.gguf.reading import read_vocabulary
from apt_plugins.export.questions import TEXTS, Questions, questions_for
from apt_plugins.export.runtimes import answered
from tests.plugins.export.conftest import TEMPLATE, Model, job_of, session_of

MORE = (
    "I'LL we'Re it's 'tis O'Neil",
    "  \n\n \t x\r\n\r\n  y \n",
    "12345678 1,234.5 ١٢٣ Ⅷ ½",
    "a\u0301\u0327b क्षि ม้า",
    "snake__case ...;;; <|im_end|> </s>",
    "e\u200d\ufe0f 👩‍🚀!!\n?!",
)
ROWS = 480


def byte_level(*patterns: str, whole_words: bool = False) -> tokenizers.Tokenizer:
    """A tokenizer that learned merges within words that ``patterns`` split."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_])
    trainer = trainers.BpeTrainer(
        vocab_size=440, show_progress=False, initial_alphabet=SYMBOLS, special_tokens=["<|end|>"]
    )
    made.train_from_iterator([TEXT, *TEXTS, *MORE] * 3, trainer)
    return made


def sentencepiece(prefix: bool) -> tokenizers.Tokenizer:
    """Merges that follow from the tokens, as converters of SentencePiece's models write them."""
    words = ["\u2581t", "he", "\u2581the", "in", "an", "\u2581\u2581", "er", "ing", "\u2581a", "nd"]
    words += ["and", "\u2581and", "th", "\u2581th"]
    letters = sorted({letter for word in words for letter in word} | set("ioqus.,é中"))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    vocabulary = {text: token for token, text in enumerate(texts)}
    merges = [
        (word[:at], word[at:])
        for word in words
        for at in range(1, len(word))
        if word[:at] in vocabulary and word[at:] in vocabulary
    ]
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


MADE: Mapping[str, Any] = {
    **{
        name: lambda patterns=patterns, whole=whole: byte_level(*patterns, whole_words=whole)
        for (patterns, whole), name in PRE_TOKENIZERS.items()
    },
    "sentencepiece": lambda: sentencepiece(True),
    "sentencepiece without prefix": lambda: sentencepiece(False),
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    settings = {"model.vocab_size": ROWS, "model.num_layers": 1, "model.tva.s": 0}
    return session_of(Model(settings), tmp_path_factory.mktemp("model"))


def test_llama_cpp_gives_the_ids(session: Session, tmp_path: Path) -> None:
    questions = Questions(((1,),), (), (0,), (*TEXTS, *MORE))
    exporter, targets, made = GGUFExporter(), [], {}
    for name, make in MADE.items():
        folder = tmp_path / name
        folder.mkdir()
        make().save(str(folder / "tokenizer.json"))
        end = "</s>" if "piece" in name else "<|end|>"
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        made[name] = HFTokenizer({"path": str(folder)})
        job = job_of(folder, plain_model(session.model), made[name])
        assert not [*exporter.check(job.model.shape, made[name])], name
        exporter.write(job)
        targets.append((folder, questions))
    with answered(exporter.proof, targets) as answers:
        for (name, tokenizer), foreign in zip(made.items(), answers, strict=True):
            expected = [tokenizer.encode(text) for text in questions.texts]
            differ = [
                text
                for text, ids, theirs in zip(
                    questions.texts, expected, foreign.text_ids, strict=True
                )
                if ids != theirs
            ]
            assert not differ, (name, differ)
            assert foreign.ends == [tokenizer.special.eos]


def test_conversations_begin_and_end_as_the_tokenizer_of_the_run_has_it(
    session: Session, tmp_path: Path
) -> None:
    made = sentencepiece(True)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "export").mkdir()
    session = replace(session, tokenizer=HFTokenizer({"path": str(tmp_path)}))
    assert session.tokenizer.special.bos == 1
    plain, exporter = plain_model(session.model, session.tokenizer.vocab_size), GGUFExporter()
    exporter.write(job_of(tmp_path / "export", plain, session.tokenizer))
    questions = questions_for(plain.shape, session.tokenizer, num_prompts=2, new_tokens=4)
    found = prove(session, exporter, plain, tmp_path / "export", questions).comparison
    assert found.faults == [] and found.ends_equal and len(questions.conversations) == 2


def test_the_name_of_another_pattern_is_caught(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns, _ = next(key for key, name in PRE_TOKENIZERS.items() if name == "qwen2")
    byte_level(*patterns).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (tmp_path / "export").mkdir()
    session = replace(session, tokenizer=HFTokenizer({"path": str(tmp_path)}))
    plain, exporter = plain_model(session.model, session.tokenizer.vocab_size), GGUFExporter()
    monkeypatch.setitem(PRE_TOKENIZERS, (patterns, False), "gpt-2")
    exporter.write(job_of(tmp_path / "export", plain, session.tokenizer))
    questions = questions_for(plain.shape, session.tokenizer, num_prompts=1, new_tokens=1)
    found = prove(session, exporter, plain, tmp_path / "export", questions).comparison
    assert "its tokenizer encodes" in "".join(found.faults)


def test_a_tokenizer_that_composes_characters_is_compared_on_composed_texts(
    session: Session, tmp_path: Path
) -> None:
    made = byte_level(*next(patterns for (patterns, _), name in PRE_TOKENIZERS.items()))
    made.normalizer = normalizers.NFC()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (tmp_path / "export").mkdir()
    session = replace(session, tokenizer=HFTokenizer({"path": str(tmp_path)}))
    plain = plain_model(session.model, session.tokenizer.vocab_size)
    exporter = GGUFExporter({"assume_nfc": True})
    assert [*GGUFExporter().check(plain.shape, session.tokenizer)]
    exporter.write(job_of(tmp_path / "export", plain, session.tokenizer))
    questions = Questions(((1,),), (), (0,), ("e\u0301", "plain"))
    found = prove(session, exporter, plain, tmp_path / "export", questions).comparison
    assert found.faults == [] and found.encoded == 2
    foreign = replace(exporter.proof, normal_form=None)
    with answered(foreign, [(tmp_path / "export", questions)]) as [answers]:
        assert answers.text_ids[0] != session.tokenizer.encode("e\u0301")


def test_what_is_only_similar_is_refused() -> None:
    def refused(data: Mapping[str, Any], rows: int = ROWS) -> str:
        found, problems = read_vocabulary(data, rows)
        assert found is None
        return "\n".join(problems)

    def data(made: tokenizers.Tokenizer, **changes: Any) -> dict[str, Any]:
        return {**json.loads(made.to_str()), **changes}

    qwen = byte_level(r"\p{L}+")
    assert r"splits texts by '\\p{L}+', for which llama.cpp has no name" in refused(data(qwen))
    composing = {"type": "NFC"}
    told = refused(data(qwen, normalizer=composing))
    assert "normalises texts (NFC)" in told and told.endswith("--option assume_nfc=true")
    assert "is of type Unigram" in refused({"model": {"type": "Unigram"}})
    spaces = {"type": "Whitespace"}
    assert "splits texts by Whitespace" in refused(data(qwen, pre_tokenizer=spaces))
    added = [{"id": 470, "content": "<x>", "special": True, "lstrip": True}]
    assert "finds '<x>' by lstrip" in refused(data(qwen, added_tokens=added))
    assert f"and the model {ROWS - 100} ids" in refused(data(qwen), ROWS - 100)
    piece = data(sentencepiece(True))
    model = piece["model"]
    swapped = {**model, "merges": model["merges"][1:]}
    assert "in another order than by its tokens" in refused({**piece, "model": swapped})
    fewer = {text: token for text, token in model["vocab"].items() if text != "<0x8A>"}
    lacking = refused({**piece, "model": {**model, "vocab": fewer}})
    assert "no token for 1 bytes, such as 0x8A" in lacking
    scheme = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
    assert "that begin with none" in refused({**piece, "normalizer": None, "pre_tokenizer": scheme})
