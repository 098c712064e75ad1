"""``apt-import``: makes a run of a folder of Hugging Face."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, cast

import typer

from apt_core import ConfigError, Problem
from apt_core.cli.output import Json, complain, make_console, say
from apt_core.cli.run_command import run_command
from apt_core.cli.run_options import Debug, Plugins

if TYPE_CHECKING:
    from apt_plugins.hf_import.asked import Imported

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("import")
def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A folder with config.json, safetensors and tokenizer.json of a Llama, Mistral or "
            "Qwen3.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the run.")],
    profile: Annotated[
        str,
        typer.Option(
            "--profile",
            "-p",
            help="The data and the training of the run. Without one: defaults. What it says of the "
            "model gives way to the folder's, but for model.dropout.",
        ),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a key of the profile: data.train_path=my.txt, model.max_seq_len=4096.",
        ),
    ] = None,
    plugin: Plugins = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json, or a folder with one, where DIR has none."),
    ] = None,
    to_tva: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", help="Make the attention TVA of this rank, by SVD.", min=1, max=2**24
        ),
    ] = None,
    heal_steps: Annotated[
        int,
        typer.Option(
            help="After --to-tva, train so many steps on the profile's data.", min=0, max=2**40
        ),
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> Json | None:
    """Make a run of a model in the form of Hugging Face.

    apt-train --resume goes on with the run; apt-eval, apt-chat and apt-generate take it as any
    other. Nothing in the folder is run: weights are read from safetensors alone.
    """
    from apt_core.cli.train import collect_overrides
    from apt_core.log import TolerantStream, logging_to
    from apt_core.profile_paths import unrecordable, user_path

    problems = unrecordable({"DIR": str(folder), "--output": str(output), "--profile": profile})
    if heal_steps and to_tva is None:
        problems.append(Problem("--heal-steps goes with --to-tva", hint="apt-train trains a run"))
    if problems:
        raise ConfigError(problems)
    overrides = collect_overrides(set_ or (), ())

    from apt_plugins.hf_import.asked import Asked
    from apt_plugins.hf_import.importing import import_folder

    asked = Asked(
        folder=user_path(folder).absolute(),
        output=user_path(output).absolute(),
        profile=profile,
        plugins=plugin or (),
        overrides=overrides,
        tokenizer=None if tokenizer is None else user_path(tokenizer).absolute(),
        rank=to_tva,
        heal_steps=heal_steps,
    )
    console = make_console(cast(TextIO, TolerantStream(sys.stderr)))
    with logging_to(console, level="DEBUG" if debug else "WARNING"):
        made = import_folder(asked, complain)
    if json:
        from dataclasses import asdict

        from apt_core.json_files import without_nan

        return Json(without_nan({**asdict(made), "run": str(made.run)}))
    _print(made, output)
    return None


def _print(made: Imported, output: Path) -> None:
    from apt_core.code_source import short_path

    run = short_path(str(made.run))
    say(f"{run}: {made.parameters:,} parameters of {made.architecture}")
    say(f"loss on the held-out text of the run: {made.loss:.4f} nats per token")
    if made.to_tva:
        figures = made.to_tva
        line = f"as TVA of rank {figures['rank']}: {figures['loss_after']:.4f}"
        if "loss_healed" in figures:
            line += f", after {figures['heal_steps']:,} steps {figures['loss_healed']:.4f}"
        say(line)
    say(f"go on: apt-train -p {run}/profile.yaml --output {run} --resume")
    say(f"talk: apt-chat {run}")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-import``."""
    sys.exit(run_command(app, "apt-import", args))
