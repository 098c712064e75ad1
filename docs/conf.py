"""How Sphinx builds the documentation; only the version comes from the package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apt_core import __version__

project = "APT"
author = "The APT authors"
copyright = "2026, The APT authors"
version = release = __version__

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"APT {release}"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True
