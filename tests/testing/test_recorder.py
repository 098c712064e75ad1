"""``Recorder`` and the fixtures: what plugin authors assert with fails when it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apt_core.plugin_manager import PluginManager
from apt_core.testing import Recorder


@pytest.fixture
def called() -> Recorder:
    manager, recorder = PluginManager(strict=True), Recorder()
    manager.register(recorder, "recorder")
    manager.hook.on_epoch_start(epoch=1, trainer=None)
    manager.hook.on_step_end(step=1, loss=0.5, trainer=None)
    manager.hook.on_step_end(step=2, loss=0.25, trainer=None)
    manager.hook.on_epoch_end(epoch=1, trainer=None)
    return recorder


def test_calls_are_kept_with_their_arguments(called: Recorder) -> None:
    assert called.names == ["on_epoch_start", "on_step_end", "on_step_end", "on_epoch_end"]
    assert called.calls[2] == ("on_step_end", {"step": 2, "loss": 0.25, "trainer": None})
    assert called.count("on_step_end") == 2 and called.count("on_metrics") == 0


@pytest.mark.parametrize(
    "order",
    [
        [],
        ["on_epoch_end"],
        ["on_epoch_start", "on_epoch_end"],
        ["on_epoch_start", "on_step_end", "on_step_end", "on_epoch_end"],
    ],
)
def test_an_order_that_was_followed_passes(called: Recorder, order: list[str]) -> None:
    called.assert_order(*order)


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (["on_metrics"], "on_metrics was not called; calls: "),
        (["on_epoch_end", "on_epoch_start"], "on_epoch_start was not called after on_epoch_end"),
        (["on_step_end"] * 3, "on_step_end was not called after on_step_end"),
        (["on_epoch_start", "on_metrics", "on_epoch_end"], "on_metrics was not called after"),
    ],
)
def test_any_other_order_fails_and_shows_the_calls(
    called: Recorder, order: list[str], said: str
) -> None:
    with pytest.raises(AssertionError, match=said) as failure:
        called.assert_order(*order)
    assert "'on_epoch_start', 'on_step_end', 'on_step_end', 'on_epoch_end'" in str(failure.value)


def test_a_recorder_listens_to_what_it_is_told_to_at_its_priority() -> None:
    manager, recorder = PluginManager(strict=True), Recorder(["apt_metrics"], priority=7)
    manager.register(recorder, "recorder")
    assert manager.hook.apt_metrics(trainer=None) == []
    manager.hook.on_step_end(step=1, loss=0.5, trainer=None)
    assert recorder.names == ["apt_metrics"]
    assert [call.priority for call in manager.order("apt_metrics")] == [7]


def test_a_hook_that_there_is_not_is_never_listened_to_in_silence() -> None:
    with pytest.raises(ValueError, match=r"no hook 'on_step_ends' did you mean 'on_step_end'\?"):
        Recorder(["on_step_ends"])


def test_the_fixtures_are_there_for_those_who_ask_for_them(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    (tmp_path / "conftest.py").write_text(
        f'import sys\n\nsys.path.append({root!r})\npytest_plugins = ["apt_core.testing.fixtures"]\n'
    )
    (tmp_path / "test_mine.py").write_text(
        "import sys\n\nimport pytest\n\nfrom apt_core import hookimpl\n"
        "from apt_core.errors import PluginError\n\n"
        "class Bad:\n    @hookimpl\n    def on_epoch_end(self, epoch):\n        1 / 0\n\n"
        "def test_both(strict_manager, recorder):\n"
        "    strict_manager.register(Bad(), 'bad')\n"
        "    strict_manager.hook.on_epoch_start(epoch=1, trainer=None)\n"
        "    recorder.assert_order('on_epoch_start')\n"
        "    with pytest.raises(PluginError, match='bad failed in on_epoch_end'):\n"
        "        strict_manager.hook.on_epoch_end(epoch=1, trainer=None)\n"
        "    assert 'torch' not in sys.modules\n\n"
        "def test_fresh(recorder):\n    assert recorder.calls == []\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:hypothesispytest",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
