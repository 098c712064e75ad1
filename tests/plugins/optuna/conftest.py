"""The smallest profile that a study can tune, and a study of it in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from apt_core.cli.run_command import run_command
from apt_core.testing.tiny import TEXT, TINY_PROFILE

STEPS = 9
SPACE = """\
training.learning_rate: {low: 1e-4, high: 1e-1, log: true}
model:
  dropout: [0.0, 0.1]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a profile and a space."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APT_TUNE_STORAGE", raising=False)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    profile = TINY_PROFILE | {
        "name": "tiny",
        "data": {"train_path": "text.txt"},
        "training": TINY_PROFILE["training"] | {"max_steps": STEPS, "max_epochs": 1},
        "evaluation": {"eval_freq": 1, "eval_batches": 1, "sample_tokens": 0},
        "hardware": {"device": "cpu", "num_threads": 1},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    Path("space.yaml").write_text(SPACE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def tune(here, monkeypatch, capsys):
    """Run apt-tune in this process; gives its exit code, stdout and stderr."""
    from apt_plugins.optuna.command import app

    def run(*words):
        words = [str(word) for word in words]
        if not words or words[0].startswith("-"):
            words = ["-p", "tiny.yaml", "--space", "space.yaml", *words]
        capsys.readouterr()  # of one that was ended by an exception
        monkeypatch.setattr(sys, "argv", ["apt-tune", *words])
        code = run_command(app, "apt-tune", words)
        out, err = capsys.readouterr()
        return code, out, err

    return run
