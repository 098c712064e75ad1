"""Trackers: what they were told is read back from their files; none of them costs a weight."""

from __future__ import annotations

import errno
import json
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apt_core.errors import ConfigError
from apt_core.kernel import boot
from apt_core.testing import TinyRun, tiny_run

TRACKERS = ("tensorboard", "trackio", "wandb")
STEPS, BACK_TO = 6, 4
CHANGES: dict[str, Any] = {
    "name": "tracked",
    "model.dropout": 0.2,
    "training.log_every_steps": 1,
    "training.save_every_steps": 2,
    "training.keep_last": 0,
    "evaluation.sample_tokens": 2,
}


def train(changes: dict[str, Any], *plugins: Any, **options: Any) -> TinyRun:
    every = {**CHANGES, **changes}
    return tiny_run(*plugins, steps=STEPS, strict=False, overrides=every, **options)


def failures_of(run: TinyRun) -> dict[str, list[str]]:
    return {
        row["name"]: [failure["error"] for failure in row["failures"]]
        for row in run.manifest["plugins"]
    }


@pytest.fixture(scope="module")
def bare() -> TinyRun:
    return train({})


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, TinyRun, TinyRun]]:
    """The folder, a run with all trackers, and the part of it that was taken again after it had
    gone back by two steps."""
    for name in TRACKERS:
        pytest.importorskip(name, reason=f"pip install apt-kernel[{name}]")
    root = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(root / "trackio"))
        patch.setenv("HOME", str(root))
        patch.setenv("NETRC", str(root / "none"))
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        for module in [m for m in sys.modules if m.partition(".")[0] == "trackio"]:
            patch.delitem(sys.modules, module)  # it looks for its folder when it is imported
        changes = {f"monitoring.{name}.enabled": True for name in TRACKERS}
        changes |= {f"monitoring.{name}.histograms_every_steps": 3 for name in TRACKERS}
        changes["monitoring.tensorboard.log_dir"] = str(root / "logs")
        run = root / "run"
        whole = train(changes, output=run)
        at = run / "checkpoints" / f"step-{BACK_TO:08d}"
        again = train(changes, output=run, resume_from=at)
        yield root, whole, again


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def columns(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """By name and step, the numbers of rows of metrics."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, {})[row["step"]] = value
    return found


def test_with_all_of_them_weights_are_the_same(
    bare: TinyRun, tracked: tuple[Path, TinyRun, TinyRun]
) -> None:
    _, whole, again = tracked
    assert failures_of(whole) == failures_of(again) == {name: [] for name in TRACKERS}
    assert not any(row["dropped"] for row in again.manifest["plugins"])
    assert whole.same_weights(bare) and again.same_weights(bare)


def test_event_files_have_what_metrics_has(tracked: tuple[Path, TinyRun, TinyRun]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root, *_ = tracked
    found = EventAccumulator(str(root / "logs" / "run"), {"scalars": 0, "tensors": 0}).Reload()
    expected = columns(rows_of(root / "run"))
    assert set(found.Tags()["scalars"]) == expected.keys()
    for name, values in expected.items():
        own = {event.step: event.value for event in found.Scalars(name)}
        assert own == {step: float(np.float32(value)) for step, value in values.items()}, name
    texts = [event.tensor_proto.string_val[0].decode() for event in found.Tensors("events")]
    assert any(text.startswith("resumed: ") for text in texts)
    assert any(text.startswith("saved: ") for text in texts)
    assert "| training.log_every_steps | 1 |" in (
        found.Tensors("profile")[-1].tensor_proto.string_val[0].decode()
    )
    sample = found.Tensors("sample")[-1].tensor_proto.string_val[0].decode()
    assert sample == tracked[2].manifest["sample"]
    histograms = [tag for tag in found.Tags()["histograms"] if "embedding.weight" in tag]
    assert histograms == ["weights/embedding.weight", "gradients/embedding.weight"]
    histogram = found.Histograms(histograms[0])[-1].histogram_value
    assert histogram.num == sum(histogram.bucket) > 1000


def offline_records(folder: Path) -> list[Any]:
    """The records in the file of an offline run: a log of leveldb, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, block, records, parts = path.read_bytes(), 7, 2**15, [], b""
    while at < len(data):
        left = block - at % block
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_an_offline_run_of_wandb_goes_on_as_one(tracked: tuple[Path, TinyRun, TinyRun]) -> None:
    root, whole, _ = tracked
    parts = sorted((root / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    history: list[dict[str, Any]] = []
    ids, config = set(), {}
    for part in parts:
        for record in offline_records(part):
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                config |= {each.key: each.value_json for each in record.run.config.update}
            if record.HasField("config"):
                config |= {each.key: each.value_json for each in record.config.update}
            if record.HasField("history"):
                items = record.history.item
                history.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    assert len(ids) == 1 and {project for _, project, _ in ids} == {"tracked"}
    own = [row for row in history if "loss" in row or "val_loss" in row]
    expected = columns([*whole.metrics, *rows_of(root / "run")])
    found = columns([{k: v for k, v in row.items() if not k.startswith("_")} for row in own])
    assert found == expected
    told = [row["event"] for row in history if "event" in row]
    assert f"resumed: steps {BACK_TO + 1} to {STEPS} are taken again in part 2" in told
    assert config["part"] == "2"
    assert any("embedding.weight" in key for row in history for key in row)


def test_trackio_has_the_rows_that_count(tracked: tuple[Path, TinyRun, TinyRun]) -> None:
    root, *_ = tracked
    with sqlite3.connect(root / "trackio" / "tracked.db") as database:
        found = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id")
        kept = found.fetchall()
    database.close()
    assert len({(run_id, name) for run_id, name, *_ in kept}) == 1
    rows = [{"step": step, **json.loads(metrics)} for _, _, step, metrics in kept]
    own = [row for row in rows if "loss" in row or "val_loss" in row]
    assert columns(own) == columns(rows_of(root / "run"))
    assert [row["status"] for row in rows if "status" in row][-1] == "finished"


# What may happen to them ------------------------------------------------------------------------


def hang() -> None:
    threading.Event().wait(60)


def refuse() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fake_trackio(act: Callable[[], None]) -> dict[str, Any]:
    storage = SimpleNamespace(
        bulk_log=lambda **_: act(), get_project_db_path=lambda project: Path("no")
    )
    return {"trackio": ModuleType("trackio"), "trackio.sqlite_storage": _module(storage)}


def _module(storage: Any) -> Any:
    return SimpleNamespace(SQLiteStorage=storage)


def fake_wandb(act: Callable[[], None]) -> dict[str, Any]:
    errors = SimpleNamespace(Error=RuntimeError)
    module = SimpleNamespace(init=lambda **_: act(), Settings=dict, errors=errors)
    return {"wandb": module}


@pytest.mark.parametrize("act", [hang, refuse])
@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_hangs_or_loses_its_disk_costs_no_weight(
    bare: TinyRun,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    act: Callable[[], None],
) -> None:
    pytest.importorskip(name, reason=f"pip install apt-kernel[{name}]")
    if name == "tensorboard":
        from apt_plugins.tensorboard import events

        monkeypatch.setattr(events.EventFile, "scalars", lambda *_: act())
    else:
        fakes = {"trackio": fake_trackio, "wandb": fake_wandb}[name](act)
        for module, fake in fakes.items():
            monkeypatch.setitem(sys.modules, module, fake)
    changes = {"training.background_timeout": 0.1, f"monitoring.{name}.enabled": True}
    run = train(changes, output=tmp_path / "run")
    assert run.same_weights(bare)
    (row,) = run.manifest["plugins"]
    errors = [failure["error"] for failure in row["failures"]]
    assert all(f"apt_plugins/{name}/plugin.py" in failure["where"] for failure in row["failures"])
    if act is hang:
        assert "AbandonedCallError: it has not returned 0.1 seconds after" in errors[0]
        assert row["dropped"]
    else:
        assert errors[0] == "OSError: [Errno 28] No space left on device"


def test_what_a_full_disk_cuts_is_not_left_in_an_event_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="pip install apt-kernel[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from apt_plugins.tensorboard.events import EventFile

    file = EventFile(tmp_path)
    file.scalars(1, {"loss": 1.0})
    whole = file._file

    class Full:
        fileno, name = whole.fileno, whole.name

        def write(self, data: Any) -> int:
            return whole.write(data[:5])

    file._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="takes no more"):
        file.scalars(2, {"loss": 2.0})
    file._file = whole
    file.scalars(3, {"loss": 3.0})
    file.close()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(1, 1.0), (3, 3.0)]


# The profile ------------------------------------------------------------------------------------


def named(profile: dict[str, Any], **options: Any) -> tuple[set[str], dict[str, str], list[str]]:
    """The active plugins, the inactive keys and the notices of a profile."""
    kernel = boot(profile, files=False, **options)
    active = {r.name for r in kernel.manager.records.values() if r.state == "active"}
    return active, {item.key: item.reason for item in kernel.inactive}, kernel.notices


@pytest.mark.parametrize("name", TRACKERS)
def test_a_profile_turns_a_tracker_on(name: str) -> None:
    pytest.importorskip(name, reason=f"pip install apt-kernel[{name}]")
    on = {"monitoring": {name: {"enabled": True, "histograms_every_steps": 5}}}
    active, inactive, notices = named(on)
    assert (active, inactive) == ({name}, {})
    assert notices == [f"plugin {name} activated: the profile says monitoring.{name}.enabled"]
    assert named(on, plugins=[f"no:{name}"])[0] == set()
    assert named({"monitoring": {name: {"enabled": False}}}) == (set(), {}, [])
    assert named({"plugins": [name]})[0] == {name}
    idle = {"monitoring": {name: {"histograms_every_steps": 5}}}
    (key,) = named(idle)[1]
    assert f"monitoring.{name}.histograms_every_steps".startswith(key)
    with pytest.raises(ConfigError, match="histogram_every"):
        named({"monitoring": {name: {"enabled": True, "histogram_every": 5}}})


def test_a_missing_library_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from apt_plugins.wandb import plugin

    lacking = plugin.PLUGIN.__class__(summary="x", observer=True, requires=("no-such-wandb>=3",))
    monkeypatch.setattr(plugin, "PLUGIN", lacking)
    on = {"monitoring": {"wandb": {"enabled": True}}}
    active, _, notices = named(on)
    assert active == set()
    (notice,) = notices
    assert notice.startswith("plugin wandb is broken: it cannot be used: no-such-wandb is not inst")
    assert 'pip install "no-such-wandb>=3"' in notice
    for options in ({"plugins": ["wandb"]}, {"strict": True}):
        with pytest.raises(ConfigError, match="no-such-wandb is not installed"):
            named(on, **options)


def test_a_key_is_found_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apt_plugins.wandb.plugin import has_key

    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    pytest.importorskip("wandb", reason="pip install apt-kernel[wandb]")
    assert not has_key()
    asks = {"monitoring": {"wandb": {"enabled": True, "mode": "online"}}}
    with pytest.raises(ConfigError, match=r"wandb.mode.*online needs a key"):
        named(asks)
    netrc.write_text("machine api.wandb.ai login user password 0123\n")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.host:8080")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert has_key()
