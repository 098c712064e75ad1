"""For plugin authors: a recorder, a tiny training run, and checks that a plugin keeps its promises.

``pytest_plugins = ["apt_core.testing.fixtures"]`` in a ``conftest.py`` adds the fixtures. torch is
imported when something is run, not by importing this package.
"""

from apt_core.testing.check import Finding, check_plugin
from apt_core.testing.recorder import Recorder
from apt_core.testing.tiny import TINY_PROFILE, TinyRun, tiny_run, tiny_session

__all__ = [
    "TINY_PROFILE",
    "Finding",
    "Recorder",
    "TinyRun",
    "check_plugin",
    "tiny_run",
    "tiny_session",
]
