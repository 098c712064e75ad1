"""Where results are kept on disk from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for cached results: ``APT_CACHE``, else ``apt`` in the XDG cache.

    Raises OSError where that is in a home directory and none is known.
    """
    chosen = os.environ.get("APT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which the standard tells to ignore
        base = "~/.cache"
    path = os.path.expanduser(chosen or os.path.join(base, "apt"))
    if path.startswith("~"):
        raise OSError(f"no home directory is known for {path}; APT_CACHE names another place")
    return Path(path)
