"""The reference of every hook as Markdown, from the specifications themselves."""

from __future__ import annotations

import re

from apt_core.inspect.listing import hook_facts, hook_names
from apt_core.plugin_manager import PluginManager

HEADER = """# Hooks

Generated from `apt_core/hookspecs.py` by `apt-hooks docs`. An implementation takes the parameters
that it wants, in any order. "Dormant" says whether a hook fires for a plugin that its schedule has
not enabled yet. What an implementation returns is looked at where it is called: anything but what
the hook accepts is a failure of the plugin there, like an exception.
"""

POLICY = {
    "alone": "It is called for one plugin at a time: there are no wrappers of it.",
    "changes_weights": "What it returns is part of the training.",
    "judges_input": "A ConfigError is bad input.",
    "fatal_among_processes": "A failure ends a run of several processes.",
    "may_last": "It may take longer than `training.hook_timeout`: that is told, and no failure.",
    "sets_modes": "Modes of modules that it sets are kept.",
}


def hook_reference() -> str:
    """One section a hook: signature, behaviour, contract, example."""
    manager = PluginManager()
    parts = [HEADER]
    for name in hook_names(manager):
        facts = hook_facts(manager, name)
        result = "the first result that is not None" if facts["firstresult"] else "every result"
        limit = facts["failure_limit"]
        after = "the first failure" if limit == 1 else f"failure {limit}"
        told = [
            f"Collects {result}.",
            f"Fires for dormant plugins: {'yes' if facts['dormant'] else 'no'}.",
            f"Quarantine after {after}.",
            f"Accepts {facts['returns'].replace('``', '`')}.",
            *(sentence for flag, sentence in POLICY.items() if facts[flag]),
        ]
        parts.append(
            f"## {name}\n\n`{facts['signature']}`\n\n{' '.join(told)}\n\n"
            f"{_markdown(facts['doc'])}\n"
        )
    return "\n".join(parts)


def _markdown(doc: str) -> str:
    text, _, example = doc.partition("Example::")
    text = re.sub(r":(?:class|func):`~?([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    text = text.replace("``", "`").strip()
    code = "\n".join(line.removeprefix("    ") for line in example.strip("\n").splitlines())
    return f"{text}\n\n```python\n{code.strip()}\n```"
