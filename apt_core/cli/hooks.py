"""``apt-hooks``: which plugins, hooks and providers there are, and in what order they run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apt_core.cli import completion
from apt_core.cli.explained import show_explained, shown
from apt_core.cli.output import Json, complain, output_apart, print_table, say
from apt_core.cli.run_command import run_command
from apt_core.errors import ConfigError, did_you_mean
from apt_core.hookspecs import POLICIES
from apt_core.inspect.listing import (
    Listing,
    hook_facts,
    implementation_rows,
    plugin_rows,
    provider_rows,
    provider_settings,
    survey,
)

if TYPE_CHECKING:
    pass

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Look at plugins, hooks and providers. Without --profile and --plugin, all that is "
    "installed is listed.",
)

Profile = Annotated[
    str,
    typer.Option(
        "--profile",
        "-p",
        help="List what this profile activates.",
        autocompletion=completion.profiles,
    ),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Activate a plugin, as apt-train does; no:NAME leaves one out.",
        autocompletion=completion.plugins,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


REFERENCES = ("hooks", "providers", "commands")
"""What ``apt-hooks docs`` describes."""


def listed(profile: str = "", plugins: Sequence[str] = ()) -> Listing:
    """The plugins to list. What they print when they are loaded goes to stderr: stdout is for
    the listing."""
    with output_apart():
        return survey(profile, plugins)


@app.command("list")
def list_(
    profile: Profile = "",
    plugin: Plugins = None,
    all_: Annotated[bool, typer.Option("--all", help="Hooks that nobody implements too.")] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """Every implementation of every hook, in the order in which they run."""
    listing = listed(profile, plugin or ())
    rows = implementation_rows(listing)
    if json:
        return Json(rows)
    _warn(listing)
    implemented = {row["hook"] for row in rows}
    shown = [_implementation(row) for row in rows]
    if all_:
        missing = [name for name in POLICIES if name not in implemented]
        shown += [(name, "-", "-", "-", "-") for name in missing]
    columns = ("hook", "position", "plugin", "priority", "location")
    print_table(columns, shown)
    if not rows and not all_:
        say("no plugin implements a hook; --all shows every hook, 'show HOOK' its contract")
    return None


@app.command()
def show(
    hook: Annotated[str, typer.Argument(help="The hook's name.", autocompletion=completion.hooks)],
    profile: Profile = "",
    plugin: Plugins = None,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """The contract of one hook, and who implements it."""
    listing = listed(profile, plugin or ())
    if hook not in POLICIES:
        hint = did_you_mean(hook, POLICIES) or "'apt-hooks list --all' shows every hook"
        raise ConfigError(f"there is no hook {hook!r}", hint=hint)
    facts = hook_facts(hook)
    rows = implementation_rows(listing, hook)
    if json:
        return Json({**facts, "implementations": rows})
    say(f"{facts['signature']}\n\n{facts['doc']}\n")
    print_table(
        ("hook", "position", "plugin", "priority", "location"), [_implementation(r) for r in rows]
    )
    return None


@app.command()
def plugins(
    profile: Profile = "", plugin: Plugins = None, json: AsJson = False, debug: Debug = False
) -> Json | None:
    """Every plugin that is installed or named, and its state."""
    listing = listed(profile, plugin or ())
    rows = plugin_rows(listing)
    if json:
        return Json(rows)
    reasons = {name: record.reason for name, record in listing.records.items()}
    shown = itemgetter("name", "state", "version", "dist", "load_ms")
    print_table(
        ("name", "state", "version", "distribution", "load ms", "summary"),
        [(*shown(row), _about(row, reasons[row["name"]])) for row in rows],
    )
    _warn(listing)
    return None


@app.command()
def providers(
    kind: Annotated[
        str, typer.Argument(help="Only this kind.", autocompletion=completion.kinds)
    ] = "",
    profile: Profile = "",
    plugin: Plugins = None,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """Every provider, those of plugins that are installed and not active included."""
    listing = listed(profile, plugin or ())
    return show_providers(listing, kind, as_json=json)


def show_providers(listing: Listing, kind: str, *, as_json: bool) -> Json | None:
    """Print the providers of one kind, or of all."""
    from apt_core.kinds import KINDS

    if kind and kind not in KINDS:
        hint = did_you_mean(kind, KINDS) or f"kinds are {', '.join(KINDS)}"
        raise ConfigError(f"there is no kind {kind!r}", hint=hint)
    rows = provider_rows(listing, kind or None)
    if as_json:
        return Json(rows)
    default, usable = {True: "default", False: ""}, {True: "yes", False: "no", None: "?"}
    for row in rows:
        row.update(default=default[row["default"]], usable=usable[row["usable"]])
        row["settings"] = " ".join(f"{key}={shown(d)}" for key, d in row["settings"].items())
    columns = (
        "kind",
        "name",
        "default",
        "plugin",
        "version",
        "usable",
        "reason",
        "section",
        "settings",
    )
    print_table(columns, list(map(itemgetter(*columns), rows)))
    _warn(listing)
    return None


@app.command()
def info(
    kind: Annotated[
        str, typer.Argument(help="The kind: attention, ffn, …", autocompletion=completion.kinds)
    ],
    name: Annotated[str, typer.Argument(help="The provider's name.")],
    profile: Profile = "",
    plugin: Plugins = None,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """Everything about one provider."""
    return show_info(listed(profile, plugin or ()), kind, name, as_json=json)


def show_info(listing: Listing, kind: str, name: str, *, as_json: bool) -> Json | None:
    """Print the facts of one provider."""
    facts = listing.providers.get_info(kind, name)
    if as_json:
        return Json(facts)
    for key, value in facts.items():
        if key == "config":
            say(f"config: {value['section'] or '-'}")
            for each in provider_settings(listing.providers.spec(kind, name)):
                option, words = each.path.rpartition(".")[2], each.value.replace("`", "")
                default = "needed" if each.required else f"default {shown(each.default)}"
                say(f"  {option} ({words}; {default}): {each.meaning}")
        else:
            say(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    return None


@app.command()
def enable(
    plugin: Annotated[
        str,
        typer.Argument(
            help="The plugin: a name, a module or a .py file.", autocompletion=completion.plugins
        ),
    ],
    profile: Annotated[
        Path,
        typer.Option(
            "--profile", "-p", help="The file to edit.", autocompletion=completion.profiles
        ),
    ],
    debug: Debug = False,
) -> None:
    """Add a plugin to a profile's 'plugins:' list; everything else in the file stays."""
    _edit(profile, plugin, present=True)


@app.command()
def disable(
    plugin: Annotated[str, typer.Argument(help="The plugin.", autocompletion=completion.plugins)],
    profile: Annotated[
        Path,
        typer.Option(
            "--profile", "-p", help="The file to edit.", autocompletion=completion.profiles
        ),
    ],
    debug: Debug = False,
) -> None:
    """Remove a plugin from a profile's 'plugins:' list; everything else in the file stays."""
    _edit(profile, plugin, present=False)


def _edit(profile: Path, plugin: str, *, present: bool) -> None:
    from apt_core.config.plugin_list import edit_plugin_list, listed_plugins
    from apt_core.discovery import installed_plugins, plugin_name

    installed = installed_plugins()

    def name_of(reference: str) -> str:
        return plugin_name(reference, installed)

    if edit_plugin_list(profile, plugin, present=present, name_of=name_of):
        say(f"{plugin} {'enabled' if present else 'disabled'} in {profile}")
        return
    listed = listed_plugins(profile)
    if present:
        written = next(other for other in listed if name_of(other) == name_of(plugin))
        known_as = "" if written == plugin else f", as {written}"
        say(f"{plugin} is enabled already in {profile}{known_as}")
    else:
        hint = did_you_mean(plugin, listed)
        say(f"{plugin} is not listed in {profile}{f' ({hint})' if hint else ''}")


@app.command()
def check(
    plugin: Annotated[
        str,
        typer.Argument(
            help="The plugin: a name, a module or a .py file; or 'core', or a provider of it.",
            autocompletion=completion.plugins,
        ),
    ],
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            "-p",
            help="Check with this profile's settings.",
            autocompletion=completion.profiles,
        ),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Check with another value of a key: my_plugin.window=4.",
            autocompletion=completion.assignments,
        ),
    ] = None,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, max=2, help="1 leaves out runs of two processes.")
    ] = 2,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | int:
    """Does a plugin keep its promises? Loads it, checks its providers and trains a few steps."""
    from apt_core.config import parse_override
    from apt_core.testing import check_plugin

    overrides = [parse_override(text, "--set") for text in set_ or ()]
    with output_apart():
        findings = check_plugin(
            plugin, profile=profile or None, overrides=overrides, processes=nproc
        )
    rows = [
        {"check": f.check, "result": f.result, "ok": f.ok, "detail": f.detail} for f in findings
    ]
    code = 0 if all(finding.ok for finding in findings) else 1
    if json:
        return Json(rows, code)
    print_table(("result", "check", "detail"), [(f.result, f.check, f.detail) for f in findings])
    return code


@app.command()
def explain(
    key: Annotated[
        str,
        typer.Argument(
            help="A key or a section: training.learning_rate.", autocompletion=completion.keys
        ),
    ],
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            "-p",
            help="Show the key's value in this profile, and why.",
            autocompletion=completion.profiles,
        ),
    ] = "",
    plugin: Plugins = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another value of a key, on top of it.",
            autocompletion=completion.assignments,
        ),
    ] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | None:
    """What a key of the profile means, who reads it, its value and what schedules do to it."""
    from apt_core.cli.train import collect_overrides

    overrides = collect_overrides(set_ or (), ())
    return show_explained(key, profile, plugin or (), overrides, as_json=json)


@app.command()
def doctor(
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            "-p",
            help="Examine what this profile needs.",
            autocompletion=completion.profiles,
        ),
    ] = "",
    plugin: Plugins = None,
    imports: Annotated[
        bool,
        typer.Option(
            "--import", help="Import torch and the optional libraries too, which takes a while."
        ),
    ] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> Json | int:
    """Does APT work here? What is broken, what works in another way, and how to mend each."""
    from apt_core.inspect.doctor import BROKEN, OK, examine

    with output_apart():
        checks = examine(profile, plugin or (), imports=imports)
    code = int(any(check.state == BROKEN for check in checks))
    if json:
        return Json({"ok": not code, "checks": [check.row() for check in checks]}, code)
    print_table(("check", "state", "found"), [(c.name, c.state, c.detail) for c in checks])
    wanting = [check for check in checks if check.state != OK and check.remedy]
    if wanting:
        say("\nto mend:")
    for check in wanting:
        say(f"  {check.name}: {check.remedy}")
    broken = sum(check.state == BROKEN for check in checks)
    say(f"\n{broken} broken" if broken else "\nnothing is broken")
    return code


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def trace(
    context: typer.Context,
) -> int:
    """Train with timed hooks: apt-hooks trace -- -p tiny_debug --plugin my_plugin.py"""
    from apt_core.cli.train import app as train_app
    from apt_core.inspect.tracing import traced

    arguments = [argument for argument in context.args if argument != "--"]
    with traced() as rows:
        code = run_command(train_app, "apt-hooks trace --", arguments)
    print_table(
        ("hook", "plugin", "calls", "total ms", "mean us", "max us"),
        [(r.hook, r.plugin, r.calls, r.total_ms, r.mean_us, r.max_us) for r in rows()],
    )
    return code


@app.command()
def schema(
    profile: Profile = "",
    plugin: Plugins = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables of keys for people instead.")
    ] = False,
    debug: Debug = False,
) -> Json | None:
    """The JSON Schema of profiles, with the sections of plugins, for editors."""
    from apt_core.config import json_schema, profile_reference

    sections = listed(profile, plugin or ()).sections
    if markdown:
        say(profile_reference(sections), end="")
        return None
    with output_apart():
        return Json(json_schema(sections))


@app.command()
def docs(
    page: Annotated[
        str,
        typer.Argument(
            help="hooks, providers or commands; 'schema --markdown' has the keys of profiles."
        ),
    ] = "hooks",
    debug: Debug = False,
) -> None:
    """A reference as Markdown: of every hook, provider or command."""
    say(reference(page), end="")


def reference(page: str) -> str:
    """The Markdown of one reference: the core's part and that of every plugin that is listed.
    Raises ConfigError for a page that there is not."""
    if page not in REFERENCES:
        hint = did_you_mean(page, REFERENCES) or f"one of {', '.join(REFERENCES)}"
        raise ConfigError(f"there is no reference {page!r}", hint=hint)
    if page == "hooks":
        from apt_core.inspect.hook_reference import hook_reference

        return hook_reference()
    if page == "providers":
        from apt_core.inspect.provider_reference import provider_reference

        listing = listed()
        return provider_reference(listing.providers, listing.sections)
    from apt_core.cli.verbs import every_app
    from apt_core.discovery import COMMAND_GROUP, installed_plugins
    from apt_core.inspect.command_reference import command_reference

    plugins = installed_plugins(COMMAND_GROUP)
    with output_apart():
        apps = every_app({name: each.offers[0].value for name, each in plugins.items()})
    return command_reference(apps)


def _implementation(row: dict[str, Any]) -> tuple[object, ...]:
    form = next((f" ({name})" for name in ("wrapper", "background") if row[name]), "")
    plugin = f"{row['plugin']}{form}"
    place = f"{row['file']}:{row['line']}"
    return row["hook"], row["position"], plugin, row["priority"], place


def _about(row: dict[str, Any], reason: str) -> str:
    where = row["failures"][0]["where"] if row["failures"] else ""
    return f"{reason} ({where})" if reason and where else reason or row["summary"]


def _warn(listing: Listing) -> None:
    """Say on stderr what a listing cannot show: what is wrong with plugins that were found."""
    for problem in listing.problems:
        complain(f"warning: {problem}")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-hooks``."""
    sys.exit(run_command(app, "apt-hooks", args))
