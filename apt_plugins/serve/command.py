"""``apt-serve``: serves the model of a run over HTTP."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from apt_core import ConfigError, Problem
from apt_core.cli.output import say
from apt_core.cli.run_command import run_command
from apt_core.cli.run_options import (
    Compile,
    Debug,
    Device,
    Plugins,
    Run,
    Set,
    Step,
    Weights,
    opened,
)
from apt_plugins.serve.limits import Limits

DEFAULTS = Limits()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    run: Run = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="APT_API_KEY",
            help="The key that requests must have. Other users of this machine see what stands on "
            "a command line: the environment variable is the better place.",
            show_default=False,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name by which clients reach the server (repeatable), beside its address."
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(help="The model's name for clients; default: the profile's."),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="How the model sees a conversation, as for apt-chat: template, dialogue, pairs, "
            "text. auto: what the model was trained on.",
        ),
    ] = "auto",
    max_batch: Annotated[
        int, typer.Option(min=1, help="Answers that are worked on at once.")
    ] = DEFAULTS.max_batch,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Answers that wait; beyond them, clients are told to retry.")
    ] = DEFAULTS.max_queue,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens of an answer.")
    ] = DEFAULTS.max_tokens,
    max_body: Annotated[
        int, typer.Option(min=1024, help="The most bytes of a request.")
    ] = DEFAULTS.max_body,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Connections at once.")
    ] = DEFAULTS.max_connections,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which an answer ends as it is.")
    ] = DEFAULTS.request_timeout,
    read_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which a request has to arrive.")
    ] = DEFAULTS.read_timeout,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that answers have to end at a shutdown.")
    ] = DEFAULTS.shutdown_timeout,
    access_log: Annotated[
        bool, typer.Option(help="Print a line for each request on stderr.")
    ] = True,
    int8: Annotated[
        bool, typer.Option("--int8", help="Round weights to 8 bits where that is faster.")
    ] = False,
    compile_: Compile = False,
    step: Step = None,
    weights: Weights = "last",
    device: Device = "auto",
    plugin: Plugins = None,
    set_: Set = None,
    debug: Debug = False,
) -> int:
    """Serve the model of a run: OpenAI's protocol at /v1, a chat page at /.

    Ctrl-C or SIGTERM end it after the answers that are being made; a second one ends it at once.
    """
    limits = Limits(
        max_batch=max_batch,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_body=max_body,
        max_connections=max_connections,
        request_timeout=request_timeout,
        read_timeout=read_timeout,
        shutdown_timeout=shutdown_timeout,
    )
    try:
        from apt_plugins.serve.http_server import bound_socket, resolved, url_of
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        hint = 'pip install "apt-kernel[serve]"'
        raise ConfigError(f"{error.name} is not installed", hint=hint) from error
    from apt_core.inference.chat import format_called
    from apt_plugins.serve.access import Access, is_loopback
    from apt_plugins.serve.serving import serve_session

    family, address = resolved(host, port)
    problems = []
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        problems.append(Problem("is no text of printable ASCII without spaces", "--api-key"))
    if api_key is None and not is_loopback(address[0]):
        problems.append(
            Problem(
                f"{host} is reached from other machines, so that a key is needed",
                "--host",
                hint="set APT_API_KEY; 127.0.0.1 needs none",
            )
        )
    chosen = None
    try:
        chosen = None if format_ == "auto" else format_called(format_)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    with bound_socket(family, address) as sock:
        access = Access(address[0], host, allow_host or (), api_key)
        with opened(
            run,
            step=step,
            weights=weights,
            device=device,
            plugins=plugin,
            assignments=set_,
            debug=debug,
        ) as session:
            return serve_session(
                session,
                sock,
                access,
                limits,
                chat_format=chosen,
                model=model_name or session.config.name,
                log_access=access_log,
                int8=int8,
                compiled=compile_,
                ready=lambda line: announce(f"{line}: {url_of(sock)}"),
            )


def announce(line: str) -> None:
    """Print what those who wait for the server read, who may have its stdout as a pipe."""
    say(line)
    sys.stdout.flush()


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-serve``."""
    sys.exit(run_command(app, "apt-serve", args))
