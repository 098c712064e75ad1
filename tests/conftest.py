"""What holds for every test: property tests draw the same examples in every run."""

from __future__ import annotations

from hypothesis import settings

# Broken on purpose: importing them, as the collector of doctests does, would end pytest.
collect_ignore = ["distributions/data"]

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
