"""A data source: functions of the standard library as prompts, with what their docstrings say.

apt-train -p tiny_debug --plugin examples/docstrings.py --data.loader docstrings
"""

from __future__ import annotations

import importlib
import inspect

from apt_core import PluginInfo, ProviderSpec, hookimpl
from apt_core.providers import DatasetProvider

PLUGIN = PluginInfo(summary="docstrings of the standard library", version="1.0.0")
MODULES = ("bisect", "calendar", "collections", "fnmatch", "heapq", "os.path", "shutil", "textwrap")


class Docstrings(DatasetProvider):
    """``dataset:docstrings``: a prompt with its response for each function, in one order always."""

    def documents(self):
        for name in MODULES:
            module = importlib.import_module(name)
            for function, value in inspect.getmembers(module, inspect.isroutine):
                told = inspect.getdoc(value)
                if told and not function.startswith("_"):
                    first = told.partition("\n\n")[0]
                    yield {"prompt": f"{name}.{function}: ", "response": " ".join(first.split())}

    def describe(self):
        return f"docstrings of {len(MODULES)} modules"


@hookimpl
def apt_register_providers():
    return [
        ProviderSpec("dataset", "docstrings", Docstrings, version="1.0.0", summary=PLUGIN.summary)
    ]
