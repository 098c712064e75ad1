"""``python -m apt_core VERB``: every command, those of plugins too."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress

from apt_core.cli.verbs import PREFIX, VERBS
from apt_core.errors import ConfigError, did_you_mean


def main() -> None:
    """Run the verb; a plugin's command (``apt-tune``) is the verb without its prefix."""
    verb, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    verb = verb.removeprefix(PREFIX)
    if verb in VERBS:
        module, _, function = VERBS[verb].partition(":")
        getattr(importlib.import_module(module), function)(arguments)
        return

    from apt_core.cli.run_command import end_of

    sys.exit(end_of(lambda: _other(verb, arguments), "python -m apt_core", arguments))


def _other(verb: str, arguments: list[str]) -> int:
    """A plugin's command, or the list of verbs."""
    from apt_core.discovery import COMMAND_GROUP, installed_plugins, load_installed

    commands = {
        name.removeprefix(PREFIX): entry for name, entry in installed_plugins(COMMAND_GROUP).items()
    }
    if verb == "--version":
        from apt_core.cli.run_command import show_versions

        return show_versions()
    if verb in ("-h", "--help"):
        print("usage: python -m apt_core VERB …\n\nverbs:")
        for name in [*VERBS, *commands]:
            print(f"  {name}")
        print("\npython -m apt_core VERB --help says more of each")
        return 0
    if verb not in commands:
        hint = did_you_mean(verb, [*VERBS, *commands]) or "see python -m apt_core --help"
        raise ConfigError(f"there is no verb {verb!r}", hint=hint)
    return int(load_installed(commands[verb])(arguments) or 0)


def _look_here_last() -> None:
    """Move the working directory, which ``python -m`` puts first, to the end of the import path: a
    file in it named like a library is not that library. A checkout is run from where it lies."""
    with suppress(OSError):
        here = os.getcwd()
        inside = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
        if (
            sys.path[:1] == [here]
            and not sys.flags.safe_path
            and not os.path.samefile(here, inside)
        ):
            sys.path.append(sys.path.pop(0))


if __name__ == "__main__":
    _look_here_last()
    main()
