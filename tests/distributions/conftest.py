"""A virtual environment with real distributions of plugins, good ones and broken ones."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import apt_core

SOURCES = Path(__file__).parent / "data"
TEXT = "\n\n".join(f"Paragraph {n} says that {n} and {n} are {2 * n}." for n in range(60))
DAMAGED = {
    "no_metadata-1.0.dist-info": {"entry_points.txt": b"[apt.plugins]\nno_metadata = json\n"},
    "latin-1.0.dist-info": {
        "METADATA": b"Name: l\xe9tin\nVersion: 1.0\n",
        "entry_points.txt": b"[apt.plugins]\nlatin = colorsys\n",
    },
    "dash-1.0.dist-info": {
        "METADATA": b"Name: dash\nVersion: 1.0\n",
        "entry_points.txt": b"[apt.plugins]\ndash = my-module\n",
    },
    "twice-1.0.dist-info": {
        "METADATA": b"Name: twice\nVersion: 1.0\n",
        "entry_points.txt": b"[apt.plugins]\ntwice = colorsys\nTwice = json\n",
    },
    "no_value-1.0.dist-info": {"entry_points.txt": b"[apt.plugins]\nno value\n"},
    "latin_points-1.0.dist-info": {"entry_points.txt": b"[console_scripts]\nl\xe9 = json\n"},
    "folder_points-1.0.dist-info": {"entry_points.txt/part": b""},
}
"""What is left of distributions by a full disk or a build gone wrong: files by folder."""
PROFILE = """\
extends: tiny_debug
name: small
data: {train_path: text.txt, max_length: 16}
model: {d_model: 16, num_heads: 2, num_layers: 1, d_ff: 32, max_seq_len: 16}
training: {max_steps: 3, warmup_steps: 1, log_every_steps: 1, checkpoint_dir: null}
evaluation: {eval_batches: 1, sample_tokens: 0}
debug: {verbose: false}
"""


@dataclass(frozen=True)
class Environment:
    """Commands run in the environment, from an empty folder with a small profile in it."""

    python: Path
    folder: Path

    @property
    def mark(self) -> Path:
        """What the distribution ``marked`` creates when it is imported."""
        return self.folder / "imported"

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """``python -m apt_core …``; finishes whatever the exit code is."""
        settings = {
            **os.environ,
            "APT_CACHE": str(self.folder / "cache"),
            "APT_MARK": str(self.mark),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        return subprocess.run(
            [str(self.python), "-m", "apt_core", *arguments],
            cwd=self.folder,
            env=settings,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def profile(self, plugins: str) -> str:
        """Write a small profile with this list of plugins; returns its name."""
        (self.folder / "small.yaml").write_text(f"{PROFILE}plugins: {plugins}\n")
        return "small.yaml"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of the environment, made once, whatever the number of test processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    environment = shared / "distributions"
    python = environment / "bin" / "python"
    done = environment / "installed"
    with _locked(shared / "distributions.lock"):
        if not done.exists():
            _install(environment, python)
            done.touch()
    return python


@pytest.fixture
def environment(installed: Path, tmp_path: Path) -> Environment:
    (tmp_path / "text.txt").write_text(TEXT)
    return Environment(installed, tmp_path)


def _install(environment: Path, python: Path) -> None:
    wheels, sources = environment / "wheels", environment / "sources"
    # Building leaves files behind in the source tree, so that it is a copy that is built.
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    folders = sorted(str(path) for path in sources.iterdir())
    _call(sys.executable, "-m", "venv", "--without-pip", str(environment))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-index", "--quiet")
    _call(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(wheels), *folders)
    _call(*pip, "--python", str(python), "install", *offline, *map(str, wheels.iterdir()))
    packages = next((environment / "lib").glob("python*/site-packages"))
    home = Path(apt_core.__file__).parents[1]
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(home)])
    (packages / "test_environment.pth").write_text("\n".join(paths) + "\n")
    for name, files in DAMAGED.items():
        for file, content in files.items():
            (packages / name / file).parent.mkdir(parents=True, exist_ok=True)
            (packages / name / file).write_bytes(content)
    (packages / "a_file-1.0.dist-info").touch()


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
