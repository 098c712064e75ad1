"""Finding, reading and inheriting profiles; what cannot be read says why and where."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, create_model

from apt_core.config import Source, list_profiles, parse_override, read_profile, validate
from apt_core.errors import ConfigError, Problem
from apt_core.types import SectionSpec


class Mine(BaseModel):
    note: str = ""
    notes: list[str] = []
    by: dict[str, str] = {}
    either: str | float = ""
    choice: Literal["on", "off"] = "off"
    where: Path | None = None
    number: float = 0
    any: Any = None


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str | bytes) -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(profile: str) -> Problem:
    with pytest.raises(ConfigError) as caught:
        read_profile(profile)
    (problem,) = caught.value.problems
    return problem


# Finding


@pytest.mark.parametrize("asked", ["mine.yaml", "mine", "./mine", "./mine.yaml"])
def test_a_path_is_found_with_or_without_suffix(asked: str) -> None:
    write("mine.yaml", "model: {d_model: 64}")
    assert read_profile(asked).data == {"model": {"d_model": 64}}


def test_the_folder_profiles_comes_before_the_installed_ones() -> None:
    write("profiles/tiny_debug.yaml", "description: mine")
    assert read_profile("tiny_debug").data == {"description": "mine"}


@pytest.mark.parametrize("asked", ["tiny_debug", "tiny_debug.yaml", "base", "gpt5_moe_reasoning"])
def test_installed_profiles_are_found_by_bare_name(asked: str) -> None:
    assert read_profile(asked).data["name"] == asked.removesuffix(".yaml")


def test_a_folder_profiles_on_the_import_path_hides_no_installed_one(
    monkeypatch: pytest.MonkeyPatch, in_empty_folder: Path
) -> None:
    """As ``python -m`` puts the working directory there."""
    write("profiles/__init__.py", "")
    monkeypatch.syspath_prepend(str(in_empty_folder))
    monkeypatch.delitem(sys.modules, "profiles", raising=False)
    assert read_profile("tiny_debug").data["name"] == "tiny_debug"


def test_profiles_are_listed() -> None:
    write("profiles/mine.yaml", "{}")
    assert {"base", "gpt5_moe_reasoning", "mine", "tiny_debug"} <= set(list_profiles())


def test_a_missing_profile_says_where_it_looked_and_what_is_close() -> None:
    problem = refusal("tiny_debgu")
    assert "profiles/tiny_debgu.yaml" in problem.message
    assert problem.hint == "did you mean 'tiny_debug'?"


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ("own.yml", "own.yaml"),
        ("own.yaml", "own.yml"),
        ("a/own.yml", "a/own.yaml"),
        ("./owm", "own.yml"),
    ],
)
def test_a_profile_beside_is_suggested(asked: str, there: str) -> None:
    write(there, "name: x\n")
    assert refusal(asked).hint == f"did you mean {there!r}?"


def test_a_folder_of_the_same_name_does_not_hide_a_profile() -> None:
    Path("tiny_debug").mkdir()
    assert read_profile("tiny_debug").name == "tiny_debug"


# Files that are no profiles


@pytest.mark.parametrize(
    ("text", "words", "place"),
    [
        ("", "empty", "x.yaml"),
        ("# only a comment\n", "empty", "x.yaml"),
        ("- a\n- b\n", "not a list", "x.yaml"),
        ("just words", "not a single value", "x.yaml"),
        ("model:\n  d_model: 64\n d_ff: 3\n", "indentation", "x.yaml:3:2"),
        ("model:\n\td_model: 64\n", "tab", "x.yaml:2:1"),
        ("model: {d_model: 64\n", "'{'", "x.yaml:2:1"),
        ("plugins: [a, b\nmodel: 3\n", "'['", "x.yaml:2:6"),
        ("name: 'open\n", "quote", "x.yaml:2:1"),
        ("a: b: c\n", "':'", "x.yaml:1:5"),
        ("a: *nothing\n", "undefined alias", "x.yaml:1:4"),
        ("a: 1\n---\nb: 2\n", "more than one document", "x.yaml:2:1"),
        ("a: !!python/object/apply:os.system [ls]\n", "not plain data", "x.yaml:1:4"),
        ("a: !!python/name:os.system\n", "not plain data", "x.yaml:1:4"),
        ("a: !!int word\n", "not plain data", "x.yaml:1:4"),
        ("a: &x [*x]\n", "inside of the value that it names", "x.yaml:1:4"),
        ("a: \"\\UFFFFFFFF\"\n", "invalid escape", "x.yaml:1"),
        ("a: \"\\ud800\"\n", "surrogate", "x.yaml:1:4"),
        ("a: \x00\n", "cannot stand in YAML", "x.yaml:1:4"),
        ("a: " + "[" * 5000, "nested more than", "x.yaml:1"),
        ("a: " + "9" * 5000, "a number of 5000 digits", "x.yaml:1:4"),
        (b"name: \xff\xfe\n", "not UTF-8", "x.yaml:1"),
        ("a: 1\n" * 300_000, "larger than 1 MB", "x.yaml"),
    ],
)  # fmt: skip
def test_unreadable_text_says_what_and_where(text: str | bytes, words: str, place: str) -> None:
    problem = refusal(write("x.yaml", text))
    assert words in problem.message
    assert problem.where.startswith(place)


def test_exploding_aliases_are_refused() -> None:
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert "aliases expand" in refusal(write("x.yaml", f"a0: &a0 [x]\n{levels}")).message


def test_a_directory_is_refused() -> None:
    Path("folder").mkdir()
    assert "directory" in refusal("folder").message


def test_a_link_in_a_circle_is_refused() -> None:
    os.symlink("loop.yaml", "loop.yaml")
    assert "cannot be read" in refusal("loop.yaml").message


def test_a_file_without_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write("x.yaml", "{}")

    def refuse(path: Path, flags: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    problem = refusal("x.yaml")
    assert problem == Problem("cannot be read: permission denied", where="x.yaml")


@pytest.mark.parametrize("asked", ["", "a\0b", "x" * 5000, "~nobody_there/x", ".", "/", "..."])
def test_names_that_cannot_be_files_are_refused(asked: str) -> None:
    refusal(asked)


def test_a_key_given_twice_names_both_lines_and_is_not_the_only_problem() -> None:
    source = read_profile(write("x.yaml", "model:\n  d_model: 64\n  d_modle: 1\n  d_model: 32\n"))
    problems = validate(source).problems
    assert [(p.key, p.where) for p in problems] == [
        ("model.d_model", "x.yaml:4"),
        ("model.d_modle", "x.yaml:3"),
    ]
    assert "line 2" in problems[0].message and "line 4" in problems[0].message


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0x10", 16),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.0.0", "1.0.0"),
        ("yes", True),
        ("~", None),
        ("e5", "e5"),
        ("'3e-5'", "3e-5"),
    ],
)
def test_scalars_mean_what_people_expect(text: str, value: object) -> None:
    read = read_profile(write("x.yaml", f"a: {text}\n")).data["a"]
    assert read == value and type(read) is type(value)


def test_merge_keys_work_and_own_keys_win() -> None:
    source = read_profile(write("x.yaml", "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n"))
    assert source.data["b"] == {"x": 1, "y": 3}


# Text


SPELLINGS = ("1.10", "77950e8", "007", "0x10", "1_000", "1e3", ".5", "on", "Yes", "off", "true",
             "NULL!", "2024-01-01", "1:30", "über", "日本")  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_text_is_what_was_written(spelling: str) -> None:
    write("parent.yaml", f"plugins: [a, {spelling}, {{name: {spelling}, priority: 010}}]\n")
    path = write(
        "x.yaml",
        f"extends: parent\nversion: {spelling}\nname: {spelling}\n"
        f"data: {{train_path: {spelling}, max_length: 010}}\n"
        f"model: {{attention_pattern: [{spelling}], norm_name: {spelling}}}\n"
        f"mine: {{note: {spelling}, notes: [{spelling}], by: {{x: {spelling}}}, part: {spelling}}}",
    )
    arguments = [f"evaluation.sample_prompt={spelling}", f"monitoring.wandb.tags=[{spelling}]"]
    source = read_profile(path, [parse_override(argument) for argument in arguments])
    # What a run needs before it knows its plugins.
    assert source.get("plugins[1]") == source.get("plugins[2].name") == spelling
    assert source.get("model.norm_name") == spelling
    checked = validate(source, [SectionSpec("mine", Mine), SectionSpec("mine.part", Mine)])
    # A section is never text.
    assert [problem.key for problem in checked.problems] == ["mine.part"]
    del source.data["mine"]["part"]
    config = validate(source, [SectionSpec("mine", Mine)]).require()
    assert (config.name, config.version) == (spelling, spelling)
    assert (config.data.train_path, config.data.max_length) == (spelling, 10)
    assert config.model.attention_pattern == (spelling,)
    assert [plugin.name for plugin in config.plugins] == ["a", spelling, spelling]
    assert config.plugins[2].priority == 10
    assert (config.evaluation.sample_prompt, config.monitoring.wandb.tags) == (
        spelling,
        (spelling,),
    )
    mine = config.section("mine")
    assert mine == Mine(note=spelling, notes=[spelling], by={"x": spelling})
    write("again.yaml", config.to_yaml())
    assert validate(read_profile("again.yaml"), [SectionSpec("mine", Mine)]).require() == config


def test_what_may_be_more_than_text_is_read_as_yaml() -> None:
    path = write("x.yaml", "mine: {either: 1.10, choice: on, where: 1.10, number: 1.10, any: 1.10}")
    mine = validate(read_profile(path), [SectionSpec("mine", Mine)]).require().section("mine")
    assert mine == Mine(either=1.1, choice="on", where=Path("1.10"), number=1.1, any=1.1)


def test_merged_text_gives_way_to_what_the_mapping_says_itself() -> None:
    text = "data: &d {train_path: 1.10, val_path: 1.20}\nmine:\n  <<: *d\n  train_path: 'x'\n"
    models = {name: (str, ...) for name in ("train_path", "val_path")}
    spec = SectionSpec("mine", create_model("Paths", **models))  # type: ignore[call-overload]
    section = validate(read_profile(write("x.yaml", text)), [spec]).require().section("mine")
    assert section is not None
    assert section.model_dump() == {"train_path": "x", "val_path": "1.20"}


@pytest.mark.parametrize(
    "text",
    ["def ", " x", "a: b", "a: ", "# not a comment", "'quoted'", '"', "[1", "{c: 1, c: 2}", "@x",
     "&x", "*x", "~", "", "one\ntwo\n", "\ttab", "x=y", "!!int 3", "- a"],
)  # fmt: skip
def test_text_from_the_command_line_is_the_argument_as_it_is(text: str) -> None:
    keys = ["evaluation.sample_prompt", "mine.note", "mine.by.x"]
    overrides = [parse_override(f"{key}={text}", where="--set") for key in keys]
    source = Source.from_dict({}).with_overrides(overrides)
    config = validate(source, [SectionSpec("mine", Mine)]).require()
    assert config.evaluation.sample_prompt == text
    assert config.section("mine") == Mine(note=text, by={"x": text})


def test_null_from_the_command_line_takes_text_back() -> None:
    source = Source.from_dict({"data": {"train_path": "x"}, "name": "y"}, name="z")
    overrides = [parse_override(f"{key}=null") for key in ("data.train_path", "name")]
    config = validate(source.with_overrides(overrides)).require()
    assert (config.data.train_path, config.name) == (None, "z")


# extends


def test_mappings_merge_lists_replace_null_deletes() -> None:
    write("parent.yaml", "plugins: [a, b]\nmodel: {d_model: 64, d_ff: 256}\ntraining: {seed: 1}\n")
    child = write("child.yaml", "extends: parent\nplugins: [c]\nmodel: {d_ff: 9, tva: {r: 2}}\n"
                  "training: {seed: null}\n")  # fmt: skip
    assert read_profile(child).data == {
        "plugins": ["c"],
        "model": {"d_model": 64, "d_ff": 9, "tva": {"r": 2}},
        "training": {},
    }


@pytest.mark.parametrize(
    ("key", "inherited"),
    [
        ("model", "d_model, tva"),
        ("model.tva", "r"),
        ("schedules", "route_temp"),
        ("plugins", "a, b"),
        ("mine.deep", "x"),
    ],
)
@pytest.mark.parametrize("written", ["", "  # all is commented out", "null", "~", "{}"])
def test_an_emptied_section_is_told(key: str, inherited: str, written: str) -> None:
    write(
        "parent.yaml",
        "plugins: [a, {name: b}]\nmodel: {d_model: 64, tva: {r: 1}}\n"
        "schedules: {route_temp: 2.0}\nmine: {deep: {x: 1}}\n",
    )
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(key.split("."))]
    child = write("child.yaml", "\n".join(["extends: parent", *lines]) + f" {written}\n")
    parent, source = read_profile("parent.yaml"), read_profile(child)
    where = f"child.yaml:{len(lines) + 1}"
    if key == "plugins" and written == "{}":
        assert source.data["plugins"] == {}
    elif written in ("null", "~"):
        assert not source.has(key)
        notice = f"{where}: {key}: null takes back what was set: {inherited}"
        assert (source.notices, source.problems, source.inactive) == ((notice,), (), ())
    elif written == "{}":
        (inactive,) = source.inactive
        assert (source.data, inactive.key) == (parent.data, key)
        assert f"changes nothing of what it inherits: {inherited}; " in inactive.reason
    else:
        (problem,) = source.problems
        assert (problem.key, problem.where, source.data) == (key, where, parent.data)
        assert problem.message == f"nothing stands under it, and it inherits {inherited}"


def test_an_emptied_section_of_the_command_line_is_told() -> None:
    write("x.yaml", "model: {tva: {r: 1}}\ntraining: {seed: 1}\n")
    texts = ["training={}", "model.tva=null", "training.seed=null"]
    source = read_profile("x.yaml", [parse_override(text, where="--set") for text in texts])
    assert source.notices == ("--set model.tva: model.tva: null takes back what was set: r",)
    assert [(key.key, key.reason.partition(":")[0]) for key in source.inactive] == [
        ("training", "an empty section changes nothing of what it inherits")
    ]


def test_lists_replace_and_a_value_is_taken_back_without_a_word() -> None:
    write("parent.yaml", "plugins: [a]\ntraining: {seed: 1}\nmodel: {ngram: {}}\n")
    text = "extends: parent\nplugins: []\ntraining: {seed: }\nmodel: {ngram: null}\n"
    source = read_profile(write("child.yaml", text))
    assert source.data == {"plugins": [], "training": {}, "model": {}}
    assert (source.notices, source.problems, source.inactive) == ((), (), ())


def test_options_that_are_lost_with_a_replaced_list_are_told() -> None:
    write("parent.yaml", "plugins: [a, {name: x/My-Log.py, on_failure: required, priority: 3}]\n")
    child = write("child.yaml", "extends: parent\nplugins: [{name: my_log, priority: 4}, a]\n")
    assert read_profile(child).notices == (
        "child.yaml:2: plugins: the inherited list, which this one replaces, says "
        "on_failure: required of my_log",
    )


def test_a_child_does_not_inherit_what_the_parent_says_about_itself() -> None:
    source = read_profile(write("child.yaml", "extends: base\n"))
    config = validate(source).require()
    assert (config.name, config.version) == ("child", "")
    assert config.training.batch_size == 16


def test_places_are_those_of_the_file_that_says_it() -> None:
    write("up/parent.yaml", "model:\n  d_model: 64\n  d_ff: 256\nplugins: [a]\n")
    child = write("child.yaml", "extends: up/parent.yaml\nmodel:\n  d_ff: 9\n")
    override = parse_override("training.max_epochs=5", where="--training.max_epochs")
    source = read_profile(child, [override])
    assert source.where("model.d_model") == "up/parent.yaml:2"
    assert source.where("model.d_ff") == "child.yaml:3"
    assert source.where("plugins[0]") == "up/parent.yaml:4"
    assert source.where("training.max_epochs") == "--training.max_epochs"
    assert source.where("model.never_written") == "child.yaml:2"
    assert source.where("debug") == "child.yaml"
    assert source.folder_of(("plugins",)) == Path("up")


def test_a_local_base_may_extend_the_installed_base() -> None:
    write("profiles/base.yaml", "extends: base\nmodel: {d_ff: 99}\n")
    model = read_profile("base").data["model"]
    assert (model["d_ff"], model["d_model"]) == (99, 128)


def test_paths_in_extends_are_relative_to_the_file() -> None:
    write("a/child.yaml", "extends: ../b/parent.yaml\n")
    write("b/parent.yaml", "extends: grandparent\n")
    write("b/grandparent.yaml", "model: {d_ff: 7}\n")
    assert read_profile("a/child.yaml").data == {"model": {"d_ff": 7}}


@pytest.mark.parametrize("itself", ["./a.yaml", "b"])
def test_circles_are_refused(itself: str) -> None:
    write("a.yaml", f"extends: {itself}\n")
    write("b.yaml", "extends: a\n")
    assert "circle" in refusal("a.yaml").message


def test_a_missing_parent_is_named_where_it_is_asked_for() -> None:
    problem = refusal(write("x.yaml", "name: x\nextends: tiny_debgu\n"))
    assert (problem.key, problem.where) == ("extends", "x.yaml:2")
    assert problem.hint == "did you mean 'tiny_debug'?"


@pytest.mark.parametrize("value", ["[base]", "3", "{a: b}", "''"])
def test_extends_names_one_profile(value: str) -> None:
    assert refusal(write("x.yaml", f"extends: {value}\n")).key == "extends"


# Overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=5", 5), ("a.b=3e-5", 3e-5), ("a.b=[x, y]", ["x", "y"]), ("a.b=null", None),
     ("a.b=true", True), ("a.b='5'", "5"), ("a.b=x=y", "x=y"), ("a.b={c: 1}", {"c": 1})],
)  # fmt: skip
def test_override_values_follow_the_rules_of_profiles(text: str, value: object) -> None:
    override = parse_override(text)
    assert (override.path, override.value, override.where) == (("a", "b"), value, "--a.b")


def test_an_override_is_shown_as_it_was_written() -> None:
    assert parse_override("a.b=1", where="--set").where == "--set a.b"
    assert parse_override("a.b=1", where="--a.b").where == "--a.b"


@pytest.mark.parametrize("text", ["a.b", "=5", "a..b=5", ".a=5", "a.=5", "a. b=5"])
def test_overrides_of_what_is_no_key_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_override(text, where="--set")


@pytest.mark.parametrize(
    ("value", "words"),
    [("", "no value"), ("[1", "'['"), ("@x", "cannot start"), ("!!python/name:os", "plain data"),
     ("{c: 1, c: 2}", "given twice")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["data.max_length", "model.tva", "training"])
def test_overrides_that_are_no_yaml_are_refused_where_the_key_is_no_text(
    key: str, value: str, words: str
) -> None:
    override = parse_override(f"{key}={value}", where="--set")
    (problem,) = validate(Source.from_dict({}).with_overrides([override])).problems
    assert words in problem.message
    assert (problem.key, problem.where) == (key, f"--set {key}")


def test_overrides_merge_create_and_take_back() -> None:
    write("x.yaml", "model: {d_model: 64, tva: {r: 2, s: 1}}\n")
    texts = ["model.tva={s: 0}", "training.seed=7", "model.d_model=null", "training.seed=8"]
    source = read_profile("x.yaml", [parse_override(text) for text in texts])
    assert source.data == {"model": {"tva": {"r": 2, "s": 0}}, "training": {"seed": 8}}


def test_an_override_below_a_value_is_a_problem_not_a_crash() -> None:
    write("x.yaml", "schedules: {route_temp: 1.0}\n")
    source = read_profile("x.yaml", [parse_override("schedules.route_temp.end=2")])
    (problem,) = source.problems
    assert "route_temp is a single value" in problem.message
    assert problem.where == "--schedules.route_temp.end"


# Plain mappings


def test_plain_data_is_copied() -> None:
    profile = {"model": {"d_model": 64}, "plugins": ("a",), "data": {"train_path": Path("x.txt")}}
    source = Source.from_dict(profile)
    source.data["model"]["d_model"] = 1
    assert profile["model"] == {"d_model": 64}
    assert source.data["plugins"] == ["a"] and source.data["data"]["train_path"] == "x.txt"


def test_plain_data_that_contains_itself_is_refused() -> None:
    profile: dict[str, object] = {}
    profile["model"] = profile
    with pytest.raises(ConfigError):
        Source.from_dict(profile)
    with pytest.raises(ConfigError):
        Source.from_dict([])  # type: ignore[arg-type]


def test_keys_that_are_no_text_are_problems() -> None:
    assert [p.key for p in Source.from_dict({"model": {3: 1}}).problems] == ["model"]


def test_what_a_run_has_written_was_accepted_when_it_began() -> None:
    """A run that the command line has shortened goes on from its own profile."""
    short = "training: {warmup_steps: 10, max_steps: 5}\n"
    Path("profile.yaml").write_text(short, encoding="utf-8")
    (problem,) = validate(read_profile("profile.yaml")).problems
    assert problem.key == "training.warmup_steps"
    Path("manifest.json").write_text("{}", encoding="utf-8")
    assert validate(read_profile("profile.yaml")).problems == []
    Path("mine.yaml").write_text(short, encoding="utf-8")
    assert len(validate(read_profile("mine.yaml")).problems) == 1
