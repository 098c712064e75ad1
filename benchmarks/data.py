"""What text costs until it is a batch, against Hugging Face datasets and PyTorch's DataLoader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from _harness import Report, Timings, interleave, run
from apt_core.data.order import Order, StepPlan
from apt_core.data.packing.concat import ConcatWindows
from apt_core.data.packing.pieces import PieceIndex, PieceWindows, pack_documents, pad_documents
from apt_core.data.packing.rows import Windows
from apt_core.data.sources.jsonl import JsonLines
from apt_core.data.store.build import build_store
from apt_core.data.store.parts import TokenPart
from apt_core.data.store.reader import TokenStore
from apt_core.data.tokenizers.bpe import BPETokenizer
from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.providers.dataset import DataSection
from apt_core.providers.tokenizer import TokenizerProvider

if TYPE_CHECKING:
    from apt_core.data.batches import BatchPlan  # imports torch, which one figure goes without

BATCH, SEQ_LEN = 32, 1024
PROCESSES = 2
NOTE = """
The store has one byte a token and is held in memory, as all are up to 128 MiB; of a larger one each
row is read from its file. `loader_over_hf` is against the fastest form that the documentation of
datasets shows with a DataLoader: ids in the type of the store, a format, and a sampler that asks
for whole batches. Rows of int32 and int64 were no faster. `loader_over_hf_arrow` is against
tables in the format arrow, of which the benchmark makes tensors itself. APT's ids and targets are
contiguous; those of datasets are views of one tensor. In one process the processor's time is
compared, of which other programs of the machine take none; with two workers, which are threads in
APT and processes in a DataLoader, and of what builds a store, it is the time that passes.

`resident_mb` is what opening the store and a thousand batches add to the imported modules
(`resident_of_imports_mb`, most of it torch) where rows are read from files; a store that is held in
memory adds its size. `unshared_mb` is the memory of that process that no other shares, without the
libraries' files. `resident_without_torch_mb` is all that a process has that makes the same batches
as arrays, without torch.
""".strip()

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


def order_of(windows: Windows, batch_size: int = BATCH) -> Order:
    steps = StepPlan(len(windows), seq_len=windows.seq_len, windows_per_step=batch_size)
    return Order([""], [len(windows)], steps, seed=1)


def plan_of(windows: Windows, batch_size: int = BATCH, num_workers: int = 0) -> BatchPlan:
    from apt_core.data.batches import BatchPlan

    order = order_of(windows, batch_size)
    return BatchPlan(order, [windows], batch_size=batch_size, num_workers=num_workers)


def batches_of(plan: BatchPlan) -> Callable[[], object]:
    """A call that makes the next batch of ``plan``."""
    position = iter(range(1 << 62))

    def batch() -> object:
        epoch, index = divmod(next(position), plan.steps_per_epoch)
        return plan.step(epoch + 1, index).batches[0]

    return batch


def saved_rows(part: TokenPart, folder: Path) -> Any:
    """The same ids for datasets, in rows of a window and a token, in the type of the store."""
    import datasets

    ids = np.asarray(part.read(0, part.num_tokens // (SEQ_LEN + 1) * (SEQ_LEN + 1)))
    rows = ids.reshape(-1, SEQ_LEN + 1)
    datasets.disable_progress_bars()
    length = datasets.Sequence(datasets.Value(str(rows.dtype)), length=SEQ_LEN + 1)
    features = datasets.Features({"input_ids": length})
    datasets.Dataset.from_dict({"input_ids": rows}, features=features).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def shifted(rows: Any) -> tuple[Any, Any]:
    """Ids and targets, as views of rows of int64."""
    import torch

    taken = torch.as_tensor(rows).long()
    return taken[:, :-1], taken[:, 1:]


def of_arrow(table: Any) -> tuple[Any, Any]:
    """:func:`shifted` of an Arrow table, without a copy where one can be spared."""
    column = table.column("input_ids").combine_chunks().flatten()
    return shifted(column.to_numpy(zero_copy_only=False).reshape(-1, SEQ_LEN + 1))


def endless(loader: Any) -> Callable[[], object]:
    def batches() -> Iterator[object]:
        while True:
            yield from loader

    return batches().__next__


def whole_batches(rows: Any, collate: Callable[[Any], object], **more: Any) -> Callable[[], object]:
    """A call that takes the next batch of a DataLoader whose sampler asks for whole batches."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    sampler = BatchSampler(RandomSampler(rows), BATCH, drop_last=True)
    return endless(DataLoader(rows, sampler=sampler, batch_size=None, collate_fn=collate, **more))


def forms_of_datasets(rows: Any) -> dict[str, Callable[[], object]]:
    """The ways to shuffled batches by ``datasets`` and a DataLoader in one process."""
    from torch.utils.data import DataLoader

    def stacked(batch: list[dict[str, Any]]) -> tuple[Any, Any]:
        return shifted(np.stack([row["input_ids"] for row in batch]))

    tensors, arrays = rows.with_format("torch"), rows.with_format("numpy")
    streamed = rows.to_iterable_dataset(num_shards=64).shuffle(seed=1, buffer_size=1000)
    streamed = streamed.with_format("numpy")
    by_row = {"batch_size": BATCH, "drop_last": True, "collate_fn": stacked}
    return {
        "torch": whole_batches(tensors, lambda batch: shifted(batch["input_ids"])),
        "numpy": whole_batches(arrays, lambda batch: shifted(batch["input_ids"])),
        "arrow": whole_batches(rows.with_format("arrow"), of_arrow),
        "torch, row by row": endless(DataLoader(tensors, shuffle=True, **by_row)),
        "streamed, numpy, row by row": endless(DataLoader(streamed, **by_row)),
    }


DOCUMENTED = ("torch", "numpy", "torch, row by row", "streamed, numpy, row by row")
"""The forms that the documentation of datasets shows with a DataLoader. It shows arrow by itself;
to make tensors of its tables is left to the user."""


def measure_batches(report: Report, quick: bool, store: TokenStore, folder: Path) -> None:
    from apt_core.data.loading import IN_MEMORY  # imports torch

    part = store.part("train")
    rows = saved_rows(part, folder)
    store.hold_in_memory(IN_MEMORY)
    unheld = TokenStore.open(store.folder)
    loader = batches_of(plan_of(ConcatWindows(part, SEQ_LEN)))
    from_files = batches_of(plan_of(ConcatWindows(unheld.part("train"), SEQ_LEN)))
    with closing(unheld):
        times = interleave(
            {"loader": loader, "from files": from_files, **forms_of_datasets(rows)},
            baseline="torch",
            rounds=6 if quick else 60,
            calls=20,
            clock=time.process_time_ns,
        )
    fastest = min(DOCUMENTED, key=times.median)
    report.ratio("loader_over_hf", times, fastest, over="loader")
    report.ratio("loader_over_hf_arrow", times, "arrow", over="loader")
    report.ratio("loader_from_files_over_hf", times, fastest, over="from files")
    report.noise("hf_over_hf", times)
    tokens = BATCH * SEQ_LEN * 1e3
    report.add("loader_million_tokens_per_s", round(tokens / times.median("loader"), 1))
    report.add("hf_million_tokens_per_s", round(tokens / times.median(fastest), 1))
    sides = {"loader": "APT", "from files": "APT, the store not held in memory"}
    report.table(
        f"A batch of {BATCH} x {SEQ_LEN}, one process, one thread",
        ["side", "microseconds", "times APT's"],
        [
            [
                sides.get(name, f"datasets: {name}"),
                times.median(name) / 1e3,
                times.ratio(name, "loader").value,
            ]
            for name in times.samples
        ],
    )
    measure_workers(report, quick, part, rows)


def measure_workers(report: Report, quick: bool, part: TokenPart, rows: Any) -> None:
    """Both sides with two workers, which are threads here, and processes there."""
    plan = plan_of(ConcatWindows(part, SEQ_LEN), num_workers=2)
    workers = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}
    tensors = rows.with_format("torch")
    with closing(plan):
        times = interleave(
            {
                "loader": batches_of(plan),
                "datasets": whole_batches(
                    tensors, lambda batch: shifted(batch["input_ids"]), **workers
                ),
            },
            baseline="datasets",
            rounds=3 if quick else 20,
            calls=100,
        )
    report.ratio("loader_over_hf_2_workers", times, "datasets", over="loader")


def measure_packings(report: Report, quick: bool, part: TokenPart) -> None:
    rows: list[list[str | float]] = []
    for batch_size, seq_len in ((BATCH, SEQ_LEN), (8, 128)):
        sides = {
            "concat": batches_of(plan_of(ConcatWindows(part, seq_len), batch_size)),
            "documents": _pieces(pack_documents(part, seq_len), part, seq_len, batch_size, True),
            "pad": _pieces(
                pad_documents(part, seq_len, truncation=False), part, seq_len, batch_size, False
            ),
        }
        times: Timings = interleave(
            sides,
            baseline="concat",
            rounds=4 if quick else 20,
            calls=50,
            clock=time.process_time_ns,
        )
        shape = f"{batch_size} x {seq_len}"
        rows.append([shape, *(times.median(name) / 1e3 for name in sides)])
    report.table("Microseconds a batch by packing", ["batch", "concat", "documents", "pad"], rows)


def _pieces(
    blocks: Any, part: TokenPart, seq_len: int, batch_size: int, packed: bool
) -> Callable[[], object]:
    windows = PieceWindows(part, seq_len, PieceIndex.of(blocks), packed=packed)
    return batches_of(plan_of(windows, batch_size))


def measure_loading(report: Report, quick: bool, folder: Path) -> None:
    path = folder / "bytes.jsonl"
    write_corpus(path, 3_000_000 if quick else 65_000_000)
    with own_cache() as cache, closing(store_of(path, ByteTokenizer())) as store:
        report.add("store_tokens", store.part("train").num_tokens)
        measure_batches(report, quick, store, folder / "rows")
        measure_packings(report, quick, store.part("train"))
        for flag in ("--start", "--start-without-torch"):
            started = subprocess.run(
                [sys.executable, __file__, flag, str(path)],
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


def unshared_bytes() -> int:
    """The memory that this process alone has."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = [row.split() for row in rows if row.startswith("Private_")]
    return sum(int(size) for _, size, _ in private) * 1024


def start(path: Path) -> None:
    """Open the store that is there, take batches, and print the time to the first of them and the
    memory that was resident beyond that of the imported modules."""
    import apt_core.data.batches  # noqa: F401 - not to be timed

    imported, began = resident_bytes(), time.perf_counter()
    with closing(store_of(path, ByteTokenizer())) as store:
        batch = batches_of(plan_of(ConcatWindows(store.part("train"), SEQ_LEN)))
        batch()
        seconds = time.perf_counter() - began
        for _ in range(1000):
            batch()
        total, unshared = resident_bytes(), unshared_bytes()
    figures = {
        "start_seconds": round(seconds, 3),
        "resident_mb": round((total - imported) / 1e6, 1),
        "resident_of_imports_mb": round(imported / 1e6, 1),
        "unshared_mb": round(unshared / 1e6, 1),
    }
    print(json.dumps(figures))


def start_without_torch(path: Path) -> None:
    """Take as many batches as arrays, for which torch is not imported, and print all memory that
    is resident then."""
    with closing(store_of(path, ByteTokenizer())) as store:
        windows = ConcatWindows(store.part("train"), SEQ_LEN)
        order = order_of(windows)
        for index in range(1000):
            windows.rows(order.step(1, index % order.steps.steps_per_epoch).windows)
        total = resident_bytes()
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported")
    print(json.dumps({"resident_without_torch_mb": round(total / 1e6, 1)}))


def measure(report: Report, quick: bool) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    with tempfile.TemporaryDirectory() as folder:
        measure_loading(report, quick, Path(folder))
        measure_building(report, quick, Path(folder))
    report.note(NOTE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        start(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--start-without-torch"]:
        start_without_torch(Path(sys.argv[2]))
    else:
        run(
            "What does text cost until it is a batch, against Hugging Face datasets?",
            measure,
            packages=["datasets", "tokenizers", "torch", "numpy"],
        )
