"""What holds for every test: property tests draw the same examples in every run, and signals are
heard as in a terminal."""

from __future__ import annotations

import signal

from hypothesis import settings

# Broken on purpose: importing them, as the collector of doctests does, would end pytest.
collect_ignore = ["distributions/data"]

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

# A job in the background of a shell ignores SIGINT, one under nohup SIGHUP, and so would its runs.
for number, default in [
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
]:
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)
