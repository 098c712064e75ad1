"""What text costs until it is a batch, against Hugging Face datasets and PyTorch's DataLoader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from _harness import Report, interleave, run
from apt_core.data.batches import BatchPlan
from apt_core.data.order import Order, StepPlan
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.sources.jsonl import JsonLines
from apt_core.data.store.build import build_store
from apt_core.data.store.parts import TokenPart
from apt_core.data.store.reader import TokenStore
from apt_core.data.tokenizers.bpe import BPETokenizer
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.providers.dataset import DataSection
from apt_core.providers.tokenizer import TokenizerProvider

BATCH, SEQ_LEN = 32, 1024
PROCESSES = 2
LONGEST = 65_536
"""Characters of a document at most."""


def write_corpus(path: Path, size: int) -> list[str]:
    """Documents of about ``size`` bytes in all as JSON lines: Python's library, again and again,
    each time with other lines left out and names of its own. Returns their texts."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    written = turn = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for place in sorted(library.rglob("*.py")):
                lines = place.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
                kept = [line for number, line in enumerate(lines) if not turn or number % 7 != turn]
                text = "".join(kept)[:LONGEST].replace("self", f"self{turn or ''}")
                if text:
                    texts.append(text)
                    written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if written >= size:
                    break
            turn += 1
    return texts


@contextmanager
def own_cache() -> Iterator[str]:
    """A folder in which nothing is kept yet, as the cache of both sides."""
    before = os.environ.get("APT_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["APT_CACHE"] = folder
        try:
            yield folder
        finally:
            os.environ.pop("APT_CACHE")
            if before is not None:
                os.environ["APT_CACHE"] = before


def store_of(path: Path, tokenizer: TokenizerProvider) -> TokenStore:
    section = DataSection(train_path=str(path))
    source = JsonLines(section)
    source.data_section = section
    return build_store(source, tokenizer, section, workers=PROCESSES)


def map_to_disk(path: Path, tokenizer_file: Path) -> int:
    """The same by ``datasets.map``, in its fastest form here: `tokenizers` itself, without masks,
    into 16-bit ids. Returns the number of ids."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        found = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [each.ids for each in found]}

    with own_cache() as folder:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
        ids = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("uint16"))})
        mapped = rows.map(
            encode, batched=True, num_proc=PROCESSES, remove_columns=["text"], features=ids
        )
        mapped.save_to_disk(f"{folder}/saved")
        return sum(len(column) for column in mapped.data.column("input_ids").combine_chunks())


def measure_building(report: Report, quick: bool, folder: Path) -> None:
    path = folder / "corpus.jsonl"
    texts = write_corpus(path, 2_000_000 if quick else 100_000_000)
    tokenizer = BPETokenizer({"vocab_size": 8192})
    began = time.perf_counter()
    tokenizer.train(texts)
    report.add("bpe_training_seconds", round(time.perf_counter() - began, 1))
    report.add("corpus_megabytes", round(path.stat().st_size / 1e6, 1))
    tokenizer.save(folder)
    made: dict[str, int] = {}

    def build() -> None:
        with own_cache(), closing(store_of(path, tokenizer)) as store:
            parts = [store.part(name) for name in ("train", "val")]
            # A store ends each document.
            made["store"] = sum(part.num_tokens - part.num_documents for part in parts)

    def mapped() -> None:
        made["map"] = map_to_disk(path, folder / "tokenizer.json")

    times = interleave(
        {"store": build, "map": mapped}, baseline="map", rounds=2 if quick else 3, calls=1, warmup=0
    )
    if made["store"] != made["map"]:
        raise ValueError(f"the sides made other ids: {made}")
    report.ratio("map_over_store", times, "map", over="store")
    report.noise("map_over_map", times)
    report.add(
        "text_to_store_mb_per_s", round(path.stat().st_size * 1e3 / times.median("store"), 1)
    )


def plan_of(part: TokenPart) -> BatchPlan:
    windows = ConcatWindows(part, SEQ_LEN)
    steps = StepPlan(len(windows), seq_len=SEQ_LEN, windows_per_step=BATCH)
    order = Order([""], [len(windows)], steps, seed=1)
    return BatchPlan(order, [windows], batch_size=BATCH)


def batches_of(part: TokenPart) -> Callable[[], object]:
    """A call that makes the next batch of the order of ``part``."""
    plan = plan_of(part)
    position = iter(range(1 << 62))

    def batch() -> object:
        epoch, index = divmod(next(position), plan.steps_per_epoch)
        return plan.step(epoch + 1, index).batches[0]

    return batch


def rows_of(part: TokenPart, folder: Path) -> Callable[[], object]:
    """A call that takes the next batch of a DataLoader over the same ids, in rows of a window and a
    token. Whole batches are asked of datasets at once, which is twice as fast as row by row."""
    import datasets
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    ids = np.asarray(part.read(0, part.num_tokens // (SEQ_LEN + 1) * (SEQ_LEN + 1)))
    rows = ids.astype(np.int32).reshape(-1, SEQ_LEN + 1)
    datasets.disable_progress_bars()
    length = datasets.Sequence(datasets.Value("int32"), length=SEQ_LEN + 1)
    features = datasets.Features({"input_ids": length})
    datasets.Dataset.from_dict({"input_ids": rows}, features=features).save_to_disk(str(folder))
    saved: Any = datasets.load_from_disk(str(folder)).with_format("torch")

    def collate(batch: dict[str, Any]) -> tuple[Any, Any]:
        taken = batch["input_ids"].long()
        return taken[:, :-1], taken[:, 1:]

    sampler = BatchSampler(RandomSampler(saved), BATCH, drop_last=True)
    loader = DataLoader(saved, sampler=sampler, batch_size=None, collate_fn=collate)

    def endless() -> Iterator[object]:
        while True:
            yield from loader

    return endless().__next__


def measure_loading(report: Report, quick: bool, folder: Path) -> None:
    path = folder / "bytes.jsonl"
    write_corpus(path, 3_000_000 if quick else 65_000_000)
    with own_cache() as cache, closing(store_of(path, ByteTokenizer())) as store:
        part = store.part("train")
        report.add("store_tokens", part.num_tokens)
        times = interleave(
            {"loader": batches_of(part), "datasets": rows_of(part, folder / "rows")},
            baseline="datasets",
            rounds=10 if quick else 60,
            calls=50,
        )
        report.ratio("loader_over_hf", times, "datasets", over="loader")
        report.noise("hf_over_hf", times)
        tokens = BATCH * SEQ_LEN
        for side in ("loader", "datasets"):
            report.add(f"{side}_million_tokens_per_s", round(tokens * 1e3 / times.median(side), 1))
        started = subprocess.run(
            [sys.executable, __file__, "--start", str(path)],
            env={**os.environ, "APT_CACHE": cache, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        for name, value in json.loads(started.stdout.splitlines()[-1]).items():
            report.add(name, value)
    report.add("seek_ms", round(seek_seconds() * 1e3, 2))


def seek_seconds() -> float:
    """The time to the windows of the last step of 10**9 windows, from nothing."""
    began = time.perf_counter()
    steps = StepPlan(10**9, seq_len=SEQ_LEN, windows_per_step=BATCH)
    Order([""], [10**9], steps, seed=1).step(1, steps.steps_per_epoch - 1)
    return time.perf_counter() - began


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def start(path: Path) -> None:
    """Open the store that is there, take batches, and print the time to the first of them and the
    memory that was resident beyond that of the imported modules."""
    imported, began = resident_bytes(), time.perf_counter()
    with closing(store_of(path, ByteTokenizer())) as store:
        batch = batches_of(store.part("train"))
        batch()
        seconds = time.perf_counter() - began
        for _ in range(1000):
            batch()
        grown = resident_bytes() - imported
    figures = {"start_seconds": round(seconds, 3), "resident_mb": round(grown / 1e6, 1)}
    print(json.dumps({**figures, "resident_of_imports_mb": round(imported / 1e6, 1)}))


def measure(report: Report, quick: bool) -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure_loading(report, quick, Path(folder))
        measure_building(report, quick, Path(folder))
    report.note(
        "resident_mb is what opening the store and a thousand batches add to the imported modules "
        "(resident_of_imports_mb, most of it torch)."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        start(Path(sys.argv[2]))
    else:
        run(
            "What does text cost until it is a batch, against Hugging Face datasets?",
            measure,
            packages=["datasets", "tokenizers", "torch", "numpy"],
        )
