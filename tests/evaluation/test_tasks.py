"""Tasks: of files, of plugins, of the core, and what judges continuations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apt_core import ProviderSpec, hookimpl
from apt_core.data.sources.hlbd import SHIPPED
from apt_core.errors import ConfigError, ProviderError
from apt_core.evaluation import validators
from apt_core.evaluation.final_answers import final_answer
from apt_core.evaluation.finding import find_tasks
from apt_core.evaluation.found import Asking
from apt_core.evaluation.scoring import Scoring, items_of, score
from apt_core.evaluation.tasks import questions
from apt_core.evaluation.tasks.file import read_task
from apt_core.providers.task import Choice, Passage, Question, QuestionTask
from apt_core.testing import tiny_session
from apt_core.types import GenerationResult, Message


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_task_is_a_file_with_its_items_or_beside_them(tmp_path):
    rows = [{"prompt": "1 + 1 = ", "answer": "2"}, {"prompt": "火", "answer": "1 火"}]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = write(
        tmp_path,
        "kind: questions\nitems_file: items.jsonl\nvalidators: [number, repetition]\n"
        'stop: ["\\n"]\ntemperature: 0.5\nnum_samples: 3\ntemplate: chat\n',
    )
    task = read_task(path)
    assert task.items() == [Question("1 + 1 = ", "2"), Question("火", "1 火")]
    assert [*task.metrics] == ["number_match", "repetition_4", "distinct_1", "distinct_2"]
    assert task.metrics["repetition_4"] == "lower"
    assert task.score(Question("", "2"), "2 2 2 2 2 2")["repetition_4"] == pytest.approx(2 / 3)
    task.seed = 7
    requests = questions.requests_of(task, task.items()[0])
    assert [request.seed for request in requests] == [7, 8, 9]
    assert requests[0].prompt == (Message("user", "1 + 1 = "),) and requests[0].stop == ("\n",)
    choices = "kind: choices\nitems: [{prompt: a, choices: [b, c], answer: 1}]"
    assert read_task(write(tmp_path, choices)).items() == [Choice("a", ("b", "c"), 1)]
    passages = "kind: passages\nitems: [one, {text: two}]"
    assert read_task(write(tmp_path, passages)).items() == [Passage("one"), Passage("two")]


CHOICES = "kind: choices\nitems:\n"
QUESTIONS = "kind: questions\nitems: [{prompt: a}]\nvalidators: "
FAULTS = {
    "- a": "is no task: a mapping with kind and items",
    "items: [a]": "kind: is missing (there are passages, choices, questions)",
    "kind: choice": "kind: is 'choice' (did you mean 'choices'?)",
    "kind: passages": "has neither items nor items_file",
    "kind: passages\nitems: [a]\nitems_file: b": "has both",
    "kind: passages\nitems: []": "has no items",
    "kind: passages\nitems: 3": "items: must be a list, not 3",
    "kind: passages\nitems: ['']": "items[0].text: must not be empty",
    "kind: passages\nitems: [a]\nstop: [x]": ":3: stop: unknown key (there are",
    CHOICES + "  - {prompt: a, choices: [b, c]}": ":3: items[0].answer: is missing",
    CHOICES
    + "  - {prompt: a, choices: [b], answer: 0}": "choices: must have at least 2 items, not 1",
    CHOICES + "  - {prompt: a, choices: [b, c], answer: 2}": "is 2, and there are 2 choices",
    CHOICES + "  - {promt: a, choices: [b, c], answer: 1}": "did you mean 'prompt'?",
    "kind: questions\nitems: [{prompt: a}]\nvalidators: [exakt]": "validators[0]: must be",
    "kind: questions\nitems: [{prompt: a}]\ntemperature: -1": "temperature: must be at least 0",
    QUESTIONS + "[exact_match]": ":2: items[0].answer: is missing, and exact_match compares",
    QUESTIONS + "[number]": ":2: items[0].answer: holds no number",
    QUESTIONS + "[hlbd_form]": ":2: items[0].prompt: names no levels",
    "kind: passages\nitems_file: none.jsonl": "items_file: none.jsonl: No such file",
    'kind: passages\nitems_file: "a\\0b"': "it has a null byte",
    "kind: passages\nitems_file: ../out.jsonl": "items_file: ../out.jsonl: it leads out of",
    "kind: passages\nitems_file: /etc/passwd": "it is to be in the folder of the task",
    "kind: passages\nitems_file: out.jsonl": "leads out of its folder",
    "kind: passages\nitems_file: bad.jsonl": "bad.jsonl:2: is no JSON object",
    "kind: !!python/object/apply:os.system [ls]": "is not plain data",
    "a: &a [x, x]\nb: &b [*a, *a]\nkind: [": "YAML syntax",
}


def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "out.jsonl").write_text('{"text": "a"}')
    (folder / "out.jsonl").symlink_to(tmp_path / "out.jsonl")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n[1]\n')
    for text, message in FAULTS.items():
        with pytest.raises(ConfigError) as raised:
            read_task(write(folder, text))
        assert message in str(raised.value), f"{text}: {raised.value}"
        assert "mine.yaml" in str(raised.value) or "bad.jsonl:2" in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        read_task(write(folder, CHOICES + "  - {}\n  - {prompt: 1, choices: [], answer: -1}"))
    assert len(raised.value.problems) == 6
    (folder / "mine.yaml").write_bytes(b"kind: \xff")
    with pytest.raises(ConfigError, match="byte 6 is no UTF-8"):
        read_task(folder / "mine.yaml")


def test_tasks_are_found_by_name_and_what_is_wrong_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = tiny_session()
    write(tmp_path, "kind: passages\nitems: [a]")
    found = find_tasks(session, ["arithmetic", "mine.yaml", "arithmetic"], "--tasks")
    assert [*found] == ["arithmetic", "mine"]
    write(tmp_path, "kind: passages\nitems: [a]", "arithmetic.yaml")
    wrong = ["arithmetik", "mine.txt", "no.yaml", "arithmetic", "arithmetic.yaml"]
    with pytest.raises(ConfigError) as raised:
        find_tasks(session, wrong, "--tasks")
    assert [problem.message for problem in raised.value.problems] == [
        "no plugin offers task provider 'arithmetik'",
        "mine.txt is no task: a task's file ends in .yaml",
        "there is no file no.yaml",
        "two tasks would be called 'arithmetic'",
    ]
    assert "did you mean 'arithmetic'?" in str(raised.value)


class Reverse(QuestionTask):
    name = "reverse"
    fault = ""

    def items(self):
        if self.fault == "items":
            raise KeyError("nothing there")
        return [Question(word, word[::-1]) for word in ("abc", "火山", "no")]

    def score(self, item, text):
        if self.fault == "score":
            raise IndexError("out of range")
        if self.fault == "metrics":
            return {"exact": 1.0}
        return super().score(item, text)


class Plugin:
    @hookimpl
    def apt_register_providers(self):
        return [
            ProviderSpec("task", "reverse", Reverse),
            ProviderSpec("task", "nothing", lambda config: type("Nothing", (), {"items": print})()),
        ]


class Said:
    """An engine that says the same after every prompt."""

    def __init__(self, session, *, max_batch):
        pass

    def run(self, requests, *, interrupted):
        assert all(len(request.prompt) <= 3 for request in requests)
        return [
            GenerationResult(f" {request.prompt[::-1]} ", (), dropped_tokens=request.prompt == "no")
            for request in requests
        ]


def test_a_plugins_task_is_scored_and_its_failures_are_named(monkeypatch):
    monkeypatch.setattr(questions, "Engine", Said)
    session = tiny_session(Plugin())
    task = find_tasks(session, ["reverse"], "--tasks")["reverse"]
    found = score(session, items_of("reverse", task, Scoring(batch_size=1)), Scoring().asking())
    assert found.figures["exact_match"].value == 1.0 and found.found.too_long == 1
    limited = items_of("reverse", task, Scoring(limit=2))
    assert [item.prompt for item in limited.chosen] == ["abc", "火山"] and limited.total == 3
    assert limited.sha256 == items_of("reverse", task, Scoring()).sha256
    for fault, message in (
        ("items", r"task:reverse .*failed in items\(\) .*nothing there"),
        ("score", r"failed in score\(\) .*out of range"),
        ("metrics", r"failed in score\(\) .*gave exact, and declares exact_match"),
    ):
        task.fault = fault
        with pytest.raises(ProviderError, match=message):
            score(session, items_of("reverse", task, Scoring()), Scoring().asking())
    with pytest.raises(ProviderError, match="is a Nothing, not a TaskProvider"):
        find_tasks(session, ["nothing"], "--tasks")


def test_the_tasks_of_the_core_are_answered_by_their_own_answers():
    session = tiny_session()
    names = ["arithmetic", "brackets", "json"]
    for name, task in find_tasks(session, names, "--tasks").items():
        items = items_of(name, task, Scoring(seed=3))
        for item in items.chosen:
            assert set(task.score(item, item.answer).values()) == {1.0}, item
            assert set(task.score(item, "no").values()) == {0.0}
        if name != "json":  # drawn by the seed
            assert items.sha256 != items_of(name, task, Scoring(seed=4)).sha256
    task = find_tasks(session, ["completion"], "--tasks")["completion"]
    counts = [sum(item.answer == n for item in task.items()) for n in range(4)]
    assert min(counts) > 5  # no place is right more often than others by far


def test_a_generation_that_is_interrupted_ends_the_task():
    session = tiny_session()
    task = find_tasks(session, ["arithmetic"], "--tasks")["arithmetic"]
    items = items_of("arithmetic", task, Scoring(limit=3))
    assert score(session, items, Asking(interrupted=lambda: True)) is None
    whole = score(session, items, Scoring(batch_size=2).asking())
    one = score(replace(session), items, Scoring(batch_size=1).asking())
    assert whole.found.sums["number_match"].tolist() == one.found.sums["number_match"].tolist()


def test_validators_judge_texts():
    assert validators.exact_match(" The END. ", "the end", ("case", "punctuation", "spaces")) == 1
    assert validators.exact_match("So:\n 42", "42", ("last_line", "strip")) == 1
    assert validators.exact_match("42", "43") == 0
    assert validators.number_match("1,234.50 or 7", "7.0") == 1
    assert validators.is_json('{"a": 1, "b": [true]}', {"a": "number", "b": "array"}) == 1
    for text in ("{", '{"a": true}', '{"b": 1}', "[1]", '{"a": 1} x', "[" * 9999):
        assert validators.is_json(text, {"a": "number"}) == 0
    assert validators.is_json("null") == 1 and validators.is_json('{"a": 0}', {"a": "any"}) == 1
    assert validators.is_balanced("f(x)[{1: (2)}]") == 1 and validators.is_balanced("}{") == 0
    assert validators.distinct("火山火山", 1) == 0.5 and validators.distinct("", 2) == 1
    for text, answer in (
        ("2 and 2 make 4.\n#### 4\n", "4"),
        ("The answer is 12. Then more.\nAnswer: Twelve", "twelve"),
        ("first\n  Last  Line. ", "last line"),
        ("", ""),
    ):
        assert final_answer(text) == answer


def test_each_level_of_hlbd_has_its_own_form():
    samples = json.loads(SHIPPED.read_text(encoding="utf-8"))["samples"][:40]
    for sample in samples:
        texts = {n: " ".join(sample[f"level_{n}"].values()) for n in range(1, 9)}
        for level, text in texts.items():
            assert validators.has_level_form(text, level) == 1, text
            forms = [other for other in (3, 4, 5, 7, 8) if validators.has_level_form(text, other)]
            assert set(forms) <= {level, 4}, text  # English has the letters of pinyin
    assert validators.has_level_form(" ", 1) == 0
