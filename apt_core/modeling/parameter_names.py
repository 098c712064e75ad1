"""Patterns that choose parameters by their names, and short texts for many names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

from torch import Tensor, nn

_RANGE = re.compile(r"(\d+)-(\d*)")

EVERYTHING = "*"


def named_with_aliases(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parameters of ``model`` by name, and for each of their names, also those of tied weights,
    the one by which they are listed."""
    parameters = dict(model.named_parameters())
    listed = {id(parameter): name for name, parameter in parameters.items()}
    every = model.named_parameters(remove_duplicate=False)
    return parameters, {name: listed[id(parameter)] for name, parameter in every}


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` chooses the parameter ``name``: its words, separated by dots, are
    successive words of the name, wherever they begin. In a word ``*`` stands for any characters and
    ``?`` for one; ``2-5`` are the numbers from 2 to 5, ``2-`` those from 2 on.

    >>> [matches(p, "blocks.3.attention.out") for p in ("attention", "blocks.2-5", "blocks.4-")]
    [True, True, False]
    >>> matches("embed*", "embedding.weight"), matches("attention", "attention_norm.weight")
    (True, False)
    """
    wanted, words = pattern.split("."), name.split(".")
    starts = range(len(words) - len(wanted) + 1)
    return any(all(map(_is_word, wanted, words[start:])) for start in starts)


def _is_word(wanted: str, word: str) -> bool:
    numbers = _RANGE.fullmatch(wanted)
    if numbers is None:
        # A bracket would begin a set of characters, and stands in no name.
        return fnmatchcase(word, wanted.replace("[", "[[]"))
    if not word.isdecimal():
        return False
    first, last = numbers.groups()
    return int(word) >= int(first) and (not last or int(word) <= int(last))


def chosen(pattern: str, aliases: Mapping[str, str]) -> list[str]:
    """The parameters that ``pattern`` chooses among ``aliases``, which map every name to the one by
    which its parameter is listed."""
    return [*dict.fromkeys(name for alias, name in aliases.items() if matches(pattern, alias))]


def words_of(names: Iterable[str]) -> list[str]:
    """Every word of the names, once."""
    return [*dict.fromkeys(word for name in names for word in name.split("."))]


def shortened(names: Collection[str], every: Iterable[str]) -> list[str]:
    """Patterns that choose ``names`` among ``every`` name: a module whose parameters are all among
    them stands for these, and a range for modules that are alike.

    >>> every = [f"blocks.{n}.{part}" for n in range(3) for part in ("a.w", "a.b", "n")]
    >>> shortened(every[3:], ["embed", *every]), shortened([n for n in every if "a" in n], every)
    (['blocks.1-2'], ['blocks.0-2.a'])
    """
    among = set(names)
    paths = [(tuple(name.split(".")), name in among) for name in every]
    return [".".join(path) or EVERYTHING for path in _paths(paths)]


_Path = tuple[str, ...]


def _paths(entries: Sequence[tuple[_Path, bool]]) -> list[_Path]:
    if not any(taken for _, taken in entries):
        return []
    if all(taken for _, taken in entries):
        return [()]
    by_word: dict[str, list[tuple[_Path, bool]]] = {}
    for path, taken in entries:
        by_word.setdefault(path[0], []).append((path[1:], taken))
    found = [(word, _paths(rest)) for word, rest in by_word.items()]
    result: list[_Path] = []
    for _, alike in groupby(enumerate(found), key=_run):
        words = [word for _, (word, _) in alike]
        word = words[0] if len(words) == 1 else f"{words[0]}-{words[-1]}"
        result += [(word, *path) for path in dict(found)[words[0]]]
    return result


def _run(entry: tuple[int, tuple[str, list[_Path]]]) -> tuple[object, ...]:
    """Equal for successive numbers that have the same beneath them, different for all others."""
    place, (word, beneath) = entry
    return (int(word) - place, tuple(beneath)) if word.isdecimal() else (word, place)
