"""``apt-hooks doctor``: what is broken, what works in another way, and how to mend it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import apt_core
from apt_core import device
from apt_core.cli.hooks import app
from apt_core.inspect.doctor import BROKEN, NOTE, OK, machine, packages

if TYPE_CHECKING:
    from tests.cli.conftest import Command


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    return site


def distribution(site: Path, name: str, version: str, **files: str) -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (info / file.replace("_txt", ".txt")).write_text(text)
    importlib.invalidate_caches()


def checks(command: Command, *arguments: str) -> dict[str, dict[str, Any]]:
    outcome = command(app, "doctor", "--json", *arguments)
    assert outcome.err == ""
    told = json.loads(outcome.out)
    assert told["ok"] == (outcome.code == 0)
    assert told["ok"] == all(row["state"] != BROKEN for row in told["checks"])
    for row in told["checks"]:
        assert row.keys() == {"name", "state", "detail", "remedy"}
    return {row["name"]: row for row in told["checks"]}


def test_packages_that_are_missing_too_old_or_damaged_are_told_with_their_remedy(
    command: Command, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(site, "old_one", "1.0")
    distribution(site, "half", "3.0", RECORD="half/__init__.py,,\nhalf/part.py,,\n")
    (site / "half").mkdir()
    required = [
        "pluggy>=1", "old-one>=2", "half>=2",
        'half>=2; extra == "halved"', 'apt-kernel[halved]; extra == "more"',
        'no-such-package>=1; extra == "absent"', 'apt-kernel[more,absent]; extra == "most"',
        'old-one>=1; extra == "fine"', 'no-such-tool; extra == "dev"',
    ]  # fmt: skip
    monkeypatch.setattr(packages, "_required", lambda: required)
    monkeypatch.setattr(packages, "source_folder", lambda: None)
    rows = checks(command)
    outcome = command(app, "doctor")
    assert outcome.code == 1 and "broken" in outcome.out
    assert "half is damaged: its module half is not where it was installed" in outcome.out
    assert "packages: pip install --force-reinstall half" in outcome.out
    assert 'packages: pip install "old-one>=2"' in outcome.out
    states = {name: row["state"] for name, row in rows.items() if name.startswith("extra ")}
    assert states == {
        "extra halved": BROKEN, "extra more": BROKEN, "extra absent": NOTE, "extra most": BROKEN,
        "extra fine": OK,
    }  # fmt: skip
    assert rows["extra absent"]["remedy"] == 'pip install "apt-kernel[absent]"'
    assert not any(packages.modules_of("old_one"))


def test_torch_is_read_and_not_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    torch = site / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(packages, "_required", lambda: ["torch>=2.13"])
    (torch / "version.py").write_text(
        "from typing import Optional\n__version__ = '9.1.0+cu130'\n"
        "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    )
    distribution(site, "torch", "9.1.0")
    importlib.invalidate_caches()
    assert packages.torch_build() == packages.TorchBuild("9.1.0+cu130", "13.0", "")
    (check,) = packages.torch()
    assert (check.state, check.detail) == (OK, "9.1.0+cu130, built for CUDA 13.0")
    (torch / "version.py").unlink()
    (check,) = packages.torch()
    assert check.state == BROKEN and "--force-reinstall" in check.remedy


@pytest.mark.parametrize(
    ("built", "driver", "hidden", "state", "says"),
    [
        (("2", "13.0", ""), "580.65.06", None, OK, "NVIDIA X1, driver 580.65.06; torch is built"),
        (("2", "13.0", ""), "535.1", None, NOTE, "needs driver 580"),
        (("2+cpu", "", ""), "580.65.06", None, NOTE, "a build without CUDA"),
        (("2", "13.0", ""), "580.65.06", "", NOTE, "hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    built: tuple[str, str, str],
    driver: str,
    hidden: str | None,
    state: str,
    says: str,
) -> None:
    card = tmp_path / "nvidia" / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA X1\nIRQ:   12\n")
    (tmp_path / "nvidia" / "version").write_text(
        f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sun\nGCC version: 12\n"
    )
    devices = tmp_path / "dev"
    devices.mkdir()
    (devices / "nvidia0").touch()
    for module in (machine, device):
        monkeypatch.setattr(module, "DEVICES", devices)
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "nvidia")
    monkeypatch.setattr(machine, "torch_build", lambda: packages.TorchBuild(*built))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (check,) = machine.gpus()
    assert check.state == state and says in check.detail
    assert bool(check.remedy) == (state != OK)
    (devices / "nvidia0").unlink()
    (check,) = machine.gpus()
    assert "not given to this container" in check.detail


def test_the_limits_of_control_groups_count(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert device.control_group_cores(tmp_path, membership) is None
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    assert device.control_group_cores(tmp_path, membership) == 1.5
    old = tmp_path / "cpu" / "c"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("50000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    membership.write_text("4:cpu,cpuacct:/c\n")
    assert device.control_group_cores(tmp_path, membership) == 0.5
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert device.control_group_cores(tmp_path, membership) is None


def test_more_threads_than_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "control_group_cores", lambda: None)
    for value, state in (("1", OK), ("100000", NOTE), ("many", NOTE), ("", OK)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        (check,) = machine.cpu()
        assert (check.state, bool(check.remedy)) == (state, state == NOTE), value
    monkeypatch.setattr(machine, "control_group_cores", lambda: 0.5)
    (check,) = machine.cpu()
    assert check.state == NOTE and "OMP_NUM_THREADS=1" in check.remedy


def test_folders_that_cannot_be_written_are_told(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.delenv("APT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    rows = checks(command)
    assert rows["home"]["state"] == rows["cache"]["state"] == NOTE
    assert "/proc/nobody/.cache/apt cannot be written" in rows["cache"]["detail"]
    assert rows["cache"]["remedy"] == "APT_CACHE=FOLDER" and rows["runs"]["state"] == OK
    monkeypatch.chdir("/proc")
    assert checks(command)["runs"]["state"] == BROKEN


def test_a_profile_is_asked_what_it_needs(command: Command, plugin: str) -> None:
    Path("mine.yaml").write_text(f"plugins: [{plugin}]\nmodel: {{norm_name: sample_norm}}\n")
    rows = checks(command, "-p", "mine.yaml")
    assert rows["profile"]["state"] == OK and "sample" in rows["plugins"]["detail"]
    fallen = rows["norm sample_norm"]
    assert fallen["state"] == NOTE and fallen["remedy"] == 'pip install "no-such-package>=2"'
    assert "no-such-package is not installed: a run that names it uses rmsnorm" in fallen["detail"]
    Path("mine.yaml").write_text("plugins: [gone.py]\nmodel: {d_modle: 3}\n")
    rows = checks(command, "-p", "mine.yaml")
    assert rows["plugin gone"]["state"] == rows["profile"]["state"] == BROKEN
    assert command(app, "doctor", "-p", "absent.yaml").code == 2


def test_a_check_that_fails_is_told_and_the_others_go_on(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> list[object]:
        raise OSError("no such file")

    monkeypatch.setattr(machine, "memory", failing)
    rows = checks(command)
    assert rows["memory"]["state"] == BROKEN and "no such file" in rows["memory"]["detail"]
    assert rows["providers"]["state"] == OK


def test_imports_are_tried_in_processes_of_their_own(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in (("good_one", ""), ("bad_one", "import os; os.abort()")):
        distribution(site, name, "1.0", RECORD=f"{name}.py,,\n")
        (site / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(site))
    required = ['good-one; extra == "a"', 'bad-one>=1; extra == "b"', 'gone; extra == "c"']
    monkeypatch.setattr(packages, "_required", lambda: required)
    monkeypatch.setattr(packages, "_TORCH", "raise ImportError('undefined symbol: x')")
    rows = {check.name: check for check in packages.imports()}
    assert rows["import torch"].state == BROKEN
    assert "undefined symbol: x" in rows["import torch"].detail
    assert rows["import bad_one"].detail == "it ended by signal 6"
    assert rows["imports"].detail == "good_one"


def test_it_works_without_torch_in_a_bare_place(tmp_path: Path) -> None:
    """Without torch, colour, size, locale, a home, with a broken plugin and a damaged package."""
    packages_there = tmp_path / "packages"
    packages_there.mkdir()
    for entry in filter(os.path.isdir, sys.path):
        for child in Path(entry).iterdir() if entry.endswith("-packages") else ():
            if not child.name.startswith(("torch", "__editable__")):
                (packages_there / child.name).symlink_to(child)
    site = tmp_path / "site"
    site.mkdir()
    distribution(site, "apt_bad", "1.0", entry_points_txt="[apt.plugins]\nbad = bad_module\n")
    (site / "bad_module.py").write_text("import no_such_library\n")
    for package in ("apt_core", "apt_plugins"):
        if not (packages_there / package).exists():
            (packages_there / package).symlink_to(Path(apt_core.__file__).parents[1] / package)
    told = "import sys; from apt_core.cli.hooks import app, run_command; " \
        "code = run_command(app, 'apt-hooks', ['doctor']); " \
        "print('torch' in sys.modules); sys.exit(code)"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-S", "-c", told],
        cwd=tmp_path,
        env={
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(map(str, [site, packages_there])),
            "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
            "HOME": "/proc/nobody", "TERM": "dumb", "COLUMNS": "0", "NO_COLOR": "1",
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, lines[-1]) == (1, "", "False")
    rows = {line[:20].split("  ")[0]: line for line in lines}
    assert "torch is not installed" in rows["torch"] and "broken" in rows["torch"]
    assert "No module named 'no_such_library' (site/bad_module.py:1)" in rows["plugin bad"]
    assert "note" in rows["home"] and "note" in rows["terminal"]
    assert any(line.startswith('  torch: pip install "torch') for line in lines)
    assert "\x1b" not in done.stdout and done.stdout.isascii()
