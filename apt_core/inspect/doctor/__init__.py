"""What ``apt-hooks doctor`` examines: whether APT can work here, what of it works in another way,
and how to mend each.

Nothing here imports torch: what it is is read from its files. ``imports`` tries it, and the
optional libraries, in processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from apt_core.error_text import one_line
from apt_core.inspect.doctor import machine, packages, places, plugins
from apt_core.inspect.doctor.checks import BROKEN, NOTE, OK, Check
from apt_core.inspect.listing import survey

__all__ = ["BROKEN", "NOTE", "OK", "Check", "examine"]


def examine(
    profile: str = "", references: Sequence[str] = (), *, imports: bool = False
) -> list[Check]:
    """Every check, in the order in which they are shown; one that fails itself is broken.

    With a ``profile``, or ``references`` as ``--plugin`` takes them, the plugins of such a run are
    examined, else all that are installed. Raises ConfigError for a profile that cannot be read.
    """
    listing = survey(profile, references)
    parts: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("Python", machine.python),
        ("APT", packages.apt),
        ("torch", packages.torch),
        ("GPU", machine.gpus),
        ("CPU", machine.cpu),
        ("memory", machine.memory),
        ("shared memory", machine.shared_memory),
        ("compiler", machine.compiler),
        ("terminal", machine.terminal),
        ("folders", places.folders),
        ("packages", packages.needed),
        ("extras", packages.extras),
        ("plugins", lambda: plugins.installed(listing)),
        ("profile", lambda: plugins.of_profile(profile, listing)),
        ("providers", lambda: plugins.providers(profile, listing)),
    ]
    if imports:
        parts.append(("imports", packages.imports))
    found: list[Check] = []
    for name, part in parts:
        try:
            found += part()
        except Exception as error:
            found.append(Check(name, BROKEN, f"could not be examined: {one_line(error)}"))
    return found
