"""Prints what is known of a key of the profile, for ``apt-hooks explain`` and ``--explain``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apt_core.cli.output import Json, complain, output_apart, print_table, say

if TYPE_CHECKING:
    from apt_core.config import Override


def show_explained(
    key: str,
    profile: str,
    plugins: Sequence[str],
    overrides: Sequence[Override],
    *,
    as_json: bool,
) -> Json | None:
    """Print what is known of one key of the profile, or of a section and its keys."""
    from apt_core.inspect.explain import explain as explained_key

    with output_apart():
        explained = explained_key(key, profile, plugins, overrides)
    if as_json:
        return Json(explained.row())
    facts = explained.facts
    say(facts.path)
    say(f"  {' '.join(facts.meaning.partition(chr(10) * 2)[0].replace('``', '`').split())}")
    if facts.value != "mapping":
        say(f"  value: {facts.value.replace('`', '')}")
        say(f"  default: {'needed' if facts.required else shown(facts.default)}")
    for reader in explained.readers:
        say(f"  read by {reader}")
    if profile and (explained.where or facts.value != "mapping"):
        where = f" ({explained.where})" if explained.where else ""
        say(f"  in {profile}: {shown(explained.value)}{where}")
    if explained.inactive:
        say(f"  inactive there: {explained.inactive}")
    for line in explained.over_the_run:
        say(f"  {line}")
    for problem in explained.problems:
        complain(f"warning: {problem}")
    if facts.keys:
        say()
        rows = [
            (
                k.path,
                k.value.replace("`", ""),
                "needed" if k.required else shown(k.default),
                k.meaning,
            )
            for k in facts.keys
        ]
        print_table(("key", "value", "default", "meaning"), rows)
    return None


def shown(value: Any) -> str:
    """A value as a profile has it.

    >>> shown(None), shown(True), shown([1, 2]), shown("a"), shown(1e-4)
    ('none', 'true', '[1, 2]', 'a', '0.0001')
    """
    import json

    if value is None or value == "":
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
