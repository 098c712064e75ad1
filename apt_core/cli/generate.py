"""``apt-generate``: continues prompts with the model of a run."""

from __future__ import annotations

import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

from apt_core.cli.output import KEPT, complain, json_text, output_apart
from apt_core.cli.prompts import Prompt, is_there, read_prompts, split_run
from apt_core.cli.run_command import run_command
from apt_core.cli.run_options import Compile, Debug, Device, Plugins, Set, Step, Weights, opened
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
from apt_core.errors import AptError, ConfigError, Problem
from apt_core.json_files import without_nan
from apt_core.printable import printable
from apt_core.types import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from apt_core.inference import Engine, Ticket

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Made = Callable[[GenerationRequest], GenerationRequest]

BETWEEN = "---\n"
"""Stands between the texts, where there are several."""


class GenerateCommand(TyperCommand):
    """Writes each text when it is made."""

    keeps_apart = True


@app.command(cls=GenerateCommand)
def generate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [PROMPT]...",
            help="A run, and texts to continue; - is all of standard input. The first argument is "
            "the run if there is a file or folder of this name, also below runs/, or if it has a / "
            "and no space in it; else it is a prompt, and the newest run is taken.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, whatever it looks like; repeatable.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file with a prompt in each line; one that ends in .jsonl has objects with "
            "'prompt' or with 'messages'. - is standard input. Repeatable."
        ),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="How the model sees messages, as for apt-chat: template, dialogue, pairs, text. "
            "auto: what the model was trained on.",
        ),
    ] = "auto",
    num_samples: Annotated[
        int,
        typer.Option(
            "--num-samples", "-n", min=1, help="Texts for each prompt, with seeds SEED, SEED + 1, …"
        ),
    ] = 1,
    max_new_tokens: MaxNewTokens = DEFAULTS.max_new_tokens,
    temperature: Temperature = DEFAULTS.temperature,
    top_k: TopK = DEFAULTS.top_k,
    top_p: TopP = DEFAULTS.top_p,
    min_p: MinP = DEFAULTS.min_p,
    repetition_penalty: RepetitionPenalty = DEFAULTS.repetition_penalty,
    stop: Stop = None,
    seed: Seed = DEFAULTS.seed,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: the log-probability of each token, and of the N most likely ones.",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print the text while it is made. Several texts are then made one after the other "
            "rather than together. Default: on a terminal, for a single text.",
            show_default=False,
        ),
    ] = None,
    echo: Annotated[
        bool | None,
        typer.Option(
            "--echo/--no-echo",
            help="Print the prompt before its text. Default: on a terminal.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each text.")
    ] = False,
    compile_: Compile = False,
    step: Step = None,
    weights: Weights = "last",
    device: Device = "auto",
    plugin: Plugins = None,
    set_: Set = None,
    debug: Debug = False,
) -> int:
    """Continue prompts with the model of a run.

    apt-generate "Once upon a time"  ·  apt-generate runs/small -n 3 < prompt.txt

    The texts alone go to stdout, everything else to stderr.
    """
    run, texts = split_run(arguments or ())
    mistakes = (
        (json and bool(stream), "--stream does not go with --json"),
        (json and bool(echo), "--echo does not go with --json, which has the prompts"),
        (logprobs is not None and not json, "--logprobs goes with --json"),
    )
    problems = [Problem(message) for found, message in mistakes if found]
    if run is not None and not is_there(run):
        hint = f"if it is a prompt: --prompt {shlex.quote(run)}"
        problems.append(Problem("there is no such run", key="RUN", where=run, hint=hint))
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
        logprobs=logprobs,
    )
    prompts: list[Prompt] = []
    chosen = None
    if format_ != "auto":
        from apt_core.inference.chat import format_called

        try:
            chosen = format_called(format_)
        except ConfigError as error:
            problems += error.problems
    try:
        check_settings(request)
    except ConfigError as error:
        problems += error.problems
    else:
        try:
            prompts = read_prompts([*texts, *(prompt or ())], file or ())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    with output_apart() as stdout:
        terminal = stdout.isatty() and not json
        echo = terminal if echo is None else echo
        writer = Writer(stdout, json=json, terminal=terminal, echo=echo)
        if stream is None:
            stream = terminal and len(prompts) * num_samples == 1
        with opened(
            run,
            step=step,
            weights=weights,
            device=device,
            plugins=plugin,
            assignments=set_,
            debug=debug,
        ) as session:
            from apt_core.inference import Engine
            from apt_core.inference.chat import format_of, in_format

            chat_format = chosen or format_of(session)
            requests = [
                replace(request, prompt=each, seed=seed + number)
                for each in prompts
                for number in range(num_samples)
            ]
            return write_all(
                Engine(session, compiled=compile_),
                requests,
                lambda asked: in_format(chat_format, asked),
                writer,
                num_samples,
                stream=stream,
                cite=not json,
            )


class Writer:
    """Writes texts to ``stdout``: as they are, a ``terminal`` gets what it shows; or as a line of
    ``json`` each. With ``echo`` prompts that are texts come before theirs."""

    def __init__(self, stdout: TextIO, *, json: bool, terminal: bool, echo: bool) -> None:
        self._stdout, self._json = stdout, json
        self._terminal, self._echo = terminal, echo
        self._texts = 0
        self._end = ""

    def begin(self, request: GenerationRequest) -> None:
        """A text of ``request`` begins."""
        self._write(BETWEEN if self._texts else "")
        self._texts += 1
        if self._echo and isinstance(request.prompt, str):
            self.add(request.prompt)

    def add(self, text: str) -> None:
        """Write a piece of the text."""
        if text:
            self._end = text[-1]
            self._write(printable(text, KEPT) if self._terminal else text)

    def end(self) -> None:
        """The text has ended."""
        self._write("" if self._end == "\n" else "\n")
        self._end = ""

    def write(self, request: GenerationRequest, result: GenerationResult, sample: int) -> None:
        """Write the whole text of ``request``, number ``sample`` of its prompt from 0."""
        if self._json:
            row = result_row(request, result, sample)
            self._write(json_text(without_nan(row), indent=None, stream=self._stdout) + "\n")
            return
        self.begin(request)
        self.add(result.text)
        self.end()

    def _write(self, text: str) -> None:
        self._stdout.write(text)
        self._stdout.flush()


def result_row(request: GenerationRequest, result: GenerationResult, sample: int) -> dict[str, Any]:
    """What ``--json`` prints of a text."""
    prompt: Any = request.prompt
    if not isinstance(prompt, str):
        prompt = [{"role": message.role, "content": message.content} for message in prompt]
    row = asdict(result)
    del row["logprobs"], row["sources"]
    return {
        "prompt": prompt,
        "sample": sample,
        "seed": request.seed,
        **row,
        **({} if result.logprobs is None else {"logprobs": [asdict(t) for t in result.logprobs]}),
        **({"sources": [asdict(source) for source in result.sources]} if result.sources else {}),
    }


def write_all(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    made: Made,
    writer: Writer,
    num_samples: int,
    *,
    stream: bool,
    cite: bool,
) -> int:
    """Write the texts of ``requests`` in their order, and their sources on stderr where these are
    to be cited; returns the exit code. The engine is given what ``made`` makes of a request. A
    signal ends it with what there is by then.

    Raises AptError where the model's logits were not finite.
    """
    from apt_core.parallel.signals import Interrupts

    interrupts = Interrupts()
    count = Count(engine.session.config.model.max_seq_len, cite=cite)
    with interrupts.listening():
        make = streamed if stream else together
        results = make(engine, requests, made, writer, lambda: bool(interrupts))
        for number, result in enumerate(results):
            if result is None:
                continue
            sample = number % num_samples
            if not stream:
                writer.write(requests[number], result, sample)
            count.add(result, number // num_samples + 1 if sample == 0 else None)
    count.tell()
    if count.not_finite and not interrupts:
        raise AptError(
            f"the model's logits were not finite in {count.not_finite} of {len(requests)} texts, "
            "which end there"
        )
    return interrupts.exit_code


def streamed(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    made: Made,
    writer: Writer,
    interrupted: Callable[[], bool],
) -> Iterator[GenerationResult | None]:
    """Write each text while it is made, and yield its result."""
    for request in requests:
        if interrupted():
            return
        writer.begin(request)
        for delta in engine.stream(made(request), interrupted=interrupted):
            writer.add(delta.text)
            if delta.result is not None:
                writer.end()
                yield delta.result


def together(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    made: Made,
    writer: Writer,
    interrupted: Callable[[], bool],
) -> Iterator[GenerationResult | None]:
    """Yield the results in the order of ``requests``, as many of which are worked on at once as the
    engine takes. None stands for a text that was interrupted before it began."""
    waiting = deque(enumerate(requests, 1))
    submitted: deque[Ticket] = deque()
    while waiting or submitted:
        # Somewhat ahead, so that the place of a text that ends is taken at once.
        while waiting and len(submitted) < 4 * engine.max_batch:
            number, request = waiting.popleft()
            try:
                submitted.append(engine.submit(made(request)))
            except ConfigError as error:
                raise ConfigError(str(error), where=f"text {number}") from error
        if interrupted():
            waiting.clear()
            for ticket in submitted:
                ticket.cancel()
        engine.step()
        while submitted and submitted[0].done:
            result = submitted.popleft().result
            begun = result is not None and result.finish_reason != "interrupted"
            yield result if begun or (result and result.token_ids) else None


class Count:
    """What is told beside the texts: how many tokens, how fast, what was left out, and where
    passages come from, which are cited."""

    def __init__(self, max_seq_len: int, *, cite: bool) -> None:
        self._max_seq_len, self._cite = max_seq_len, cite
        self._began = time.monotonic()
        self._tokens = self._full = self._texts = 0
        self.not_finite = 0

    def add(self, result: GenerationResult, prompt: int | None) -> None:
        """Count a text; ``prompt`` is the number of its prompt, None where it was told of."""
        self._texts += 1
        self._tokens += len(result.token_ids)
        self._full += result.finish_reason == "length"
        self.not_finite += result.finish_reason == "not_finite"
        if result.dropped_tokens and prompt is not None:
            complain(
                f"prompt {prompt}: the first {result.dropped_tokens:,} of its "
                f"{result.prompt_tokens:,} tokens are left out, for the context has "
                f"{self._max_seq_len:,}"
            )
        if self._cite and prompt is not None:
            for source in result.sources:
                complain(f"prompt {prompt}: source: {source.path}:{source.first_line}")

    def tell(self) -> None:
        """Print the figures, on a terminal."""
        if not sys.stderr.isatty() or not self._texts:
            return
        seconds = time.monotonic() - self._began
        cut = "cut at --max-new-tokens"
        full = f"; {cut if self._texts == 1 else f'{self._full} {cut}'}" if self._full else ""
        complain(
            f"{self._tokens:,} tokens in {seconds:.1f} s, "
            f"{self._tokens / max(seconds, 1e-9):,.0f} tokens/s{full}"
        )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``apt-generate``."""
    sys.exit(run_command(app, "apt-generate", args))
