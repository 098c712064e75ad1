"""Which of a list of PEP 508 requirements are not met in this environment."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from apt_core.error_text import one_line


def unmet(requirements: Iterable[str]) -> list[str]:
    """A reason for each requirement that is not met; empty if all are.

    >>> unmet(["pluggy>=1"])
    []
    >>> unmet(["no-such-package>=2"])
    ['no-such-package is not installed (pip install "no-such-package>=2")']
    """
    reasons: list[str] = []
    wanted = [text for text in requirements if not _plainly_met(text)]
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
        except Exception as error:
            reasons.append(f"the metadata of {requirement.name} cannot be read: {one_line(error)}")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            reasons.append(
                f"{requirement.name} {installed} is installed, {requirement.specifier} is needed "
                f'(pip install "{text}")'
            )
    return reasons


def _plainly_met(text: str) -> bool:
    """Whether ``NAME>=1.2`` is met, without importing packaging, which takes a tenth of a listing's
    time; False if only packaging can decide it."""
    wanted = re.fullmatch(r"([\w.-]+)>=([\d.]+)", text)
    if wanted is None:
        return False
    try:
        installed, least = (
            [int(part) for part in release.split(".")]
            for release in (version(wanted[1]), wanted[2])
        )
    except Exception:  # not installed, damaged, or another form of version
        return False
    return installed >= least
