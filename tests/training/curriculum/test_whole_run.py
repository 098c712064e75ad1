"""A curriculum from its first step to its last: what is said of it, and a switch that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from apt_core.cli.hooks import app as hooks
from apt_core.cli.run_command import run_command

if TYPE_CHECKING:
    from tests.training.curriculum.conftest import Curriculum

ENABLED = {"moe": (2, 6), "align": (2, 9), "voter": (3, 11)}
"""Epoch and step."""


@pytest.fixture
def run(apt_train) -> Any:
    """A run with a report."""
    run = apt_train("--plugin", "report")
    assert run.code == 0, run.err
    return run


def ramp(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def test_the_timeline_is_told_everywhere(run) -> None:
    log = (run.folder / "log.txt").read_text(encoding="utf-8")
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    for plugin, (epoch, step) in ENABLED.items():
        event = {"plugin": plugin, "event": "enabled", "epoch": epoch, "step": step}
        assert event in run.manifest["timeline"]
        for told in (log, run.out):
            assert f"enabled {plugin} (epoch {epoch}, step {step})" in told
        assert plugin in page.split("<h2>Timeline</h2>")[1].split("</section>")[0]
    rows = {row["step"]: row for row in run.metrics if "loss" in row}
    for step, row in rows.items():
        temperature = ramp(1.5, 0.8, (row["epoch"] - 1) / 2)
        assert row["schedule/route_temp"] == pytest.approx(temperature)
        assert row["schedule/moe_capacity"] == pytest.approx(ramp(1.2, 1.0, (step - 1) / 14))
        if step >= ENABLED["align"][1]:
            assert row["schedule/align_weight"] == row["align/weight"]
        assert ("moe/max_violation" in row) == (step >= ENABLED["moe"][1])
    starts = [line for line in log.splitlines() if " starts with " in line]
    expected = {"epoch 1": "1.5", "epoch 2": "1.15", "step 9": "1.15", "epoch 3": "0.8"}
    for line, (start, temperature) in zip(starts, expected.items(), strict=True):
        assert f" {start} starts with " in line and f"route_temp={temperature}" in line
    assert ["align_weight" in line for line in starts] == [False, False, True, True]
    assert "vote_threshold" in starts[3]
    charts = page.split('id="charts">')[1].split("</script>")[0]
    # A chart for a phone has the number of the wide one, whose values it shows.
    drawn = [c["series"] for c in json.loads(charts) if isinstance(c["series"], list)]
    told = [series["name"] for chart in drawn for series in chart]
    assert {"route_temp", "moe_capacity"} <= {name.split("/")[-1] for name in told}


FAULTS = {
    "as it is planned": ("raise OSError('no experts today')", "at step 0"),
    "as values are made": (
        "next(iter(transform.origins.values())).__dict__['value'] = broken",
        "at step 5",
    ),
}
BROKEN = """
from apt_core import hookimpl
from apt_plugins.moe.plugin import PLUGIN
from apt_plugins.moe.plugin import Plugin as Whole

def broken(tensor):
    raise OSError('no experts today')

class Plugin(Whole):
    @hookimpl
    def apt_transform_model(self, model, config, registry):
        transform = super().apt_transform_model(model, config, registry)
        FAULT
        return transform
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_switch_that_fails_leaves_the_run_without_it(
    curriculum: Curriculum, apt_train, tmp_path: Path, fault: str
) -> None:
    line, when = FAULTS[fault]
    (tmp_path / "moe.py").write_text(BROKEN.replace("FAULT", line), encoding="utf-8")
    file = curriculum.write((str(tmp_path / "moe.py"), "align", "routing", "voter"))
    failed = apt_train(name="failed", of=file)
    dense = apt_train("--plugin", "no:moe", name="dense", of=file)
    assert (failed.code, dense.code) == (0, 0), failed.err
    assert failed.same_weights(dense)
    states = [load_file(run.checkpoints[-1] / "optimizer.safetensors") for run in (failed, dense)]
    assert states[0].keys() == states[1].keys()
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())
    assert curve(failed) == curve(dense)
    assert failed.manifest["switches"] == []
    where = f"moe.py:{1 + BROKEN.splitlines().index('        FAULT')}"
    if "planned" not in fault:
        where = f"moe.py:{2 + BROKEN.splitlines().index('def broken(tensor):')}"
    summary = failed.out.rpartition("Epoch 3/3")[2]
    (told,) = [text for text in summary.splitlines() if "plugin moe" in text]
    for words in ("quarantined", "apt_transform_model", where, "no experts today"):
        assert words in told
    log = (failed.folder / "log.txt").read_text(encoding="utf-8")
    assert f"moe failed in apt_transform_model {when}" in log


def curve(run: Any) -> list[dict[str, float]]:
    """Losses and what they are made of."""
    kept = ("loss", "val_loss", "grad_norm", "lr", "step")
    return [
        {key: row[key] for key in row if key in kept or key.startswith("loss/")}
        for row in run.metrics
    ]


def test_the_hooks_command_knows_the_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> Any:
        capsys.readouterr()
        assert run_command(hooks, "apt-hooks", [*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = {row["name"]: row for row in call("plugins")}
    for name in ("moe", "align", "routing", "voter"):
        assert found[name]["state"] == "available" and found[name]["summary"]
    assert {"topk_moe", "topk_default"} == {row["name"] for row in call("providers", "router")}
    rows = call("list", "--plugin", "moe,align,routing,voter")
    order = [row["plugin"] for row in rows if row["hook"] == "apt_loss_terms"]
    assert order == ["moe", "align"]
    assert [r["plugin"] for r in rows if r["hook"] == "apt_transform_model"] == ["moe"]


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "plugin", [pytest.param("align", marks=pytest.mark.long), "moe", "routing", "voter"]
)
def test_the_plugins_pass_their_check(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(hooks, "apt-hooks", ["check", plugin]) == 0, capsys.readouterr().out
