"""What the packages of the core offer by name is used by somebody."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("apt_core", "apt_plugins", "benchmarks", "docs", "examples", "tests")


def test_a_function_that_a_package_exports_is_imported_from_it():
    """Classes are contracts and types, which a plugin of somebody else may need."""
    texts = "\n".join(
        path.read_text("utf-8")
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md") and path.name != "__init__.py"
    )
    imports: dict[str, set[str]] = {}
    for several in re.finditer(r"from (apt_core[\w.]*) import (\([^)]*\)|[^\n]*)", texts):
        imports.setdefault(several[1], set()).update(re.findall(r"\w+", several[2]))
    unused = []
    for init in sorted((ROOT / "apt_core").rglob("__init__.py")):
        name = ".".join(init.relative_to(ROOT).parent.parts)
        package = importlib.import_module(name)
        for export in getattr(package, "__all__", ()):
            if inspect.isfunction(getattr(package, export)):
                unused += [] if export in imports.get(name, ()) else [f"{name}.{export}"]
    assert not unused
