"""What a checkpoint costs the training steps during which it is written."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from _apt_turns import patched_fetches, trainer_loop
from _harness import Report, run
from _turns import TurnTimings, take_turns
from apt_core.training import Trainer

SAVE_EVERY = 20
BATCH_SIZE, LENGTH = 8, 256
ROUNDS, WARMUP = 4, 1
MODEL = {
    "num_layers": 6,
    "num_heads": 6,
    "d_model": 384,
    "d_ff": 1024,
    "max_seq_len": LENGTH,
    "attention_name": "mha",
}


def profile(steps: int, save_every: int | None) -> dict[str, Any]:
    return {
        "name": "checkpoint",
        "model": MODEL,
        "training": {
            "batch_size": BATCH_SIZE,
            "max_epochs": 1000,
            "max_steps": steps,
            "mixed_precision": False,
            "save_freq": 0,
            "save_every_steps": save_every,
            "keep_last": 1,
        },
        "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 0},
        "hardware": {"device": "cpu"},
    }


def timed(rounds: int, folder: Path) -> TurnTimings[Any]:
    """Time turns of SAVE_EVERY steps with and without saving. A save starts in the middle of a
    turn, which so contains all of it."""
    half = SAVE_EVERY // 2
    steps = half + (WARMUP + rounds) * SAVE_EVERY + 1

    def trainer(name: str, save_every: int | None) -> Trainer:
        # The baseline runs twice.
        number = len(list(folder.glob(f"{name}-*")))
        return Trainer(profile(steps, save_every), output=folder / f"{name}-{number}")

    with patched_fetches():
        return take_turns(
            {
                "silent": trainer_loop(partial(trainer, "silent", None), skip=half),
                "saving": trainer_loop(partial(trainer, "saving", SAVE_EVERY), skip=half),
            },
            baseline="silent",
            rounds=rounds,
            warmup=WARMUP,
            steps=SAVE_EVERY,
        )


def measure(report: Report, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        times = timed(2 if quick else ROUNDS, Path(folder))
        (path,) = Path(folder).glob("saving-*/checkpoints/step-*/model.safetensors")
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        parameters = path.stat().st_size // 4
    report.ratio("saving_over_silent", times.wall, "saving", over="silent")
    report.noise("silent_over_silent", times.wall)
    saving, noise = times.wall.ratio("saving", "silent"), times.wall.noise()
    report.add("saving_slowdown", saving.value - noise.value)
    report.add("step_ms", times.wall.median("silent") / 1e6)
    report.add("checkpoint_mib", size / 2**20)
    report.add("parameters_million", parameters / 1e6)
    report.note(NOTE)


NOTE = f"""\
Wall-clock time of a step of {BATCH_SIZE * LENGTH:,} tokens with a checkpoint every {SAVE_EVERY} \
steps over that without; `saving_slowdown` is that ratio less the ratio of two runs that do not \
save. The runs take turns of {SAVE_EVERY} steps; the checkpoint is begun in the middle of a turn, \
and what is left of its writing at the turn's end would be seen by the others. Copying is part of \
the step; writing, hashing and flushing go on beside the following steps, on the same cores."""


if __name__ == "__main__":
    run(
        "What does saving in the background cost?",
        measure,
        packages=["torch", "safetensors"],
    )
