"""``apt-chat``: talks with the model of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

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
from apt_core.cli.sampling_options import (
    DEFAULTS,
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    check_settings,
    stop_strings,
)
from apt_core.profile_paths import user_path

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def chat(
    run: Run = None,
    system: Annotated[str, typer.Option(help="The system message.", show_default=False)] = "",
    load: Annotated[
        Path | None, typer.Option(help="Go on with a conversation that /save has kept.")
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="How the model sees the conversation: template (the tokenizer's), dialogue (lines "
            "of User: and Assistant:), pairs (the last message alone), text (which goes on). "
            "auto: what the model was trained on.",
        ),
    ] = "auto",
    max_new_tokens: MaxNewTokens = DEFAULTS.max_new_tokens,
    temperature: Temperature = DEFAULTS.temperature,
    top_k: TopK = DEFAULTS.top_k,
    top_p: TopP = DEFAULTS.top_p,
    min_p: MinP = DEFAULTS.min_p,
    repetition_penalty: RepetitionPenalty = DEFAULTS.repetition_penalty,
    stop: Stop = None,
    seed: Seed = DEFAULTS.seed,
    compile_: Compile = False,
    step: Step = None,
    weights: Weights = "last",
    device: Device = "auto",
    plugin: Plugins = None,
    set_: Set = None,
    debug: Debug = False,
) -> int:
    """Talk with the model of a run.

    /help lists the commands of the conversation. Ctrl-C stops an answer, Ctrl-D ends. Input that is
    no terminal is taken line by line; answers alone go to stdout, everything else to stderr.
    """
    request = replace(
        DEFAULTS,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop_strings(stop),
        seed=seed,
    )
    check_settings(request)
    from apt_core.cli.chat_session import Chat
    from apt_core.inference import Engine
    from apt_core.inference.chat import Conversation, format_called, format_of

    chosen = None if format_ == "auto" else format_called(format_)
    conversation = Conversation() if load is None else Conversation.load(user_path(load))
    conversation.system = system or conversation.system
    with opened(
        run,
        step=step,
        weights=weights,
        device=device,
        plugins=plugin,
        assignments=set_,
        debug=debug,
    ) as session:
        notice = ""
        if chosen is None:
            chosen = format_of(session)
            notice = chosen.notice
        engine = Engine(session, max_batch=1, compiled=compile_)
        Chat(engine, request, chosen, conversation).run(notice)
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-chat``."""
    sys.exit(run_command(app, "apt-chat", args))
