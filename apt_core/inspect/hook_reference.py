"""The reference of every hook as Markdown, from the specifications themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

from apt_core.hookspecs import POLICIES
from apt_core.inspect.listing import hook_facts
from apt_core.markers import HookPolicy

HEADER = """# Hooks

Generated from `apt_core/hookspecs.py` by `apt-hooks docs`. An implementation takes the parameters
that it wants, in any order. "Dormant" says whether a hook fires for a plugin that its schedule has
not enabled yet. What an implementation returns is looked at where it is called: anything but what
the hook accepts is a failure of the plugin there, like an exception.
"""


def hook_reference() -> str:
    """One section a hook: signature, behaviour, contract, example."""
    parts = [HEADER]
    for name, policy in POLICIES.items():
        facts = hook_facts(name)
        result = "every result"
        if policy.firstresult:
            result = "the first result that is not None"
        elif policy.chained:
            result = "the last result, each of which is made of the one before"
        limit = policy.failure_limit
        after = "the first failure" if limit == 1 else f"failure {limit}"
        told = [
            f"Called {policy.stage.value}.",
            f"Collects {result}.",
            f"Fires for dormant plugins: {'yes' if policy.dormant else 'no'}.",
            f"Quarantine after {after}.",
            f"Accepts {facts['returns'].replace('``', '`')}.",
            *_background(policy),
            *(f.metadata["told"] for f in fields(policy) if f.metadata and getattr(policy, f.name)),
        ]
        parts.append(
            f"## {name}\n\n`{facts['signature']}`\n\n{' '.join(told)}\n\n"
            f"{_markdown(facts['doc'])}\n"
        )
    return "\n".join(parts)


def _background(policy: HookPolicy) -> Iterator[str]:
    if policy.background:
        names = ", ".join(f"`{name}`" for name in policy.background)
        yield f"It may run in the background (`background=True`), with {names}."


def _markdown(doc: str) -> str:
    text, _, example = doc.partition("Example::")
    text = re.sub(r":(?:class|func):`~?([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    text = text.replace("``", "`").strip()
    code = "\n".join(line.removeprefix("    ") for line in example.strip("\n").splitlines())
    return f"{text}\n\n```python\n{code.strip()}\n```"
