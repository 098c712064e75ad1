"""What a tracker in the background costs the training steps."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from _apt_turns import patched_fetches, trainer_loop
from _harness import Report, run
from _turns import TurnTimings, take_turns
from apt_core.training import Trainer

TRACKERS = ("tensorboard", "trackio", "wandb")
TURN = 10
LOG_EVERY = 10
BATCH_SIZE, LENGTH = 8, 256
ROUNDS, WARMUP = 16, 2
MODEL = {
    "num_layers": 4,
    "num_heads": 4,
    "d_model": 256,
    "d_ff": 768,
    "max_seq_len": LENGTH,
    "attention_name": "mha",
}


def profile(steps: int, tracker: str) -> dict[str, Any]:
    return {
        "name": "trackers",
        "model": MODEL,
        "training": {
            "batch_size": BATCH_SIZE,
            "max_epochs": 1000,
            "max_steps": steps,
            "mixed_precision": False,
            "log_every_steps": LOG_EVERY,
            "save_freq": 0,
        },
        "monitoring": {tracker: {"enabled": True}} if tracker else {},
        "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 0},
        "hardware": {"device": "cpu"},
    }


def timed(rounds: int, folder: Path) -> TurnTimings[Any]:
    """Time turns of TURN steps, each with TURN / LOG_EVERY rows of metrics, without a tracker and
    with each."""
    steps = (WARMUP + rounds) * TURN + 1

    def trainer(tracker: str) -> Trainer:
        # The baseline runs twice.
        name = tracker or "silent"
        number = len(list(folder.glob(f"{name}-*")))
        return Trainer(profile(steps, tracker), output=folder / f"{name}-{number}")

    with patched_fetches():
        return take_turns(
            {
                "silent": trainer_loop(partial(trainer, ""), skip=0),
                **{name: trainer_loop(partial(trainer, name), skip=0) for name in TRACKERS},
            },
            baseline="silent",
            rounds=rounds,
            warmup=WARMUP,
            steps=TURN,
        )


def measure(report: Report, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRACKIO_DIR"] = str(Path(folder) / "trackio")
        os.environ["WANDB_MODE"] = "offline"
        times = timed(2 if quick else ROUNDS, Path(folder))
    for name in TRACKERS:
        report.ratio(f"{name}_over_silent", times.wall, name, over="silent")
    report.noise("silent_over_silent", times.wall)
    report.add("step_ms", times.wall.median("silent") / 1e6)
    report.note(f"A row of metrics every {LOG_EVERY} steps; wandb is offline.")


if __name__ == "__main__":
    run("What does a tracker cost?", measure, packages=[*TRACKERS])
