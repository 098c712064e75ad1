"""What a run was trained on, as its folder says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_core.json_files import read_json
from apt_core.providers.documents import FORMS
from apt_core.runs.finding import run_of


def data_row(checkpoint: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the ``manifest`` of a checkpoint, or that of its run, records of the data; empty where
    neither can be read."""
    for found in (manifest, checkpoint, run_of(checkpoint)):
        if isinstance(found, Path):
            try:
                found = read_json(found / "manifest.json")
            except (OSError, ValueError):
                continue
        data = found.get("data") if isinstance(found, Mapping) else None
        if isinstance(data, dict):
            return data
    return {}


def forms_of(data: Mapping[str, Any]) -> Counter[str]:
    """How many documents of each form (``text``, ``pair``, ``conversation``) a row of data counts,
    those of all sources of a mixture together. Empty where it does not say."""
    sources = data.get("sources")
    found: Counter[str] = Counter()
    for row in sources if isinstance(sources, list) else [data]:
        counts = row.get("counts") if isinstance(row, dict) else None
        if not isinstance(counts, dict):
            continue
        for form in FORMS:
            number = counts.get(f"{form}s")
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                found[form] += number
    return found
