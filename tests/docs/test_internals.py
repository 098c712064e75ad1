"""docs/internals.md speaks of names that there are."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from apt_core.training import Trainer
from apt_core.training.trainer import SURFACE

ROOT = Path(__file__).parents[2]
INTERNALS = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(apt_core(?:\.\w+)+)`", INTERNALS)))


def found(name: str) -> bool:
    """Is there a module, or something in one, of this name?"""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_a_name_that_is_not_there_is_noticed() -> None:
    assert found("apt_core.training.loop.Loop") and len(NAMES) > 40
    assert not found("apt_core.training.loop.Loup") and not found("apt_core.trainings")


@pytest.mark.parametrize("name", NAMES)
def test_the_internals_name_what_there_is(name: str) -> None:
    assert found(name)


def test_every_package_of_the_core_has_its_line() -> None:
    packages = {path.parent.name for path in (ROOT / "apt_core").glob("*/__init__.py")}
    house = INTERNALS.split("```")[1]
    words = set(re.findall(r"[a-z]+", house))
    assert packages - words <= {"testing"}


def test_the_guide_lists_what_hooks_may_use_of_the_trainer() -> None:
    guide = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `trainer\.(\w+)` \| (.*) \|$", guide, flags=re.M)
    assert dict(rows) == SURFACE
    attributes = {"config", "registry", "rank", "world_size"}
    assert {name for name in SURFACE if not hasattr(Trainer, name)} == attributes
