"""The name of a plugin: one, however it is written."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import PurePath

NO = "no:"
"""``no:NAME`` leaves a plugin out."""

MAX_PLUGINS = 1_000
"""Plugins that a profile, or a command line, may name."""


def normalized_name(name: str) -> str:
    """A plugin's name as it is known everywhere: lower case, with underscores for dashes, dots and
    spaces.

    >>> normalized_name("My-Log"), normalized_name("my.log")
    ('my_log', 'my_log')
    """
    return re.sub(r"[-.\s]+", "_", unicodedata.normalize("NFKC", name).strip()).lower()


def name_of(reference: str) -> str:
    """The name behind a reference: a file's stem, a dotted module's last part (for one called
    ``plugin`` that of its package), or the name itself.

    >>> name_of("./ideas/My-Idea.py"), name_of("my_package.plugin"), name_of("my-idea")
    ('my_idea', 'my_package', 'my_idea')
    """
    reference = reference.strip()
    if is_file_reference(reference):
        return normalized_name(PurePath(reference).stem)
    return normalized_name(short_name(reference))


def short_name(module: str) -> str:
    """The name of a plugin that is a module: its last part; for one called ``plugin``, that of its
    package.

    >>> short_name("my_package.plugin"), short_name("ideas.logger")
    ('my_package', 'logger')
    """
    parts = module.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "plugin" else parts[-1]


def is_file_reference(reference: str) -> bool:
    """Whether this is the path of a file, not the name of a plugin or module."""
    return reference.endswith(".py") or "/" in reference or os.sep in reference
