"""What a run may take: data, time, memory and a device, as they are given on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from apt_core.errors import ConfigError

MOST_PASSES = 16
"""Passes over the data at the most: what is seen more often than four times is worth less and less,
and from sixteen times on next to nothing (Muennighoff et al., arXiv:2305.16264)."""

LEAST_SECONDS = 15.0
MOST_SECONDS = 366 * 86_400.0

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Budget:
    """The ``data`` is a path, pattern or URL, or several. ``memory`` is in bytes, by default what
    is there; ``cores`` are those of a CPU, by default all; ``passes`` bounds how often the data is
    seen."""

    data: Sequence[str]
    seconds: float
    memory: int | None = None
    device: str = "auto"
    cores: int | None = None
    passes: int = MOST_PASSES


def minutes_of(text: str) -> float:
    """The seconds of ``10`` (minutes), ``10m``, ``90s`` or ``1.5h``. Raises ConfigError.

    >>> minutes_of("10"), minutes_of("1.5h"), minutes_of("90s")
    (600.0, 5400.0, 90.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|sec|seconds|m|min|minutes|h|hours)?", text.strip())
    if found is None:
        hint = "10 (minutes), 90s, 1.5h"
        raise ConfigError(f"{text!r} is no length of time", "--minutes", hint=hint)
    scale = {"s": 1.0, "h": 3600.0}.get((found[2] or "m")[0], 60.0)
    seconds = float(found[1]) * scale
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        message = f"{text} is not between {LEAST_SECONDS:g} seconds and a year"
        raise ConfigError(message, "--minutes")
    return seconds


def bytes_of(text: str) -> int:
    """The bytes of ``4GiB``, ``4G`` or ``500 MB``. Raises ConfigError.

    >>> bytes_of("4GiB"), bytes_of("1.5 GB")
    (4294967296, 1500000000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    unit = (found[2] or "") if found else ""
    size = {**UNITS, **BINARY_UNITS}[unit] * float(found[1]) if found else 0.0
    if found is None or not 2**20 <= size <= 2**60:
        message = f"{text!r} is no amount of memory"
        raise ConfigError(message, "--memory", hint="4GiB, 500MB")
    return int(size)
