"""A tracker: every figure of a run as a row of a SQLite database, written beside the run.

apt-train -p tiny_debug --plugin examples/sqlite_tracker.py
sqlite3 metrics.db "SELECT step, value FROM metrics WHERE name = 'val_loss'"
"""

from __future__ import annotations

import sqlite3
from contextlib import closing

from pydantic import Field

from apt_core import PluginInfo, SectionSpec, hookimpl
from apt_core.config import Section

PLUGIN = PluginInfo(summary="metrics in a SQLite database", version="1.0.0", observer=True)


class Settings(Section):
    path: str = Field(default="metrics.db", description="The database; runs may share one.")


class Plugin:
    @hookimpl
    def apt_register_config(self):
        return [SectionSpec("sqlite_tracker", Settings)]

    @hookimpl
    def apt_configure(self, config):
        self.path = config.section("sqlite_tracker").path

    @hookimpl
    def on_training_start(self, trainer):
        self.run = str(trainer.output_dir)
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS metrics (run, step, name, value)")
            # A resume takes the steps after its checkpoint again.
            database.execute(
                "DELETE FROM metrics WHERE run = ? AND step > ?", (self.run, trainer.step)
            )

    @hookimpl(background=True)
    def on_metrics(self, metrics, step):
        rows = [(self.run, step, name, value) for name, value in metrics.items()]
        with closing(sqlite3.connect(self.path)) as database, database:
            database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", rows)
