"""What a task is called: a provider's name, or a file."""

from __future__ import annotations

TASK_SUFFIXES = (".yaml", ".yml")


def is_task_file(name: str) -> bool:
    """Whether ``name`` is that of a file with a task, and not of a provider.

    >>> is_task_file("mine/capitals.yaml"), is_task_file("arithmetic")
    (True, False)
    """
    return name.endswith(TASK_SUFFIXES)
