"""The plugins that are installed or that a run would have, and the providers that it falls back
from."""

from __future__ import annotations

import os
from collections.abc import Iterator

from apt_core.catalogue import usable
from apt_core.discovery import DISABLE_VARIABLE
from apt_core.inspect.doctor.checks import BROKEN, NOTE, OK, Check
from apt_core.inspect.listing import Listing
from apt_core.kinds import named_providers


def installed(listing: Listing) -> Iterator[Check]:
    """The plugins that were found; a row for each that is broken."""
    records = listing.records.values()
    for record in records:
        if record.state == "broken":
            failure = record.failures[0] if record.failures else None
            where = f" ({failure.where})" if failure and failure.where else ""
            remedy = f"reinstall or uninstall {record.dist}" if record.dist else ""
            yield Check(
                f"plugin {record.name}",
                BROKEN,
                f"{record.reason}{where}",
                remedy or f"leave it out: --plugin no:{record.name}",
            )
    names = [record.name for record in records if record.state not in ("broken", "blocked")]
    if os.environ.get(DISABLE_VARIABLE, "") not in ("", "0"):
        yield Check(
            "plugins",
            NOTE,
            f"installed plugins are left out by {DISABLE_VARIABLE}",
            f"unset {DISABLE_VARIABLE}",
        )
    elif not names:
        yield Check("plugins", NOTE, "none is installed")
    if names:
        yield Check("plugins", OK, ", ".join(sorted(names)))


def of_profile(profile: str, listing: Listing) -> Iterator[Check]:
    """What is wrong with the profile, or with distributions and declarations that were found."""
    for problem in listing.problems:
        where = f"{problem.where}: " if problem.where else ""
        detail = f"{problem.key}: {problem.message}" if problem.key else problem.message
        yield Check("profile" if profile else "plugins", BROKEN, where + detail, problem.hint)
    if profile and not listing.problems:
        yield Check("profile", OK, profile)


def providers(profile: str, listing: Listing) -> Iterator[Check]:
    """The providers that cannot be used here, and what a run takes in place of each; with a profile
    only those that it names."""
    known, named = listing.providers, None
    if profile:
        from apt_core.config import read_profile

        named = named_providers(read_profile(profile).data, listing.sections)
    judged = unknown = 0
    for spec in known.specs():
        if named is not None and (spec.kind, spec.name) not in named:
            continue
        can_be_used, reason = usable(spec)
        judged += 1
        unknown += can_be_used is None
        if can_be_used is not False:
            continue
        other = known.replacement(spec)
        instead = f"a run that names it uses {other.name}" if other else "a run that names it fails"
        reason, _, hint = reason.partition(" (pip install ")
        remedy = f"pip install {hint.partition(')')[0]}" if hint else ""
        state = NOTE if other or named is None else BROKEN
        yield Check(f"{spec.kind} {spec.name}", state, f"{reason}: {instead}", remedy)
    told = f"{judged} examined"
    if unknown:
        told += f", of which {unknown} of plugins are tried by a run before it uses them"
    yield Check("providers", OK, told)
