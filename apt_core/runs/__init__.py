"""The folder of a run, and all that is read from it and written to it.

What needs torch is imported when it is asked for: the readers of a folder do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt_core.runs.opened import open_run
    from apt_core.runs.session import Position, Session

__all__ = ["Position", "Session", "open_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from apt_core.runs import opened, session

    return getattr(opened if name == "open_run" else session, name)
