"""Commands in this process, from an empty folder, with no installed plugin in sight."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from apt_core.cli.run_command import run_command

if TYPE_CHECKING:
    from tests.cli.terminal import Terminal


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)


Command = Callable[..., Outcome]

PLUGIN = """\
from pydantic import BaseModel, Field

from apt_core import PluginInfo, Priority, ProviderSpec, SectionSpec, hookimpl

PLUGIN = PluginInfo(summary="everything that a plugin can declare", version="3.1")


class Settings(BaseModel):
    strength: float = Field(default=0.5, description="How strong.")


@hookimpl
def apt_register_config():
    return [SectionSpec("sample", Settings, schedule_params=("sample_weight",))]


@hookimpl
def apt_register_providers():
    return [
        ProviderSpec(
            "norm",
            "sample_norm",
            "apt_core.modeling.layers.norm:RMSNormProvider",
            version="3.1",
            summary="a norm",
            requires=("no-such-package>=2",),
            conflicts=("ffn:default",),
            config=Settings,
            section="sample",
        )
    ]


@hookimpl(priority=Priority.LATE)
def on_step_end(step):
    pass


@hookimpl(wrapper=True)
def on_epoch_start(epoch):
    return (yield)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APT_DISABLE_PLUGIN_AUTOLOAD", "1")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``command(app, "list", "--json")``: what it printed, and its exit code."""

    def call(app: typer.Typer, *arguments: str, prog: str = "apt-hooks") -> Outcome:
        capsys.readouterr()
        code = run_command(app, prog, arguments)
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def plugin(folder: Path) -> str:
    """The path of a plugin that declares a bit of everything."""
    (folder / "sample.py").write_text(PLUGIN)
    return "sample.py"


@pytest.fixture
def terminal(folder: Path, forked: None) -> Iterator[Callable[..., Terminal]]:
    """``terminal("chat", RUN)``: the command in a terminal of its own, in the test's folder."""
    from tests.cli.terminal import Terminal

    opened: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments, folder=folder))
        return opened[-1]

    yield start
    for each in opened:
        each.close()
