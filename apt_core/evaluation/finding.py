"""Finds tasks by what they are called: a file, or a provider of the kind ``task``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from apt_core.errors import ConfigError, Problem, ProviderError
from apt_core.evaluation.tasks.file import read_task
from apt_core.profile_paths import user_path
from apt_core.providers.task import TaskProvider
from apt_core.registry import Registry
from apt_core.task_names import is_task_file


class Registering(Protocol):
    """What has the providers: a kernel, or a session."""

    @property
    def registry(self) -> Registry: ...


def find_tasks(registering: Registering, names: Sequence[str], key: str) -> dict[str, TaskProvider]:
    """The tasks by their names, each once; that of a file is the file's, without its ending.

    Raises ConfigError with the problems of all of them, by the ``key`` that names them: of unknown
    names and of files; ProviderError for a provider that is none.
    """
    found: dict[str, TaskProvider] = {}
    problems: list[Problem] = []
    for name in dict.fromkeys(names):
        try:
            short, task = _task(registering.registry, name, key)
        except ConfigError as error:
            problems += error.problems
            continue
        if short in found:
            problems.append(Problem(f"two tasks would be called {short!r}", key, hint="rename one"))
        found[short] = task
    if problems:
        raise ConfigError(problems)
    return found


def _task(registry: Registry, name: str, key: str) -> tuple[str, TaskProvider]:
    if is_task_file(name):
        path = user_path(name)
        if not path.exists():
            raise ConfigError(f"there is no file {name}", key)
        return path.stem, read_task(path)
    problem = registry.known.check_name("task", name, key=key)
    if problem is not None:
        if Path(name).suffix or "/" in name:
            raise ConfigError(f"{name} is no task: a task's file ends in .yaml", key)
        raise ConfigError(problem)
    task = registry.get("task", name)
    if not isinstance(task, TaskProvider):
        plugin = registry.spec("task", name).plugin
        raise ProviderError(
            f"task:{name} (plugin {plugin}) is a {type(task).__name__}, not a TaskProvider"
        )
    return name, task
