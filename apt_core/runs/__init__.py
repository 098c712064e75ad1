"""The folder of a run, and all that is read from it and written to it.

What needs torch is imported when it is asked for: the readers of a folder do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt_core.runs.session import Position, Session

__all__ = ["Position", "Session"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from apt_core.runs import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
