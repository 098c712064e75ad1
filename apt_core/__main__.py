"""``python -m apt_core VERB``: every command, those of plugins too."""

from __future__ import annotations

import importlib
import sys

from apt_core.errors import AptError, did_you_mean

VERBS = {
    "train": "apt_core.cli.train:main",
    "hooks": "apt_core.cli.hooks:main",
    "plugin-list": "apt_core.cli.plugin_info:main_list",
    "plugin-info": "apt_core.cli.plugin_info:main_info",
}
PREFIX = "apt-"


def main() -> None:
    """Run the verb; a plugin's command (``apt-tune``) is the verb without its prefix."""
    from apt_core.discovery import COMMAND_GROUP, installed_plugins, load_installed

    verb, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    commands = {
        name.removeprefix(PREFIX): entry for name, entry in installed_plugins(COMMAND_GROUP).items()
    }
    if verb in ("-h", "--help"):
        print("usage: python -m apt_core VERB …\n\nverbs:")
        for name in [*VERBS, *commands]:
            print(f"  {name}")
        print("\npython -m apt_core VERB --help says more of each")
        return
    verb = verb.removeprefix(PREFIX)
    if verb in VERBS:
        module, _, function = VERBS[verb].partition(":")
        getattr(importlib.import_module(module), function)(arguments)
    elif verb in commands:
        try:
            command = load_installed(commands[verb])
        except AptError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        command(arguments)
    else:
        hint = did_you_mean(verb, [*VERBS, *commands]) or "see python -m apt_core --help"
        print(f"error: there is no verb {verb!r} ({hint})", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
