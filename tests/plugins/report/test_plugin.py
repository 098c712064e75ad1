from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import apt_plugins.report.page
from apt_core import hookimpl
from apt_core.cli.run_command import run_command
from apt_core.testing import tiny_run
from apt_plugins.report import plugin
from apt_plugins.report.command import app
from apt_plugins.report.page import build_report

REPORT = "apt_plugins.report.plugin"
ROOT = Path(__file__).parents[3]


class Run:
    """What the plugin uses of a trainer."""

    def __init__(self, output_dir, rank=0):
        self.output_dir, self.rank = output_dir, rank


def test_a_run_with_the_plugin_leaves_its_page(tmp_path):
    run = tiny_run(REPORT, steps=8, output=tmp_path / "run")
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Loss in nats per token" in html and "Learning rate" in html
    assert f"{run.metrics[-1]['val_loss']:.4f}" in html
    assert ">finished<" in html
    assert run.manager.records["report"].failures == []


def test_the_weights_are_those_of_a_run_without_it(tmp_path):
    assert tiny_run(REPORT, steps=6).same_weights(tiny_run(steps=6))


def test_a_run_that_dies_leaves_its_page(tmp_path):
    class Dies:
        @hookimpl
        def on_step_end(self, step):
            if step == 5:
                raise RuntimeError("broken on purpose")

    with pytest.raises(Exception, match="broken on purpose"):
        tiny_run(REPORT, Dies(), output=tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, monkeypatch):
    def fails(folder, output=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(apt_plugins.report.page, "write_report", fails)
    run = tiny_run(REPORT, steps=4, strict=False, output=tmp_path / "run")
    assert run.result.status == "finished"
    assert run.manifest["status"] == "finished"
    (failure,) = run.manifest["plugins"][0]["failures"]
    assert (failure["hook"], "No space left" in failure["error"]) == ("on_training_end", True)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_process_writes(make_run, rank):
    folder = make_run()
    plugin.Plugin().on_training_end(trainer=Run(folder, rank))
    assert (folder / "report.html").exists() == (rank == 0)


def test_pages_in_mid_run_cost_at_most_a_hundredth_of_the_time():
    budget = plugin.Budget(now=100.0)
    assert not budget.allows(now=129.0)
    assert budget.allows(now=131.0)
    budget.spent(131.0, 133.0)
    assert not budget.allows(now=332.0)
    assert budget.allows(now=334.0)


def test_an_epochs_end_writes_when_the_budget_allows_it(make_run, monkeypatch):
    folder = make_run()
    report = plugin.Plugin()
    monkeypatch.setattr(report, "_budget", plugin.Budget(now=float("inf")))
    report.on_epoch_end(trainer=Run(folder))
    assert not (folder / "report.html").exists()
    monkeypatch.setattr(report, "_budget", plugin.Budget(now=float("-inf")))
    report.on_epoch_end(trainer=Run(folder))
    assert (folder / "report.html").exists()


def test_the_command_writes_the_page_and_names_it(make_run, capsys):
    folder = make_run()
    assert run_command(app, "apt-report", [str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8") == build_report(folder)


def test_the_command_writes_elsewhere_when_told(make_run, tmp_path, capsys):
    assert run_command(app, "apt-report", [str(make_run()), "--output", str(tmp_path / "p")]) == 0
    assert "</html>" in (tmp_path / "p").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "there is no run in this folder"),
        (["run", "--output", "no/such/folder/page.html"], "the page cannot be written"),
        (["run", "--output", "."], "is a folder (name the page: --output report.html)"),
    ],
)
def test_bad_input_of_the_command_ends_with_2_and_a_remedy(
    make_run, tmp_path, monkeypatch, capsys, arguments, says
):
    make_run()
    monkeypatch.chdir(tmp_path)
    assert run_command(app, "apt-report", arguments) == 2
    assert says in capsys.readouterr().err


def test_without_jinja_the_command_says_what_to_install(make_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "apt_plugins.report.page", raising=False)
    assert run_command(app, "apt-report", [str(make_run())]) == 2
    said = 'error: jinja2 is not installed (pip install "apt-kernel[report]")\n'
    assert capsys.readouterr().err == said


def test_plugin_and_command_need_neither_torch_nor_jinja_before_they_write():
    code = (
        "import sys, apt_plugins.report.plugin, apt_plugins.report.command; "
        "sys.exit(bool({'torch', 'numpy', 'jinja2', 'yaml'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_the_command_writes_a_page_without_torch(make_run):
    code = (
        "import sys; from apt_plugins.report.page import write_report; "
        "write_report(sys.argv[1]); sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(make_run())]
    assert subprocess.run(command, env=environment).returncode == 0


def test_python_m_apt_core_finds_the_verb(make_run, tmp_path):
    metadata = tmp_path / "site" / "apt_kernel-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: apt-kernel\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[apt.commands]\napt-report = apt_plugins.report.command:main\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "apt_core", "report", str(make_run())],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, Path(done.stdout.strip()).name) == (0, "report.html"), done.stderr


def test_rows_of_a_real_run_are_all_on_the_page(tmp_path):
    tiny_run(steps=8, output=tmp_path / "run")
    html = build_report(tmp_path / "run")
    data = html.split('id="charts">')[1].split("</script>")[0]
    (loss, *_) = json.loads(data)[0]["series"]
    assert loss["x"] == [2, 4, 6, 8]
