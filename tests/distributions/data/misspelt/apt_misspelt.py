"""A plugin whose hook does not exist."""

from __future__ import annotations

from apt_core import hookimpl


@hookimpl
def on_step_ends(step):
    pass
