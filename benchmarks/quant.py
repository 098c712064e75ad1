"""Weights of 8 and 4 bits against fp32: speed of decoding, size, and what they cost.

Speed is that of the same model with fp32 weights and packed, in turns, greedily, by as many threads
as there are; weights of normally distributed noise, so that sizes and speeds need no training. What
quantisation costs is measured on models that are trained here, by ``apt-quantize``'s own function:
perplexity of the held-out text before and after. One of them is trained the last third of its steps
with rounded weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from _harness import Report, interleave, run
from apt_core import GenerationRequest
from apt_core.data.tokenizers.base import CoreTokenizer
from apt_core.inference import Engine
from apt_core.runs import Session, open_run
from apt_core.runs.checkpoint_parts import model_tensors
from apt_core.testing import tiny_run, tiny_session
from apt_plugins.quant.layers import Measured, choose, pack
from apt_plugins.quant.quantising import Asked, quantise
from apt_plugins.quant.record import Record
from apt_plugins.quant.rounding import Rounding

VOCABULARY, CONTEXT, PROMPT = 4096, 1024, 32
BATCHES = (1, 8)
KINDS = {"int8": Rounding(8), "int4": Rounding(4, 128)}


@dataclass(frozen=True)
class Size:
    name: str
    d_model: int
    num_heads: int
    num_layers: int
    d_ff: int
    tokens: int


SIZES = (
    Size("14M", 320, 10, 12, 896, tokens=64),
    Size("60M", 640, 10, 13, 2048, tokens=32),
)
"""As in ``generation.py``."""

TRAINED: dict[str, Any] = {
    "name": "quantised",
    "model": {"d_model": 256, "num_heads": 4, "num_layers": 4, "d_ff": 768, "max_seq_len": 128},
    "data": {"max_length": 128},
    "training": {"batch_size": 8, "max_epochs": 100, "learning_rate": 1e-3, "warmup_steps": 50},
    "evaluation": {"eval_freq": 10_000, "eval_batches": 1, "sample_tokens": 0},
    "hardware": {"device": "cpu"},
}


class Characters(CoreTokenizer):
    """An id for each character, and no end of documents."""

    name = "characters"

    @property
    def vocab_size(self) -> int:
        return VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def session_of(size: Size, threads: int) -> Session:
    shape = {
        "d_model": size.d_model,
        "num_heads": size.num_heads,
        "num_layers": size.num_layers,
        "d_ff": size.d_ff,
        "max_seq_len": CONTEXT,
        "vocab_size": VOCABULARY,
    }
    overrides = {f"model.{key}": value for key, value in shape.items()}
    session = tiny_session(overrides={**overrides, "hardware.num_threads": threads})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in session.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.02)
    return replace(session, tokenizer=Characters())


def packed(session: Session, rounding: Rounding) -> tuple[Session, list[Measured]]:
    """A copy of the session with weights that are kept as integers."""
    model, measured = copy.deepcopy(session.model), []
    pack(choose(model, rounding).layers, measured.append)
    return replace(session, model=model), measured


def bytes_of(session: Session) -> int:
    return sum(tensor.nbytes for tensor in model_tensors(session.model).values())


def decoding(session: Session, batch: int, tokens: int) -> Callable[[], object]:
    engine = Engine(session, max_batch=batch, lookup="never")
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(32, 127, (batch, PROMPT), generator=generator).tolist()
    requests = [
        GenerationRequest("".join(map(chr, text)), max_new_tokens=tokens, temperature=0.0)
        for text in texts
    ]
    return lambda: engine.run(requests)


def speed(report: Report, size: Size, rounds: int, tokens: int) -> list[list[str | float]]:
    fp32 = session_of(size, torch.get_num_threads())
    made = {name: packed(fp32, rounding) for name, rounding in KINDS.items()}
    sessions = {"fp32": fp32, **{name: session for name, (session, _) in made.items()}}
    rows: list[list[str | float]] = []
    for batch in BATCHES:
        sides = {name: decoding(each, batch, tokens) for name, each in sessions.items()}
        times = interleave(sides, baseline="fp32", rounds=rounds, calls=1, warmup=1)
        for name in KINDS:
            figure = f"fp32_over_{name}_{size.name}_batch{batch}"
            report.ratio(figure, times, "fp32", over=name)
        if batch == 1:
            report.noise(f"fp32_over_fp32_{size.name}", times)
        speeds = [batch * tokens / times.median(name) * 1e9 for name in sides]
        rows.append([f"{size.name}, batch {batch}", *speeds])
    for name, (session, measured) in made.items():
        weights = sum(m.bytes_before for m in measured) / sum(m.bytes_after for m in measured)
        report.add(f"weights_fp32_over_{name}_{size.name}", weights)
        report.add(f"file_fp32_over_{name}_{size.name}", bytes_of(fp32) / bytes_of(session))
    return rows


def trained(folder: Path, steps: int, **overrides: Any) -> Path:
    tiny_run(
        *(["quant"] if overrides else []),
        profile=TRAINED,
        steps=steps,
        overrides={"training.max_steps": steps, **overrides},
        output=folder,
    )
    return folder


def quantised(run_folder: Path, name: str, output: Path) -> Record:
    session = open_run(run_folder, device="cpu")
    return quantise(Asked(session, "last", KINDS[name], output, 64), lambda what, share: None)


def quality(report: Report, folder: Path, steps: int) -> None:
    plain = trained(folder / "plain", steps)
    begins = steps * 2 // 3
    aware = trained(
        folder / "aware",
        steps,
        **{"model.quant.bits": 4, "schedules.enable_quant_at_step": begins},
    )
    records = {name: quantised(plain, name, folder / name) for name in KINDS}
    records["int4, rounded in training"] = quantised(aware, "int4", folder / "int4-aware")
    rows: list[list[str | float]] = []
    for name, record in records.items():
        assert record.perplexity is not None
        noises = [row.sqnr_db for row in record.layers if row.sqnr_db is not None]
        p = record.perplexity
        rows.append(
            [
                name,
                min(noises),
                sum(noises) / len(noises),
                record.layer_bytes_before / record.layer_bytes_after,
                p.before,
                p.after,
                f"{p.change:+.2%}",
            ]
        )
    first = records["int8"].perplexity
    assert first is not None
    for name, record in records.items():
        assert record.perplexity is not None
        key = name.replace(", rounded in training", "_aware")
        report.add(f"perplexity_{key}_over_fp32", record.perplexity.after / first.before)
        if key in KINDS:
            report.add(f"lowest_sqnr_{key}_dB", record.noise)
    report.table(
        "What quantisation costs",
        [
            "weights",
            "lowest SQNR, dB",
            "mean SQNR, dB",
            "times smaller",
            "perplexity before",
            "after",
            "change",
        ],
        rows,
    )
    report.note(
        f"The trained models have {TRAINED['model']['num_layers']} layers of width "
        f"{TRAINED['model']['d_model']}; {steps:,} steps on the language reference of Python, by "
        f"bytes. Training with rounded weights begins at step {begins:,}."
    )


def measure(report: Report, quick: bool) -> None:
    torch.manual_seed(0)
    report.machine["threads"] = torch.get_num_threads()
    rows: list[list[str | float]] = []
    for size in SIZES[:1] if quick else SIZES:
        rows += speed(report, size, 2 if quick else 8, size.tokens // (4 if quick else 1))
    report.table("Tokens per second", ["model", "fp32", *KINDS], rows)
    with TemporaryDirectory() as folder:
        quality(report, Path(folder), 12 if quick else 360)


if __name__ == "__main__":
    run(
        "What do weights of 8 and 4 bits cost, and what do they give?",
        measure,
        packages=["torch"],
    )
