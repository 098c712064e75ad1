"""What a tracker keeps of a run: in the run's folder, where every resume of the run finds it."""

from __future__ import annotations

import json
from pathlib import Path

from apt_core.files import write_atomically
from apt_core.json_files import read_json

FOLDER = "tracking"


class Kept:
    """Texts by name that the tracker ``plugin`` keeps of the run in ``folder``, in a file of its
    own: trackers run at the same time.

    They are not in checkpoints: a run that was killed before its first one goes on in its folder,
    and one that begins in another folder from its checkpoint is another run.
    """

    def __init__(self, folder: Path, plugin: str) -> None:
        self._path = folder / FOLDER / f"{plugin}.json"

    def get(self, name: str) -> str:
        """The text; empty where there is none."""
        return self._all().get(name, "")

    def put(self, **texts: str) -> None:
        """Keep these texts too. Raises OSError."""
        self._path.parent.mkdir(exist_ok=True)
        write_atomically(self._path, json.dumps(self._all() | texts, indent=1) + "\n")

    def _all(self) -> dict[str, str]:
        try:
            found = read_json(self._path)
        except (OSError, ValueError):
            return {}
        known = found if isinstance(found, dict) else {}
        return {name: text for name, text in known.items() if isinstance(text, str)}
