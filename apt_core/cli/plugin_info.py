"""``python -m apt_core plugin-list`` and ``plugin-info``: providers by kind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from apt_core.cli.hooks import AsJson, Debug, listed, show_info, show_providers
from apt_core.cli.output import Json, say
from apt_core.cli.run_command import run_command

list_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
info_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@list_app.command()
def plugin_list(
    kind: Annotated[str, typer.Option(help="Only this kind.")] = "",
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """Every provider, by kind; those of installed plugins that are not active included."""
    listing = listed()
    if json or kind:
        return show_providers(listing, kind, as_json=json)
    for kind_, names in listing.providers.list_providers().items():
        say(f"{kind_}:")
        for name in names:
            default = listing.providers.default(kind_)
            say(f"  - {name}{' (default)' if default and default.name == name else ''}")
    return None


@info_app.command()
def plugin_info(
    kind: Annotated[str, typer.Argument(help="The kind: attention, ffn, …")],
    name: Annotated[str, typer.Argument(help="The provider's name.")],
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """Everything about one provider."""
    return show_info(listed(), kind, name, as_json=json)


def main_list(args: Sequence[str] | None = None) -> None:
    """``python -m apt_core plugin-list``."""
    sys.exit(run_command(list_app, "python -m apt_core plugin-list", args))


def main_info(args: Sequence[str] | None = None) -> None:
    """``python -m apt_core plugin-info``."""
    sys.exit(run_command(info_app, "python -m apt_core plugin-info", args))
