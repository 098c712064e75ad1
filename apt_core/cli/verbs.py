"""The verbs of ``python -m apt_core``, and the commands behind them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

VERBS = {
    "train": "apt_core.cli.train:main",
    "hooks": "apt_core.cli.hooks:main",
    "data": "apt_core.cli.data:main",
    "eval": "apt_core.cli.eval:main",
    "generate": "apt_core.cli.generate:main",
    "chat": "apt_core.cli.chat:main",
    "new": "apt_core.cli.new:main",
    "plugin-list": "apt_core.cli.plugin_info:main_list",
    "plugin-info": "apt_core.cli.plugin_info:main_info",
}
"""The core's verbs with their entry points; those of plugins are in the group ``apt.commands``."""

PREFIX = "apt-"
WITHOUT_COMMAND = ("plugin-list", "plugin-info")
"""Verbs for which nothing is installed that begins with the prefix."""


def every_app(plugins: Mapping[str, str]) -> dict[str, typer.Typer]:
    """The app of each verb, and of each of the ``plugins``' commands by its entry point
    (``module:function``), under the name by which it is called.

    The app of ``main`` is ``app`` of the same module, that of ``main_list`` ``list_app``.
    """
    named = {
        f"python -m apt_core {verb}" if verb in WITHOUT_COMMAND else f"{PREFIX}{verb}": target
        for verb, target in VERBS.items()
    }
    apps = {}
    for name, target in (named | dict(plugins)).items():
        module, _, function = target.partition(":")
        app = f"{function.removeprefix('main').removeprefix('_')}_app".removeprefix("_")
        apps[name] = getattr(importlib.import_module(module), app)
    return apps
