"""Tasks in YAML files: what is asked, how it is judged, the items or the file that has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from apt_core.config.yaml_text import ParsedYaml, dotted, parse_yaml
from apt_core.data.sources.hlbd import task_of
from apt_core.errors import ConfigError, Problem, did_you_mean
from apt_core.evaluation.validators import (
    distinct,
    exact_match,
    has_level_form,
    has_number,
    is_balanced,
    is_json,
    number_match,
    repetition,
)
from apt_core.files import read_file, require_inside
from apt_core.json_files import json_rows
from apt_core.providers.task import (
    Better,
    Choice,
    ChoiceTask,
    Passage,
    PassageTask,
    Question,
    QuestionTask,
    TaskProvider,
    Template,
)
from apt_core.section_errors import in_words
from apt_core.sections import Name, Section, Text

MAX_ITEMS = 1_000_000
MAX_BYTES = 1_000_000
MAX_LINE = 1 << 20

Validator = Literal["exact_match", "number", "json", "balanced", "hlbd_form", "repetition"]

METRICS: Mapping[str, Mapping[str, Better]] = {
    "exact_match": {"exact_match": "higher"},
    "number": {"number_match": "higher"},
    "json": {"valid_json": "higher"},
    "balanced": {"balanced": "higher"},
    "hlbd_form": {"hlbd_form": "higher"},
    "repetition": {"repetition_4": "lower", "distinct_1": "higher", "distinct_2": "higher"},
}
"""The metrics of each validator, the main one first."""


class PassageItem(Section):
    """An item of a task of passages."""

    text: Annotated[str, Field(min_length=1)] = Field(description="The text that is predicted.")

    def item(self) -> Passage:
        return Passage(self.text)


class ChoiceItem(Section):
    """An item of a task of choices."""

    prompt: str = Field(description="What comes before the choices.")
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] = Field(
        description="The continuations."
    )
    answer: Annotated[int, Field(ge=0)] = Field(description="The number of the right one, from 0.")

    def item(self) -> Choice:
        return Choice(self.prompt, tuple(self.choices), self.answer)


class QuestionItem(Section):
    """An item of a task of questions."""

    prompt: str = Field(description="What the model continues.")
    answer: Text = Field(default="", description="The right continuation, where there is one.")

    def item(self) -> Question:
        return Question(self.prompt, self.answer)

    def lacking(self, validators: Iterable[Validator]) -> Iterator[tuple[str, str]]:
        """The keys in which ``validators`` find nothing to judge by, each with what is wrong."""
        for validator in validators:
            if validator == "exact_match" and "answer" not in self.model_fields_set:
                yield "answer", "is missing, and exact_match compares with it"
            elif validator == "number" and not has_number(self.answer):
                yield "answer", "holds no number, and the validator number compares with one"
            elif validator == "hlbd_form" and task_of(self.prompt) is None:
                yield "prompt", "names no levels (such as 2>5), and hlbd_form judges by them"


class TaskFile(Section):
    """A file with a task."""

    description: Text = Field(default="", description="What the task shows.")
    items: list[Any] | None = Field(default=None, description="The items.")
    items_file: Name | None = Field(
        default=None, description="A file of JSON lines in the folder of this one, an item a line."
    )
    template: Template = Field(
        default="text",
        description="How prompts are given: text (as they are), response (as a prompt with a "
        "response is trained), chat (as a user's turn, by the tokenizer's template).",
    )


class PassageFile(TaskFile):
    """A task of passages."""

    kind: Literal["passages"] = Field(description="Texts that are predicted.")


class ChoiceFile(TaskFile):
    """A task of choices."""

    kind: Literal["choices"] = Field(description="Choices by likelihood.")


class QuestionFile(TaskFile):
    """A task of questions."""

    kind: Literal["questions"] = Field(description="Prompts that are continued.")
    validators: Annotated[list[Validator], Field(min_length=1)] = Field(
        default=["exact_match"], description="What judges the continuations."
    )
    normalize: list[Literal["strip", "case", "spaces", "punctuation", "unicode", "last_line"]] = (
        Field(
            default=["strip"],
            description="Of exact_match: what is done to text and answer before they are compared.",
        )
    )
    keys: dict[str, Literal["string", "number", "boolean", "array", "object", "null", "any"]] = (
        Field(
            default_factory=dict,
            description="Of json: the keys that the object must have, with the type of the value.",
        )
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        default=32, description="The most tokens of a continuation."
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Texts before which a continuation ends."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] = Field(
        default=0.0, description="0 takes the most likely token."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="0: all tokens.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="1: all tokens.")
    num_samples: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=1, description="Continuations of each prompt, whose scores are averaged."
    )


FILES: Mapping[str, tuple[type[TaskFile], type[Section]]] = {
    "passages": (PassageFile, PassageItem),
    "choices": (ChoiceFile, ChoiceItem),
    "questions": (QuestionFile, QuestionItem),
}
"""The kinds of tasks, each with its settings and its items."""


class PassagesOfFile(PassageTask):
    """The passages of a file."""

    def __init__(self, settings: PassageFile, items: Sequence[Passage]) -> None:
        super().__init__(settings)
        self._items = items

    def items(self) -> Iterable[Passage]:
        return self._items


class ChoicesOfFile(ChoiceTask):
    """The choices of a file."""

    def __init__(self, settings: ChoiceFile, items: Sequence[Choice]) -> None:
        super().__init__(settings)
        self.template = settings.template
        self._items = items

    def items(self) -> Iterable[Choice]:
        return self._items


class QuestionsOfFile(QuestionTask):
    """The questions of a file, judged by its validators."""

    def __init__(self, settings: QuestionFile, items: Sequence[Question]) -> None:
        super().__init__(settings)
        self._settings, self._items = settings, items
        self.template, self.stop = settings.template, tuple(settings.stop)
        self.max_new_tokens, self.num_samples = settings.max_new_tokens, settings.num_samples
        self.temperature, self.top_k = settings.temperature, settings.top_k
        self.top_p = settings.top_p
        self.metrics = {
            name: better
            for validator in settings.validators
            for name, better in METRICS[validator].items()
        }

    def items(self) -> Iterable[Question]:
        return self._items

    def asked(self) -> dict[str, Any]:
        names = ("validators", "normalize", "keys")
        return {**super().asked(), **{name: getattr(self._settings, name) for name in names}}

    def score(self, item: Question, text: str) -> dict[str, float]:
        return {
            name: value
            for validator in self._settings.validators
            for name, value in self._judged(validator, item, text).items()
        }

    def _judged(self, validator: Validator, item: Question, text: str) -> dict[str, float]:
        if validator == "exact_match":
            return {"exact_match": exact_match(text, item.answer, self._settings.normalize)}
        if validator == "number":
            return {"number_match": number_match(text, item.answer)}
        if validator == "json":
            return {"valid_json": is_json(text, self._settings.keys or None)}
        if validator == "balanced":
            return {"balanced": is_balanced(item.prompt + text)}
        if validator == "hlbd_form":
            levels = task_of(item.prompt)
            return {"hlbd_form": has_level_form(text, levels[1]) if levels else 0.0}
        return {
            "repetition_4": repetition(text, 4),
            "distinct_1": distinct(text, 1),
            "distinct_2": distinct(text, 2),
        }


def read_task(path: Path) -> TaskProvider:
    """The task in the file at ``path``.

    Raises ConfigError with every problem of it: with the line, or with the line of the file of
    items, which has to be in the same folder or below.
    """
    label = str(path)
    try:
        text = read_file(path, MAX_BYTES).decode("utf-8")
    except OSError as error:
        raise ConfigError(error.strerror or str(error), where=label) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"byte {error.start} is no UTF-8", where=label) from None
    document = parse_yaml(text, label)
    return _Reading(path, label, document).task()


class _Reading:
    def __init__(self, path: Path, label: str, document: ParsedYaml) -> None:
        self._path, self._label, self._document = path, label, document
        self._problems = [*document.problems]
        self._validators: Sequence[Validator] = ()

    def task(self) -> TaskProvider:
        data = self._document.data
        if not isinstance(data, dict):
            raise ConfigError("is no task: a mapping with kind and items", where=self._label)
        kind = data.get("kind")
        if not isinstance(kind, str) or kind not in FILES:
            what = f"is {kind!r}" if "kind" in data else "is missing"
            hint = did_you_mean(str(kind), FILES) if "kind" in data else ""
            hint = hint or f"there are {', '.join(FILES)}"
            raise ConfigError([*self._problems, Problem(what, "kind", self._where("kind"), hint)])
        model, item = FILES[kind]
        settings: Any = None
        try:
            settings = model.model_validate(data)
        except ValidationError as error:
            self._problems += [
                self._problem(details, (), model) for details in error.errors(include_url=False)
            ]
        if isinstance(settings, QuestionFile):
            self._validators = settings.validators
        items = self._items(data, item)
        if self._problems:
            raise ConfigError(self._problems)
        if kind == "passages":
            return PassagesOfFile(settings, items)
        if kind == "choices":
            return ChoicesOfFile(settings, items)
        return QuestionsOfFile(settings, items)

    def _items(self, data: Mapping[str, Any], model: type[Section]) -> list[Any]:
        given, file = data.get("items"), data.get("items_file")
        if (given is None) == (file is None):
            what = "has neither items nor items_file" if given is None else "has both"
            hint = "give one of items and items_file"
            self._problems.append(Problem(what, where=self._label, hint=hint))
            return []
        found: list[Any] = []
        if file is not None:
            rows = self._rows(file) if isinstance(file, str) and file else iter(())
            for where, row in rows:
                self._add(found, model, row, ("items_file",), where)
        elif isinstance(given, list):
            for number, row in enumerate(given):
                self._add(found, model, row, ("items", number), "")
        if not found and not self._problems:
            self._problems.append(Problem("has no items", where=self._label))
        return found

    def _add(
        self, found: list[Any], model: type[Section], row: Any, at: tuple[Any, ...], where: str
    ) -> None:
        if model is PassageItem and isinstance(row, str):
            row = {"text": row}
        try:
            item: Any = model.model_validate(row)
        except ValidationError as error:
            self._problems += [
                self._problem(details, at, model, where)
                for details in error.errors(include_url=False)
            ]
            return
        made = item.item()
        if isinstance(made, Choice) and made.answer >= len(made.choices):
            message = f"is {made.answer}, and there are {len(made.choices)} choices, from 0"
            key = dotted((*at, "answer"))
            self._problems.append(Problem(message, key, where or self._where(*at, "answer")))
            return
        if isinstance(item, QuestionItem):
            for name, message in item.lacking(self._validators):
                key, place = dotted((*at, name)), where or self._where(*at, name)
                self._problems.append(Problem(message, key, place))
        found.append(made)

    def _rows(self, name: str) -> Iterator[tuple[str, Any]]:
        """The rows of the file of items, each with its place."""
        path = self._path.parent / name
        try:
            if Path(name).is_absolute():
                raise OSError(0, "it is to be in the folder of the task")
            require_inside(self._path.parent, path)
            for number, (_, row) in enumerate(json_rows(path, MAX_LINE), 1):
                if number > MAX_ITEMS:
                    raise OSError(0, f"it has more than {MAX_ITEMS:,} items")
                if row is None:
                    self._problems.append(Problem("is no JSON object", where=f"{path}:{number}"))
                    continue
                yield f"{path}:{number}", row
        except OSError as error:
            message = f"{name}: {error.strerror or error}"
            self._problems.append(Problem(message, "items_file", self._where("items_file")))

    def _problem(
        self, details: ErrorDetails, at: tuple[Any, ...], model: type[Section], where: str = ""
    ) -> Problem:
        path = (*at, *details["loc"])
        if details["type"] == "extra_forbidden":
            message = "unknown key"
            hint = did_you_mean(str(details["loc"][-1]), model.model_fields)
            hint = hint or f"there are {', '.join(model.model_fields)}"
        else:
            message, hint = in_words(details)
        return Problem(message, dotted(path), where or self._where(*path), hint)

    def _where(self, *path: Any) -> str:
        while path and path not in self._document.lines:
            path = path[:-1]
        line = self._document.lines.get(path) if path else None
        return self._label if line is None else f"{self._label}:{line}"
