"""``apt-new`` in this process, from an empty folder, with no installed plugin in sight."""

from __future__ import annotations

from tests.cli.conftest import command, folder

__all__ = ["command", "folder"]
