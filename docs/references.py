"""Write the references that are generated: docs/hooks.md, providers.md, commands.md and the tables
of profiles.md. --check only compares."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import entry_points
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apt_core.catalogue import Catalogue
from apt_core.cli.verbs import every_app
from apt_core.config import profile_reference
from apt_core.declarations import Declared, declared_by
from apt_core.discovery import installed_plugins
from apt_core.errors import ConfigError
from apt_core.inspect.command_reference import command_reference
from apt_core.inspect.hook_reference import hook_reference
from apt_core.inspect.provider_reference import provider_reference

DOCS = Path(__file__).resolve().parent
TABLES = "### Top of the profile"
"""The line of profiles.md that the tables begin with; they go to its end."""


def references() -> dict[str, str]:
    """The text of each page by its name. Of plugins they have those that come with APT, whatever
    else is installed."""
    plugins = shipped()
    sections = [section for declared in plugins.values() for section in declared.sections]
    catalogue = Catalogue((name, declared.providers) for name, declared in plugins.items())
    commands = {
        point.name: point.value
        for point in sorted(entry_points(group="apt.commands"))
        if point.dist is not None and point.dist.name == "apt-kernel"
    }
    profiles = (DOCS / "profiles.md").read_text(encoding="utf-8")
    return {
        "hooks.md": hook_reference(),
        "providers.md": provider_reference(catalogue, sections),
        "commands.md": command_reference(every_app(commands)),
        "profiles.md": profiles[: profiles.index(TABLES)] + profile_reference(sections),
    }


def shipped() -> dict[str, Declared]:
    """What each plugin that comes with APT declares. Raises ConfigError for one that declares
    nothing here, which would be missing from the pages."""
    installed = installed_plugins()
    found = {
        name: declared_by(name, installed)
        for name, entry in installed.items()
        if entry.dist == "apt-kernel"
    }
    problems = [each.problem for each in found.values() if each.problem is not None]
    if problems:
        raise ConfigError(problems)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    try:
        pages = references()
    except ConfigError as error:
        print(f"the references need every extra: {error}", file=sys.stderr)
        return 2
    stale = []
    for name, text in pages.items():
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"docs/{name} {'is stale: python docs/references.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
