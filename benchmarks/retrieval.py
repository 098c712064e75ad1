"""What a search among 100,000 passages takes, and an update of their index.

The passages are sentences of a few random words. A query is the beginning of one of them, another
one in each round.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from pathlib import Path
from time import perf_counter

from _harness import Report, interleave, run
from apt_plugins.retriever.index import Index
from apt_plugins.retriever.search import BM25Search, ExactSearch, FaissSearch, FusedSearch, Search
from apt_plugins.retriever.settings import RetrieverSettings

FILES, LINES, WORDS = 1010, 100, 12
QUERY_WORDS, FOUND = 8, 4
SEARCHES: tuple[type[Search], ...] = (ExactSearch, BM25Search, FusedSearch, FaissSearch)


def write(folder: Path, files: int) -> list[str]:
    """Write ``files`` of LINES paragraphs; the queries."""
    random_ = random.Random(0)
    letters = "abcdefghijklmnoprstuvwz"
    words = ["".join(random_.choices(letters, k=random_.randint(3, 9))) for _ in range(30_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    queries = []
    for number in range(files):
        lines = [" ".join(random_.choices(words, weights, k=WORDS)) for _ in range(LINES)]
        (folder / f"{number:04d}.txt").write_text("\n\n".join(lines), encoding="utf-8")
        queries.append(" ".join(lines[number % LINES].split()[:QUERY_WORDS]))
    return queries


def seconds(settings: RetrieverSettings) -> tuple[Index, float]:
    """The index of the folder with its vectors, and how long it took."""
    started = perf_counter()
    index = Index(settings)
    index.vectors(ExactSearch(settings).embedder)
    return index, perf_counter() - started


def measure(report: Report, quick: bool) -> None:
    report.machine["threads"] = os.environ.get("OMP_NUM_THREADS", "all")
    files, rounds = (50, 5) if quick else (FILES, 60)
    with tempfile.TemporaryDirectory() as place:
        os.environ["APT_CACHE"] = place
        folder = Path(place) / "text"
        folder.mkdir()
        queries = itertools.cycle(write(folder, files))
        # A passage for each paragraph.
        settings = RetrieverSettings(folder=str(folder), chunk_chars=100, overlap_chars=0)
        index, built = seconds(settings)
        (folder / "0000.txt").write_text("Another text.", encoding="utf-8")
        index, updated = seconds(settings)
        _, opened = seconds(settings)
        sides = {}
        for kind in SEARCHES:
            search = kind(settings)
            search.attach(index)
            sides[search.get_name()] = lambda search=search: search.search(next(queries), FOUND)
        times = interleave(sides, baseline="exact", rounds=rounds, calls=1)
        report.add("passages", len(index.passages))
        for name in sides:
            report.add(f"{name}_ms", round(times.median(name) / 1e6, 2))
        report.ratio("fused_over_exact", times, "fused", over="exact")
        report.noise("exact_over_exact", times)
        report.add("build_s", round(built, 1))
        report.add("update_s", round(updated, 2))
        report.add("open_s", round(opened, 2))
    report.note(
        f"The median over {rounds} queries of {QUERY_WORDS} words, each another one, of the time "
        f"to find the best {FOUND} passages of some {WORDS} words, by hashed vectors of 384 "
        "numbers; embedding the query is part of it. `build_s` is the time to read, cut and embed "
        "all files, `update_s` that after one of them has changed, `open_s` that where none has: "
        "all checksums are verified."
    )


if __name__ == "__main__":
    run(
        "What does a search among 100,000 passages take?",
        measure,
        packages=["numpy", "bm25s", "faiss-cpu"],
    )
