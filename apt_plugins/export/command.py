"""``apt-export``: takes the model of a run to other programs."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from apt_core import ConfigError, Problem
from apt_core.cli.output import Json, complain, make_console, say
from apt_core.cli.run_command import run_command
from apt_core.cli.run_options import Debug, Plugins, Run, Set, Step, Weights, opened
from apt_core.errors import Interrupted
from apt_core.parallel.signals import handling
from apt_core.printable import printable
from apt_core.profile_paths import user_path

PLUGIN = "export"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def stopped(number: int, frame: FrameType | None) -> None:
    """Let a signal end the command as Ctrl-C does, which leaves nothing behind."""
    raise Interrupted(number)


@app.command()
def export(
    run: Run = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="The exporter: hf (a folder of Hugging Face), or another of those that apt-hooks "
            "providers exporter lists.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The folder to write. Default: exports/NAME in the run's folder."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-O", metavar="KEY=VALUE", help="A setting of the exporter; repeatable."
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A part of the model to leave out, since the target cannot have it; repeatable. "
            "What that costs on held-out text is measured.",
        ),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="What the target's chat template makes of a conversation: template (the "
            "tokenizer's), dialogue, pairs or text, as of apt-chat. auto: what the model was "
            "trained on.",
        ),
    ] = "auto",
    unproven: Annotated[
        bool,
        typer.Option("--unproven", help="Export also where the target's program is not installed."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export, and export unfinished runs.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Upload the export to the Hugging Face Hub, as USER/NAME. A new repository is "
            "private; the credentials are those of huggingface_hub.",
            show_default=False,
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: a new repository is public.")
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Repeat the proof of an export, in place of making one. RUN is the run that its "
            "certificate names.",
            show_default=False,
        ),
    ] = None,
    step: Step = None,
    weights: Weights = "last",
    device: Annotated[
        str, typer.Option(help="Where APT computes for the proof: auto, cpu, cuda.")
    ] = "cpu",
    plugin: Plugins = None,
    set_: Set = None,
    json: Annotated[bool, typer.Option("--json", help="Print the certificate.")] = False,
    debug: Debug = False,
) -> Json | None:
    """Export the model of a run, with a certificate that it computes the same there.

    apt-export runs/small --to hf  ·  apt-export --to hf -o small-hf --weights best

    The export is opened by the program that it is for, in a process without APT, and compared with
    the run's model: logits, the stream after each block, greedy texts, the tokenizer. What differs
    by more than the tolerance is not written.
    """
    if verify is not None:
        beside = {
            "--to": to,
            "--output": output,
            "--option": option,
            "--drop": drop,
            "--format": format_ != "auto",
            "--unproven": unproven,
            "--force": force,
            "--push": push,
            "--public": public,
            "--step": step,
            "--weights": weights != "last",
        }
        if given := [name for name, value in beside.items() if value]:
            message = "does not go with --verify: the certificate says it"
            raise ConfigError(Problem(message, name) for name in given)
        with handling((signal.SIGTERM, signal.SIGHUP), stopped):
            return _verified(
                user_path(verify), run, device, plugin, set_, as_json=json, debug=debug
            )
    problems = []
    if to is None:
        problems.append(Problem("names no target", "--to", hint="such as --to hf"))
    if push is not None and unproven:
        problems.append(Problem("does not go with --unproven: what leaves is proven", "--push"))
    if public and push is None:
        problems.append(Problem("goes with --push", "--public"))
    options: dict[str, Any] = {}
    try:
        options = parsed_options(option or ())
        if push is not None:
            from apt_plugins.export.hub import check_push

            check_push(push)
    except ConfigError as error:
        problems += error.problems
    if to is None or problems:
        raise ConfigError(problems)
    with (
        handling((signal.SIGTERM, signal.SIGHUP), stopped),
        opened(
            run,
            step=step,
            weights=weights,
            device=device,
            plugins=[PLUGIN, *(plugin or ())],
            assignments=set_,
            debug=debug,
        ) as session,
    ):
        from apt_plugins.export import exporting
        from apt_plugins.export.held_out import HeldOutText
        from apt_plugins.export.origin import check_finished, folder_of, origin_of
        from apt_plugins.export.staging import EXPORTS

        if step is None and weights == "last" and not force:
            check_finished(session)
        place = folder_of(session) / EXPORTS / to if output is None else user_path(output)
        order = exporting.Order(
            to,
            place,
            origin_of(session, place, weights, plugin or ()),
            options,
            drop or (),
            format_,
            unproven=unproven,
            force=force,
        )
        with progress() as tell:
            certificate = exporting.export(
                session, order, text=lambda: HeldOutText(session), tell=tell
            )
        complain(certificate.summary())
        if push is not None:
            from apt_plugins.export.hub import push as upload

            message = f"{session.config.name}, step {session.position.step}, by apt-export"
            complain(f"pushed: {upload(place, push, public=public, message=message)}")
    if json:
        return Json(certificate.model_dump(exclude_none=True))
    say(place)
    return None


def _verified(
    folder: Path,
    run: str | None,
    device: str,
    plugins: Sequence[str] | None,
    assignments: Sequence[str] | None,
    *,
    as_json: bool,
    debug: bool,
) -> Json | None:
    """Repeat the proof of the export in ``folder``."""
    from apt_plugins.export import verifying
    from apt_plugins.export.certificate import read_certificate

    recorded = read_certificate(folder)
    verifying.check_plugins(recorded, plugins or ())
    checkpoint, weights = verifying.run_behind(folder, recorded, run)
    with opened(
        str(checkpoint),
        step=recorded.origin.step,
        weights=weights,
        device=device,
        plugins=[PLUGIN, *(plugins or ())],
        assignments=assignments,
        debug=debug,
    ) as session:
        from apt_plugins.export.held_out import HeldOutText

        with progress() as tell:
            certificate = verifying.verify(
                session, folder, text=lambda: HeldOutText(session), tell=tell
            )
    complain(certificate.summary())
    if as_json:
        return Json(certificate.model_dump(exclude_none=True))
    say(folder)
    return None


def parsed_options(options: Sequence[str]) -> dict[str, Any]:
    """The exporter's settings of ``KEY=VALUE``, values as in YAML. Raises ConfigError."""
    from apt_core.config import parse_override

    found = {}
    for each in options:
        if "=" not in each:
            raise ConfigError(f"{each!r} is no KEY=VALUE", "--option")
        override = parse_override(each, "--option")
        found[override.key] = override.value
    return found


EVERY = 15.0
"""Seconds between two lines of progress where there is no terminal."""


@contextmanager
def progress(clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[str], None]]:
    """What to tell what is being done; shown on a terminal, and elsewhere a line now and then."""
    console = make_console(sys.stderr)
    if console.is_terminal:
        with console.status("opening") as status:
            yield lambda what: status.update(printable(what).replace("[", "\\["))
        return
    said = clock()

    def tell(what: str) -> None:
        nonlocal said
        if clock() - said >= EVERY:
            said = clock()
            complain(what)

    yield tell


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-export``."""
    sys.exit(run_command(app, "apt-export", args))
