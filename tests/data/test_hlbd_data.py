"""The shipped HLBD samples: complete, unambiguous, and each level in its own notation."""

from __future__ import annotations

import json
import re
import unicodedata
from importlib.resources import files
from itertools import pairwise

import pytest

KEYS = {
    "level_1": ("字卡", "emoji"),
    "level_2": ("短语",),
    "level_3": ("数学",),
    "level_4": ("拼音",),
    "level_5": ("英文",),
    "level_6": ("中文",),
    "level_7": ("日文",),
    "level_8": ("韩文",),
}
MAX_CHARS = 40
# Each initial with the finals that it takes, as pinyin spells them.
SYLLABLES = {
    initial + final
    for initial, finals in {
        "": "a ai an ang ao e ei en eng er o ou",
        "b": "a ai an ang ao ei en eng i ian iao ie in ing o u",
        "p": "a ai an ang ao ei en eng i ian iao ie in ing o ou u",
        "m": "a ai an ang ao e ei en eng i ian iao ie in ing iu o ou u",
        "f": "a an ang ei en eng o ou u",
        "d": "a ai an ang ao e ei eng i ia ian iao ie ing iu ong ou u uan ui un uo",
        "t": "a ai an ang ao e eng i ian iao ie ing ong ou u uan ui un uo",
        "n": "a ai an ang ao e ei en eng i ian iang iao ie in ing iu ong ou u uan uo ü üe",
        "l": "a ai an ang ao e ei eng i ia ian iang iao ie in ing iu ong ou u uan un uo ü üe",
        "g": "a ai an ang ao e ei en eng ong ou u ua uai uan uang ui un uo",
        "k": "a ai an ang ao e en eng ong ou u ua uai uan uang ui un uo",
        "h": "a ai an ang ao e ei en eng ong ou u ua uai uan uang ui un uo",
        "j": "i ia ian iang iao ie in ing iong iu u uan ue un",
        "q": "i ia ian iang iao ie in ing iong iu u uan ue un",
        "x": "i ia ian iang iao ie in ing iong iu u uan ue un",
        "zh": "a ai an ang ao e en eng i ong ou u ua uai uan uang ui un uo",
        "ch": "a ai an ang ao e en eng i ong ou u ua uai uan uang ui un uo",
        "sh": "a ai an ang ao e ei en eng i ou u ua uai uan uang ui un uo",
        "r": "an ang ao e en eng i ong ou u uan ui un uo",
        "z": "a ai an ang ao e ei en eng i ong ou u uan ui un uo",
        "c": "a ai an ang ao e en eng i ong ou u uan ui un uo",
        "s": "a ai an ang ao e en eng i ong ou u uan ui un uo",
        "y": "a an ang ao e i in ing o ong ou u uan ue un",
        "w": "a ai an ang ei en eng o u",
    }.items()
    for final in finals.split()
}
TONES = {"\u0304": 1, "\u0301": 2, "\u030c": 3, "\u0300": 4}
HANZI, KANA, HANGUL = r"[\u4e00-\u9fff]", r"[\u3040-\u30ff]", r"[\uac00-\ud7a3]"


@pytest.fixture(scope="module")
def data():
    source = files("apt_core.data.sources") / "hlbd_concepts.json"
    return json.loads(source.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows(data):
    """The values of each sample: card, emoji, phrase, formula, pinyin, four sentences."""
    return [
        tuple(sample[level][key] for level, keys in KEYS.items() for key in keys)
        for sample in data["samples"]
    ]


def syllable_and_tone(syllable: str) -> tuple[str, int]:
    """The syllable without its tone mark, and its tone; 0 is neutral, 5 more than one mark."""
    decomposed = unicodedata.normalize("NFD", syllable)
    tones = [TONES[mark] for mark in decomposed if mark in TONES]
    plain = "".join(mark for mark in decomposed if mark not in TONES)
    return unicodedata.normalize("NFC", plain), sum(tones) if len(tones) < 2 else 5


def test_at_least_200_concepts_have_all_levels_in_the_upstream_format(data):
    samples = data["samples"]
    assert set(data) == {"metadata", "samples"}
    assert data["metadata"]["samples"] == len(samples) >= 200
    assert set(data["metadata"]["levels"]) == set(KEYS)
    for sample in samples:
        assert set(sample) == {"concept", *KEYS}, sample
        assert {level: tuple(sample[level]) for level in KEYS} == KEYS, sample
        assert sample["level_1"]["字卡"] == sample["concept"]


def test_every_value_belongs_to_one_concept_is_short_and_normalised(rows):
    for values in zip(*rows, strict=True):
        assert len(set(values)) == len(values), {v for v in values if values.count(v) > 1}
        for value in values:
            assert value and value == value.strip() and len(value) <= MAX_CHARS, value
            assert value == unicodedata.normalize("NFC", value), value


def test_the_formula_is_the_phrase_cut_into_declared_slots(data, rows):
    slots = set(data["metadata"]["slots"])
    for concept, _, phrase, formula, *_ in rows:
        parts = [re.fullmatch(rf"([A-Z])\(({HANZI}+)\)", part) for part in formula.split("+")]
        assert all(parts), formula
        assert {part[1] for part in parts} <= slots, formula
        assert "".join(part[2] for part in parts) == phrase
        assert concept in phrase


def test_pinyin_has_a_valid_syllable_for_each_character_of_the_phrase(rows):
    assert len(SYLLABLES) > 390
    for _, _, phrase, _, pinyin, *_ in rows:
        assert re.fullmatch(f"{HANZI}+", phrase), phrase
        syllables = [syllable_and_tone(syllable) for syllable in pinyin.split(" ")]
        assert len(syllables) == len(phrase), (phrase, pinyin)
        assert {plain for plain, _ in syllables} <= SYLLABLES, pinyin
        assert all(tone < 5 for _, tone in syllables), pinyin
        assert syllables[0][1], f"{pinyin}: a phrase does not begin with a neutral tone"


def test_the_tones_of_yi_and_bu_follow_the_next_syllable(rows):
    seen = set()
    for _, _, phrase, _, pinyin, *_ in rows:
        spoken = [syllable_and_tone(syllable) for syllable in pinyin.split(" ")]
        for (character, (_, tone)), (_, (_, following)) in pairwise(
            zip(phrase, spoken, strict=True)
        ):
            if character in "一不":
                seen.add(character)
                assert tone == (2 if following == 4 else 4), (phrase, pinyin)
    assert seen == {"一", "不"}


def test_each_sentence_is_in_the_script_of_its_language(rows):
    for concept, emoji, _, _, _, english, chinese, japanese, korean in rows:
        assert unicodedata.category(emoji[0]) == "So" or "\u20e3" in emoji, emoji
        assert re.fullmatch(r"[A-Z][a-zA-Z' ]+\.", english), english
        assert re.fullmatch(f"({HANZI}|，)+。", chinese) and concept in chinese, chinese
        assert re.fullmatch(f"({HANZI}|{KANA})+。", japanese), japanese
        assert re.search(KANA, japanese), japanese
        assert re.fullmatch(rf"({HANGUL}|[ ,0-9])+\.", korean), korean
        assert re.search(HANGUL, korean), korean
