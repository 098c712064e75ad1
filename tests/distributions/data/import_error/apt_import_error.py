"""A plugin that needs a package which nobody has."""

from __future__ import annotations

import no_such_package_for_apt  # noqa: F401
