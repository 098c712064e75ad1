"""Shows on a terminal how far the building of token stores is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from apt_core.providers.dataset import DatasetProvider


@dataclass
class SourceBuild:
    """The build of a source: nothing of it is ``built`` where the store is there already."""

    name: str
    built: bool = False
    seconds: float = 0.0


class BuildProgress:
    """What :func:`~apt_core.data.loading.load_data` tells of the sources that it builds; drawn
    while the context lasts on a ``console`` that is a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.builds: dict[str, SourceBuild] = {}
        text = "{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"
        self._drawn = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn(text, markup=False),
            TextColumn("{task.fields[rate]:.1f} MB/s", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> BuildProgress:
        self._drawn.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._drawn.stop()

    def of_source(self, name: str, source: DatasetProvider) -> Callable[[int, int, int], None]:
        """What is to be called with the documents, tokens and bytes of text so far."""
        build = self.builds[name] = SourceBuild(name)
        began = time.monotonic()
        task = None

        def update(documents: int, tokens: int, num_bytes: int) -> None:
            nonlocal task
            build.built, build.seconds = True, time.monotonic() - began
            share = source.share_read()
            if task is None:
                label = name or "data"
                task = self._drawn.add_task(label, total=None, documents=0, tokens=0, rate=0.0)
            self._drawn.update(
                task,
                total=None if share is None else 1.0,
                completed=share or 0.0,
                documents=documents,
                tokens=tokens,
                rate=num_bytes / 1e6 / max(build.seconds, 1e-9),
            )

        return update
