"""What ``apt-data`` prints for people: windows, figures and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_core.cli.output import print_table, say
from apt_core.errors import ConfigError
from apt_core.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

OPEN, CLOSE = "⟦", "⟧"
"""Stand around what is learned where there are no colours."""

BAR = 40
"""Characters of the longest bar of a histogram."""

REASONS = {
    "empty": "empty",
    "too_short": "too short",
    "too_long": "too long",
    "duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
}
"""Why documents were left out, by their counts in a store's manifest."""


def print_window(console: Console, view: Mapping[str, Any]) -> None:
    """Print a window: a line on it, and its documents, each line of their text after a bar."""
    colours = console.color_system is not None
    head = [view["part"], f"window {view['window']:,} of {view['windows']:,}"]
    if view["source"]:
        head.append(f"of {view['source']}")
    if view["step"] is not None:
        head.append(f"in step {view['step']:,}")
    learned = "green" if colours else f"{OPEN} {CLOSE}"
    console.print(
        f"{' '.join(head)}: {view['positions']:,} positions, {view['targets']:,} learned "
        f"({learned}), {view['padding']:,} padding",
        markup=False,
        style="bold",
    )
    for document in view["documents"]:
        console.print(_document_line(document), markup=False, style="cyan")
        _print_text(console, document["pieces"], colours)
    if view["padding"]:
        name = f" of {view['pad']}" if view["pad"] else ""
        console.print(f"{view['padding']:,} positions{name} fill the rest", markup=False)
    console.print()


def _document_line(document: Mapping[str, Any]) -> str:
    first, position = document["first_token"], document["first_position"]
    last = document["tokens"] - 1
    where = printable(document["where"] or "origin not found", keep="")
    then = "" if document["next_id"] is None else ", and one that is predicted alone"
    return (
        f"document {document['document']:,} ({where}): tokens {first:,} to {first + last:,} of "
        f"{document['document_tokens']:,} at positions {position:,} to {position + last:,}{then}"
    )


def _print_text(console: Console, pieces: Sequence[Mapping[str, Any]], colours: bool) -> None:
    from rich.text import Text

    text = Text()
    within = False
    for piece in pieces:
        mark = piece["learned"]
        if mark != within and not colours:
            text.append(OPEN if mark else CLOSE)
        within = mark
        style = "green" if mark else "dim"
        special = piece.get("special")
        # A Text drops control characters, which are to be seen.
        text.append(
            printable(piece["text"] if special is None else special),
            style if special is None else f"{style} reverse",
        )
    if within and not colours:
        text.append(CLOSE)
    for line in text.split("\n", allow_blank=True):
        console.print(Text("| ").append_text(line))


def print_stores(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what :func:`apt_core.data.inspection.store_rows` tells, and what was built of it."""
    for row in rows:
        name = f"{row['name']}: " if row["name"] else ""
        done = f"built in {row['seconds']:.1f} s" if row["built"] else "was there already"
        say(f"{name}{row['description']}: {done}")
        for part in ("train", "val"):
            of = row[part]
            say(f"  {part}: {of['documents']:,} documents, {of['tokens']:,} tokens")
        say(f"  {_left_out(row['counts'])}")
        if row["kept"]:
            say(f"  {row['folder']}")
        else:
            say("  not kept: the tokenizer has no fingerprint, or the cache cannot be written")


def _left_out(counts: Mapping[str, int]) -> str:
    found = [f"{counts[key]:,} {text}" for key, text in REASONS.items() if counts.get(key)]
    return f"documents left out: {', '.join(found) or 'none'}"


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print what :func:`apt_core.data.inspection.data_figures` tells."""
    say(
        f"tokenizer {figures['tokenizer']} of {figures['vocab_size']:,} ids, windows of "
        f"{figures['seq_len']:,} positions, {figures['windows_per_step']:,} a step"
    )
    run = "without an end"
    if figures["steps"] is not None:
        run = f"of {figures['steps']:,} steps, {figures['epochs']:.4g} epochs"
    say(f"{figures['steps_per_epoch']:,} steps an epoch; a run {run}")
    for source in figures["sources"]:
        say()
        _print_source(source)
    if figures["mixture"] is not None:
        say()
        _print_mixture(figures["mixture"])


def _print_source(source: Mapping[str, Any]) -> None:
    name = f"{source['name']}: " if source["name"] else ""
    say(f"{name}{source['description']}")
    say(f"store: {source['folder']}")
    rows = []
    for part in ("train", "val"):
        of = source[part]
        sizes = [f"{of[key]:,}" for key in ("documents", "tokens")]
        learned = [_share(of["learned"]), f"{of['bytes']:,}"]
        rows.append([part, *sizes, *learned, f"{of['windows']:,}", _share(of["padding"])])
    print_table(
        ("part", "documents", "tokens", "learned", "bytes learned", "windows", "padding"),
        rows,
    )
    say(f"packing: {source['packing']}; held out: {source['held_out']:.2%} of the tokens")
    counts = source["counts"]
    say(_left_out(counts))
    if counts.get("replaced"):
        say(f"bytes that were no UTF-8 and became U+FFFD: {counts['replaced']:,}")
    rate = source["fertility"]
    if rate["tokens"]:
        words = rate["tokens_per_word"]
        by_word = "" if words is None else f", {words:.3g} tokens a word"
        say(
            f"fertility: {rate['bytes_per_token']:.3g} bytes a token{by_word} (of "
            f"{rate['tokens']:,} tokens)"
        )
    _print_lengths(source["train"]["lengths"])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _print_lengths(lengths: Mapping[str, Any]) -> None:
    if lengths["least"] is None:
        return
    say(
        f"tokens a document: {lengths['least']:,} to {lengths['greatest']:,}, "
        f"{lengths['mean']:,.1f} on average"
    )
    most = max(count for _, _, count in lengths["histogram"])
    print_table(
        ("length", "documents", ""),
        [
            (_bin(first, last), f"{count:,}", "█" * -(-count * BAR // most))
            for first, last, count in lengths["histogram"]
        ],
    )


def _bin(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def _print_mixture(mixture: Mapping[str, Any]) -> None:
    names = list(mixture["steps"][0]["weights"]) if mixture["steps"] else []
    rows = [
        (f"{row['step']:,}", *(_weight_and_epochs(row, name) for name in names))
        for row in mixture["steps"]
    ]
    say("weights of the sources at steps, and the epochs of each before them")
    print_table(("step", *names), rows)
    if mixture["at_end"] is not None:
        told = ", ".join(f"{name} {epochs:.3g}" for name, epochs in mixture["at_end"].items())
        say(f"epochs at the end of the run: {told}")


def _weight_and_epochs(row: Mapping[str, Any], name: str) -> str:
    return f"{row['weights'][name]:.1%} ({row['epochs'][name]:.3g})"


def draw_lengths(figures: Mapping[str, Any], path: Path) -> None:
    """Draw the histograms of lengths into a file, in the format that its suffix says. Raises
    ConfigError where that is not possible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = figures["sources"]
    figure = Figure(figsize=(7, 2.6 * len(sources)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sources), squeeze=False)[:, 0]
    for panel, source in zip(panels, sources, strict=True):
        bins = source["train"]["lengths"]["histogram"]
        edges = [
            *(max(first, 0.5) for first, _, _ in bins),
            *(last + 1 for _, last, _ in bins[-1:]),
        ]
        panel.stairs([count for _, _, count in bins], edges, fill=True)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of a document")
        panel.set_ylabel("documents")
        if source["name"]:
            panel.set_title(source["name"], parse_math=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--plot {path}: {reason}", hint="give a .png, .svg or .pdf file"
        ) from None
