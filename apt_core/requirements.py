"""Which of a list of PEP 508 requirements are not met in this environment."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def unmet(requirements: Iterable[str]) -> list[str]:
    """A reason for each requirement that is not met; empty if all are.

    >>> unmet(["pluggy>=1"])
    []
    >>> unmet(["no-such-package>=2"])
    ['no-such-package is not installed (pip install "no-such-package>=2")']
    """
    reasons: list[str] = []
    wanted = list(requirements)
    if not wanted:
        return reasons

    from packaging.requirements import InvalidRequirement, Requirement

    for text in wanted:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            reasons.append(f"{text!r} is not a valid requirement: {error}")
            continue
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            reasons.append(f'{requirement.name} is not installed (pip install "{text}")')
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            reasons.append(
                f"{requirement.name} {installed} is installed, {requirement.specifier} is needed "
                f'(pip install "{text}")'
            )
    return reasons
