"""The source of HLBD samples: its tasks, their split, and what it says of files that are wrong."""

from __future__ import annotations

import json

import pytest

from apt_core.data.sources.hlbd import HLBDDataset, task_of
from apt_core.errors import ConfigError
from apt_core.providers.dataset import DataSection

SAMPLES = [
    {
        "concept": "火",
        "level_1": {"字卡": "火", "emoji": "🔥"},
        "level_5": {"英文": "It burns."},
        "level_12": "fuego",
    },
    {"concept": "水", "level_2": {"短语": "喝水"}, "level_5": {"英文": "I drink."}},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))


def source(tmp_path, content, **settings):
    path = tmp_path / "samples.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return HLBDDataset(DataSection(train_path=str(path), loader="hlbd", **settings))


def problems(tmp_path, content):
    with pytest.raises(ConfigError) as caught:
        list(source(tmp_path, content).documents())
    return [(p.message, p.key, p.where.removeprefix(str(tmp_path))) for p in caught.value.problems]


def test_each_level_is_to_be_turned_into_each_other_one_of_the_sample(tmp_path):
    found = list(source(tmp_path, SAMPLES).documents())
    assert [(each.prompt, each.response) for each in found] == [
        ("1>5 火 🔥", "It burns."),
        ("1>12 火 🔥", "fuego"),
        ("5>1 It burns.", "火 🔥"),
        ("5>12 It burns.", "fuego"),
        ("12>1 fuego", "火 🔥"),
        ("12>5 fuego", "It burns."),
        ("2>5 喝水", "I drink."),
        ("5>2 I drink.", "喝水"),
    ]
    assert [each.key for each in found] == ["火"] * 6 + ["水"] * 2
    assert found[-1].where.endswith("samples.json: sample 2")
    assert [task_of(each.prompt) for each in found][1:3] == [(1, 12), (5, 1)]
    assert task_of("5 > 3 is true") is None


def test_a_list_alone_and_an_object_with_samples_are_read_alike(tmp_path):
    alone = list(source(tmp_path, SAMPLES).documents())
    inside = list(source(tmp_path, {"metadata": {}, "samples": SAMPLES}).documents())
    assert alone == inside


def test_without_a_path_the_shipped_samples_are_read(tmp_path):
    shipped = HLBDDataset(DataSection(loader="hlbd"))
    found = list(shipped.documents())
    concepts = {each.key for each in found}
    assert len(concepts) >= 200
    assert len(found) == len(concepts) * 8 * 7
    assert len({each.prompt for each in found}) == len(found)
    assert shipped.held_out() is None
    assert shipped.describe().startswith("the words shipped with APT (")
    other = source(tmp_path, SAMPLES)
    assert shipped.fingerprint() == HLBDDataset(DataSection(loader="hlbd")).fingerprint()
    assert shipped.fingerprint() != other.fingerprint()


def test_files_of_one_s_own_to_train_and_to_validate_on(tmp_path):
    own = source(tmp_path, SAMPLES, val_path=str(tmp_path / "samples.json"))
    assert list(own.held_out()) == list(own.documents())


def test_every_sample_that_is_wrong_is_named(tmp_path):
    levels = {"level_1": "a", "level_2": "b"}
    found = problems(
        tmp_path,
        [
            {"concept": "ok", **levels},
            levels,
            "text",
            {"concept": "one", "level_1": "a"},
            {"concept": "typo", **levels, "level2": "c"},
            {"concept": "empty", "level_1": {"字卡": " "}, "level_2": "b"},
            {"concept": "nothing", "level_1": {}, "level_2": "b"},
            {"concept": "lone", "level_1": "\ud800", "level_2": "b"},
        ],
    )
    assert {(key, where) for _, key, where in found} == {("data.train_path", "/samples.json")}
    assert [message for message, *_ in found] == [
        "sample 2 has no text at 'concept'",
        'sample 3 is not {"concept": …, "level_1": {…}, "level_2": {…}, …}',
        "sample 4 (one) has fewer than two levels, so that it makes no task",
        "sample 5 (typo) has the unknown key 'level2'; levels are level_1, level_2, …",
        "sample 6 (empty) has no text at 'level_1'",
        "sample 7 (nothing) has no text at 'level_1'",
        "sample 8 (lone) has a lone surrogate at 'level_1', which is no text",
    ]


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        ('[\n{"concept": ', "is not JSON: Expecting value at column 13", ":2"),
        ('{"metadata": {}}', "has no list of samples", ""),
        ("3", "has no list of samples", ""),
        ("[]", "holds no text", ""),
        ('[{"concept": "a", "concept": "b"}]', "has 'concept' twice", ""),
        ("[" * 100_000, "is nested too deep", ""),
        ("9" * 5_000, "holds a number of more than 1,000 digits", ""),
    ],
)
def test_a_file_that_has_no_samples_is_refused(tmp_path, content, message, line):
    assert problems(tmp_path, content) == [(message, "data.train_path", f"/samples.json{line}")]
