"""Where the paths of a profile lead: beside the file that says them, else in the working directory;
and what a run's own profile says is the same wherever it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from apt_core.cli.run_command import run_command
from apt_core.cli.train import app
from apt_core.config import Config, parse_config, parse_override, read_profile, validate
from apt_core.errors import ConfigError
from apt_core.kernel import boot
from apt_core.profile_paths import FOUND_BESIDE, READ, WRITTEN
from apt_core.providers.dataset import MixtureItem

OBSERVER = "from apt_core import hookimpl\n\n@hookimpl\ndef on_step_end(): pass\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Write a file below the temporary folder; the working directory is ``here`` in it, the home
    ``home``."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def write(name: str, text: str = "some text") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def data_of(profile: Path | str, *overrides: str) -> tuple[str | None, str | None]:
    source = read_profile(profile, [parse_override(text) for text in overrides])
    data = validate(source).require().data
    return data.train_path, data.val_path


def test_a_path_is_beside_the_file_that_says_it_else_in_the_working_directory(write) -> None:
    beside, below = write("up/a.txt"), write("here/b.txt")
    write("up/parent.yaml", "data: {train_path: a.txt, val_path: b.txt}\n")
    child = write("child/child.yaml", "extends: ../up/parent.yaml\n")
    assert data_of(child) == (str(beside), str(below))
    # The one beside the profile comes first, and the child's own beside the child.
    write("here/a.txt"), write("up/c.txt")
    own = write("child/c.txt")
    child.write_text("extends: ../up/parent.yaml\ndata: {val_path: c.txt}\n", encoding="utf-8")
    assert data_of(child) == (str(beside), str(own))
    # The command line speaks of the working directory.
    here = write("here/a.txt")
    for override in ("data.train_path=a.txt", "data={train_path: a.txt}"):
        assert data_of(child, override)[0] == str(here)
    assert data_of(child, "data.train_path=up/nowhere.txt")[0] == "up/nowhere.txt"
    assert parse_config({"data": {"train_path": "a.txt"}}).data.train_path == str(here)


def test_lists_patterns_and_urls_lead_where_single_paths_do(write) -> None:
    beside, here = write("up/texts/a.txt"), write("here/b.txt")
    profile = write(
        "up/p.yaml",
        "data:\n  mixture:\n"
        "  - {name: a, train_path: ['texts/*.txt', b.txt, 'b*.txt', 's3://x/*.txt', 'no*.txt']}\n"
        "  - {name: b, train_path: texts, val_path: texts/a.txt}\n"
        "  tokenizer: {path: texts/a.txt}\n",
    )
    data = validate(read_profile(profile)).require().data
    up = beside.parent.parent
    assert data.mixture[0].train_path == [
        str(up / "texts/*.txt"),
        str(here),
        str(here.parent / "b*.txt"),
        "s3://x/*.txt",
        "no*.txt",
    ]
    assert (data.mixture[1].train_path, data.mixture[1].val_path) == (
        str(up / "texts"),
        str(beside),
    )
    assert data.tokenizer.path == str(beside)


def test_a_link_is_known_by_its_own_name(write) -> None:
    target, link = write("blobs/0123"), Path("text.jsonl")
    link.symlink_to(target)
    profile = write("here/p.yaml", "data: {train_path: text.jsonl}\n")
    assert data_of(profile)[0] == str(link.absolute())


def test_what_is_no_file_stays_as_it_is_written(write) -> None:
    for text in ("SELECT line FROM texts", "org/name", "x" * 400):
        assert parse_config({"data": {"train_path": text}}).data.train_path == text


def test_a_home_directory_is_one_in_every_key(write, tmp_path) -> None:
    home = tmp_path / "home"
    write("home/base.yaml", "model: {d_model: 32}\n")
    write("home/mine.py", OBSERVER)
    text = write("home/text.txt")
    profile = write(
        "home/p.yaml",
        "extends: ~/base.yaml\nplugins: [~/mine.py]\n"
        "data: {train_path: ~/text.txt, val_path: ~/text.txt}\n"
        "training: {checkpoint_dir: ~/kept}\n"
        "monitoring: {tensorboard: {log_dir: ~/logs}}\n",
    )
    for kernel in (boot("~/p.yaml"), boot(str(profile), plugins=["~/mine.py"])):
        config = kernel.config
        assert config.model.d_model == 32
        assert [plugin.name for plugin in config.plugins] == [str(home / "mine.py")]
        assert {config.data.train_path, config.data.val_path} == {str(text)}
        assert config.training.checkpoint_dir == str(home / "kept")
        assert config.monitoring.tensorboard.log_dir == str(home / "logs")


def test_a_plugin_is_beside_the_profile_that_lists_it(write, tmp_path) -> None:
    inherited, here = write("up/mine.py", OBSERVER), write("here/mine.py", OBSERVER)
    write("up/parent.yaml", "plugins: [mine.py]\n")
    child = write("child/child.yaml", "extends: ../up/parent.yaml\n")
    assert [p.name for p in boot(child).config.plugins] == [str(inherited)]
    override = parse_override("plugins=[mine.py]")
    assert [p.name for p in boot(child, overrides=[override]).config.plugins] == [str(here)]
    # A link keeps the name by which the plugin is known.
    Path("linked.py").symlink_to(here)
    (plugin,) = boot({}, plugins=["linked.py"]).config.plugins
    assert Path(plugin.name).name == "linked.py"


def test_a_resolved_profile_means_the_same_from_elsewhere(write, tmp_path, monkeypatch) -> None:
    write("up/text.txt"), write("up/mine.py", OBSERVER)
    profile = write(
        "up/p.yaml",
        "plugins: [mine.py]\ndata: {train_path: text.txt}\ntraining: {checkpoint_dir: kept}\n",
    )
    config = boot(profile).config
    assert config.training.checkpoint_dir == str(tmp_path / "here" / "kept")
    again = write("other/place/profile.yaml", config.to_yaml())
    monkeypatch.chdir(again.parent)
    assert boot("profile.yaml").config == config


def test_the_plan_says_where_paths_lead(write, tmp_path, capsys) -> None:
    pytest.importorskip("torch")
    text = write("up/text.txt", "a text\n" * 400)
    plugin = write("up/mine.py", OBSERVER)
    write(
        "up/p.yaml",
        "plugins: [mine.py]\ndata: {train_path: text.txt, max_length: 16}\n"
        "model: {d_model: 16, num_heads: 2, num_layers: 1, d_ff: 16, max_seq_len: 16}\n"
        "training: {batch_size: 2, checkpoint_dir: kept}\nhardware: {device: cpu}\n",
    )
    assert run_command(app, "apt-train", ["-p", "../up/p.yaml", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["paths"] == [
        {"key": "plugins", "path": str(plugin)},
        {"key": "data.train_path", "path": str(text)},
        {"key": "training.checkpoint_dir", "path": str(tmp_path / "here" / "kept")},
    ]
    assert run_command(app, "apt-train", ["-p", "../up/p.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"data.train_path: {text}" in shown and "training.checkpoint_dir: kept" in shown


ENDS = ("_path", "_dir", "_file", "_folder", "_chat_template")


def test_every_path_of_the_schema_is_resolved() -> None:
    def keys(model, at=()):
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from keys(field.annotation, (*at, name))
            elif name == "mixture":
                yield from keys(MixtureItem, (*at, name))
            else:
                yield (*at, name)

    named = {key for key in keys(Config) if f"_{key[-1]}".endswith(ENDS)}
    assert named == {*READ, *WRITTEN}
    assert set(FOUND_BESIDE) - {("plugins",), ("evaluation", "tasks")} == set(READ)


def test_files_of_tasks_are_looked_for_beside_the_profile(write, tmp_path) -> None:
    task = write("up/mine.yaml", "kind: passages\nitems: [a]")
    write("here/arithmetic", "no task: a name is no file")
    profile = write("up/p.yaml", "evaluation: {tasks: [mine.yaml, arithmetic]}")
    assert boot(str(profile)).config.evaluation.tasks == (str(task), "arithmetic")
    profile.write_text("evaluation: {tasks: [gone.yaml, arithmetik]}")
    with pytest.raises(ConfigError) as caught:
        boot(str(profile))
    second, first = caught.value.problems
    assert "there is no file 'gone.yaml'" in str(first) and "p.yaml:1" in str(first)
    assert "did you mean 'arithmetic'?" in str(second)


def test_a_missing_file_says_where_it_was_looked_for(write) -> None:
    with pytest.raises(ConfigError, match=r"'gone.txt' \(.*beside the profile that says it, then"):
        boot({"data": {"train_path": "gone.txt"}})


def test_sources_of_a_mixture_are_checked_as_one_alone_is(write) -> None:
    def told(*items):
        with pytest.raises(ConfigError) as caught:
            boot({"data": {"mixture": items}})
        return [f"{problem.key}: {problem.message}" for problem in caught.value.problems]

    good = {"name": "a", "source": "pydoc"}
    assert told(good, {"name": "b", "loader": "jsnl"}) == [
        "data.mixture[1].loader: no plugin offers dataset provider 'jsnl'"
    ]
    assert told({"name": "b", "loader": "csv", "train_path": "x.csv"}, good) == [
        "data.mixture[0].train_path: there is no file 'x.csv'"
    ]
    kernel = boot(
        {"data": {"mixture": [good, {"name": "b", "loader": "pydoc", "train_path": "x"}]}}
    )
    assert [item.key for item in kernel.inactive] == ["data.mixture[1].train_path"]
