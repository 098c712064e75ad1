"""The options of commands that generate text: how a token is chosen, and where the text ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from apt_core.types import GenerationRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULTS = GenerationRequest("", max_new_tokens=256, temperature=0.8, top_k=40)
"""What the commands do without an option."""

FIELDS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop",
    "seed",
)
"""The settings of a request that somebody who uses a command chooses."""

MaxNewTokens = Annotated[int, typer.Option(help="The most tokens of a text.")]
Temperature = Annotated[
    float, typer.Option(help="Divides the logits: 0 takes the most likely token, 1 samples as is.")
]
TopK = Annotated[int, typer.Option(help="Draw among the K most likely tokens; 0: all.")]
TopP = Annotated[
    float, typer.Option(help="Draw among the fewest tokens that have this probability together.")
]
MinP = Annotated[
    float, typer.Option(help="Draw among tokens with this share of the highest probability.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Lowers the logits of tokens that the text holds; 1: not at all.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="The text ends before this string; repeatable. \\n is a new line."),
]
Seed = Annotated[int, typer.Option(help="Decides every draw.")]


def stop_strings(given: list[str] | None) -> tuple[str, ...]:
    """The strings of ``--stop``, in which ``\\n`` and ``\\t`` stand for what no shell types easily.

    >>> stop_strings([r"\\n\\n", r"a\\\\n"])
    ('\\n\\n', 'a\\\\n')
    """
    escapes = {"\\\\": "\\", "\\n": "\n", "\\t": "\t"}
    found = []
    for text in given or ():
        parts, at = [], 0
        while at < len(text):
            pair = text[at : at + 2]
            parts.append(escapes.get(pair, text[at]))
            at += 2 if pair in escapes else 1
        found.append("".join(parts))
    return tuple(found)


def check_settings(request: GenerationRequest, names: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError with every problem of a request, each under its name among ``names``, by
    default that of its option."""
    from apt_core.errors import ConfigError, Problem
    from apt_core.generation_requests import check_request

    try:
        check_request(request)
    except ConfigError as error:
        problems = []
        for problem in error.problems:
            option = "--" + problem.key.replace("_", "-")
            key = option if names is None else names.get(problem.key, problem.key)
            problems.append(Problem(problem.message, key, problem.where, problem.hint))
        raise ConfigError(problems) from None


def settings_of(request: GenerationRequest) -> dict[str, Any]:
    """The chosen settings of a request, as JSON has them."""
    found = {name: getattr(request, name) for name in FIELDS}
    return {**found, "stop": list(request.stop)}
