"""What a trainer costs per step: APT, Hugging Face's and Lightning's against a bare loop.

All sides train the same model, built by APT, on the same text, with the same optimizer, clipping
and learning rate, on one thread. They take turns of a few steps in one process.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _apt_turns import patched_fetches, trainer_loop
from _bare import Recipe, adamw, nanogpt_section, random_windows, train
from _harness import Report, run
from _texts import pydoc_texts
from _turns import Loop, TurnTimings, take_turns
from apt_core import hookimpl
from apt_core.data.batches import Batch
from apt_core.modeling import ModelBuilder
from apt_core.plugin_manager import PluginManager
from apt_core.training import Trainer

OBSERVERS = 10


@dataclass(frozen=True)
class Shape:
    """A model and its batches; ``rounds`` turns of ``turn`` steps are timed."""

    label: str
    num_layers: int
    num_heads: int
    d_model: int
    batch_size: int
    length: int
    turn: int
    rounds: int

    def describe(self) -> str:
        return (
            f"{self.num_layers} x {self.d_model}, heads {self.num_heads}, "
            f"batch {self.batch_size} of {self.length}"
        )

    def recipe(self, steps: int) -> Recipe:
        return Recipe(steps=steps, batch_size=self.batch_size, length=self.length, warmup_steps=10)

    def model(self) -> dict[str, Any]:
        return nanogpt_section(self.num_layers, self.num_heads, self.d_model, self.length)


TINY = Shape("One layer", 1, 1, 32, batch_size=2, length=32, turn=20, rounds=600)
NANO = Shape("nanoGPT's shape for CPUs", 4, 4, 128, batch_size=12, length=64, turn=10, rounds=50)
SHAPES = {"tiny": TINY, "nano": NANO}
WARMUP = 3
"""Rounds that are not counted."""


class Job:
    """The model, recipe and text of every side, and the folder for their output."""

    def __init__(self, shape: Shape, recipe: Recipe, text: str, val_text: str, folder: Path):
        self.shape, self.recipe, self.folder = shape, recipe, folder
        self.tokens = encoded(text)
        self.text, self.val_text = folder / "train.txt", folder / "val.txt"
        self.text.write_text(text, encoding="utf-8")
        self.val_text.write_text(val_text, encoding="utf-8")

    def build_model(self) -> nn.Module:
        return ModelBuilder({"model": self.shape.model()}).build_model()

    def windows(self, fetched: Callable[[], None]) -> Windows:
        return Windows(self.tokens, self.recipe.length, fetched)

    def profile(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "name": "overhead",
            "model": self.shape.model(),
            "training": {
                "batch_size": recipe.batch_size,
                "max_epochs": 1,
                "max_steps": recipe.steps,
                "learning_rate": recipe.learning_rate,
                "scale_lr_by_width": False,
                "min_lr_ratio": recipe.min_learning_rate / recipe.learning_rate,
                "warmup_steps": recipe.warmup_steps,
                "weight_decay": recipe.weight_decay,
                "betas": list(recipe.betas),
                "gradient_clip": recipe.gradient_clip,
                "mixed_precision": False,
                "save_freq": 0,
            },
            "data": {"train_path": str(self.text), "val_path": str(self.val_text)},
            "evaluation": {"eval_freq": 0, "eval_batches": 1, "sample_tokens": 0},
            "hardware": {"device": "cpu", "num_threads": 1},
        }


class Windows(torch.utils.data.Dataset):
    """A map-style dataset of windows of T + 1 tokens; calls ``fetched`` before every batch."""

    def __init__(self, tokens: Tensor, length: int, fetched: Callable[[], None]) -> None:
        self.tokens, self.length, self.fetched = tokens, length, fetched

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """All windows of a batch, which spares a DataLoader one call per window."""
        self.fetched()
        size = self.length
        return [self.tokens[index * size : (index + 1) * size + 1] for index in indices]


def collate(windows: Sequence[Tensor]) -> dict[str, Tensor]:
    stacked = torch.stack(tuple(windows))
    return {"input_ids": stacked[:, :-1], "labels": stacked[:, 1:]}


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats per token, 0-d."""
    return F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())


def bare(job: Job) -> Loop[nn.Module]:
    def loop(fetched: Callable[[], None]) -> nn.Module:
        torch.set_num_threads(1)
        model, recipe = job.build_model(), job.recipe
        # A generator of its own: APT seeds the global one, which all sides share.
        generator = torch.Generator().manual_seed(0)

        def batch() -> tuple[Tensor, Tensor]:
            fetched()
            return random_windows(job.tokens, recipe.batch_size, recipe.length, generator)

        train(model, partial(cross_entropy, model), batch, recipe)
        return model

    return loop


class Observer:
    """Implements the hooks of a step and does nothing, so that only the calls are timed."""

    @hookimpl
    def on_step_start(self, step: int, batch: Sequence[Batch]) -> None:
        pass

    @hookimpl
    def on_backward_end(self, step: int) -> None:
        pass

    @hookimpl
    def on_step_end(self, step: int, loss: Tensor) -> None:
        pass


def apt(job: Job, observers: int = 0) -> Loop[nn.Module]:
    def make() -> Trainer:
        manager = PluginManager()
        for number in range(observers):
            manager.register(Observer(), f"observer_{number}")
        return Trainer(job.profile(), manager, output=job.folder / f"apt-{observers}")

    return trainer_loop(make)


def hugging_face(job: Job) -> Loop[nn.Module]:
    from transformers import PrinterCallback, TrainingArguments
    from transformers import Trainer as HFTrainer

    quiet("transformers", "accelerate")

    class WithLoss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": cross_entropy(self.model, input_ids, labels)}

    def loop(fetched: Callable[[], None]) -> nn.Module:
        torch.set_num_threads(1)
        model, recipe = job.build_model(), job.recipe
        arguments = TrainingArguments(
            output_dir=str(job.folder / "hugging-face"),
            per_device_train_batch_size=recipe.batch_size,
            max_steps=recipe.steps,
            max_grad_norm=recipe.gradient_clip,
            use_cpu=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            report_to="none",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
        )
        trainer = HFTrainer(
            model=WithLoss(model),
            args=arguments,
            train_dataset=job.windows(fetched),
            data_collator=collate,
            optimizers=scheduled(model, recipe),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model

    return loop


def lightning(job: Job) -> Loop[nn.Module]:
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as LightningTrainer

    quiet("lightning", "lightning.pytorch", "lightning.fabric")

    class Task(LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return cross_entropy(self.model, batch["input_ids"], batch["labels"])

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer, schedule = scheduled(self.model, job.recipe)
            each_step = {"scheduler": schedule, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": each_step}

    def loop(fetched: Callable[[], None]) -> nn.Module:
        torch.set_num_threads(1)
        model, recipe = job.build_model(), job.recipe
        loader = torch.utils.data.DataLoader(
            job.windows(fetched), recipe.batch_size, shuffle=True, collate_fn=collate
        )
        LightningTrainer(
            accelerator="cpu",
            devices=1,
            max_steps=recipe.steps,
            gradient_clip_val=recipe.gradient_clip,
            barebones=True,  # Lightning's mode for measuring overhead: no optional feature
            default_root_dir=job.folder / "lightning",
        ).fit(Task(model), loader)
        return model

    return loop


def quiet(*packages: str) -> None:
    """Silence the warnings of imported peers, which the settings of these runs provoke."""
    for package in packages:
        logging.getLogger(package).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=package)


def scheduled(
    model: nn.Module, recipe: Recipe
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The bare loop's optimizer, and its learning rates as the scheduler that the peers expect."""
    optimizer = adamw(model, recipe)

    def factor(step: int) -> float:
        return recipe.learning_rate_at(step) / recipe.learning_rate

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def held_out_loss(model: nn.Module, tokens: Tensor, length: int, windows: int = 512) -> float:
    """The loss in nats per byte on the first ``windows`` windows of a held-out text."""
    cut = tokens[: windows * length + 1]
    model.eval()
    with torch.no_grad():
        return float(cross_entropy(model, cut[:-1].view(-1, length), cut[1:].view(-1, length)))


SIDES: dict[str, Callable[[Job], Loop[nn.Module]]] = {
    "bare": bare,
    "apt": apt,
    "apt10": lambda job: apt(job, OBSERVERS),
    "hf": hugging_face,
    "lightning": lightning,
}
LABELS = {
    "bare": "bare loop",
    "apt": "APT, no plugins",
    "apt10": f"APT, {OBSERVERS} observers",
    "hf": "HF Trainer",
    "lightning": "Lightning",
}


def encoded(text: str) -> Tensor:
    """The bytes of ``text`` as ids, int64 [N]."""
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8).long()


def timed(
    shape: Shape, rounds: int, sides: Sequence[str], folder: Path
) -> tuple[TurnTimings[nn.Module], dict[str, float]]:
    """The times of a step, and the held-out loss of every side after its last step."""
    recipe = shape.recipe((WARMUP + rounds) * shape.turn + 1)
    train, val = pydoc_texts()
    # The text is long enough for one epoch: the end of an epoch is no part of a step.
    needed = (recipe.steps + 1) * recipe.batch_size * recipe.length
    job = Job(shape, recipe, train * -(-needed // len(train)), val, folder)
    with patched_fetches():
        times = take_turns(
            {name: SIDES[name](job) for name in sides},
            baseline="bare",
            rounds=rounds,
            warmup=WARMUP,
            steps=shape.turn,
        )
    held_out = encoded(val)
    losses = {
        name: held_out_loss(model, held_out, shape.length) for name, model in times.results.items()
    }
    return times, losses


def measure(report: Report, quick: bool, sides: Sequence[str] = tuple(SIDES)) -> None:
    torch.set_num_threads(1)
    report.machine["threads"] = 1
    for name, shape in SHAPES.items():
        rounds = shape.rounds // 10 if quick else shape.rounds
        with tempfile.TemporaryDirectory() as folder:
            times, losses = timed(shape, rounds, sides, Path(folder))
        for side in sides:
            if side != "bare":
                report.ratio(f"{side}_over_bare_{name}", times.cpu, side, over="bare")
        report.noise(f"bare_over_bare_{name}", times.cpu)
        report.add(f"bare_step_{name}_us", round(times.cpu.median("bare") / 1e3, 1))
        report.table(
            f"{shape.label}: a step",
            ["trainer", "CPU time, µs", "over the bare loop, µs", "wall-clock over bare's",
             f"held-out loss after {times.steps:,} steps"],
            [
                [
                    LABELS[side],
                    times.cpu.median(side) / 1e3,
                    (times.cpu.median(side) - times.cpu.median("bare")) / 1e3,
                    times.wall.ratio(side, over="bare").value,
                    losses[side],
                ]
                for side in sides
            ],
        )  # fmt: skip
    report.note(NOTE)


NOTE = f"""\
CPU time of the whole process per optimizer step, batch fetching included, on one thread. Every \
side trains the same model ({TINY.describe()}; {NANO.describe()}) with fused AdamW, clipping at \
norm 1 and a cosine learning rate. The bare loop cuts random windows as nanoGPT does; the peers \
read theirs through a DataLoader without workers. All sides run in one process, each in a thread \
that stands still but in its turns of some steps, which begin and end where it fetches a batch. \
APT logs every tenth step to its file, checks every loss for being finite and seeds every \
micro-batch, as it does by default; of the peers everything that is optional is off (Lightning: \
`barebones`). Evaluation and checkpoints are off for all."""


if __name__ == "__main__":
    run(
        "What does a trainer cost per step, against a bare loop?",
        measure,
        packages=["torch", "transformers", "accelerate", "lightning"],
    )
