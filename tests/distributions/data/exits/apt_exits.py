"""A plugin that ends the interpreter when it is imported."""

from __future__ import annotations

import sys

sys.exit(3)
