"""Finding, reading and inheriting profiles; what cannot be read says why and where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apt_core.config import Source, list_profiles, parse_override, read_profile, validate
from apt_core.errors import ConfigError, Problem


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


def test_profiles_are_listed() -> None:
    write("profiles/mine.yaml", "{}")
    assert {"base", "gpt5_moe_reasoning", "mine", "tiny_debug"} <= set(list_profiles())


def test_a_missing_profile_says_where_it_looked_and_what_is_close() -> None:
    problem = refusal("tiny_debgu")
    assert "profiles/tiny_debgu.yaml" in problem.message
    assert problem.hint == "did you mean 'tiny_debug'?"


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
        ("a: &x [*x]\n", "inside of what it names", "x.yaml:1:4"),
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

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
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
    assert source.folder == Path()


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


@pytest.mark.parametrize(
    "text",
    [
        *("a.b", "=5", "a..b=5", ".a=5", "a.=5", "a. b=5", "a.b=", "a.b=[1", "a.b=@x"),
        *("a.b={c: 1, c: 2}", "a.b=!!python/name:os"),
    ],
)
def test_bad_overrides_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_override(text, where="--set")


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
