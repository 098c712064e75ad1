"""Makes a run whose weights are integers of one whose weights are not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apt_core import AptError, ConfigError
from apt_core.config.source import plugin_items
from apt_core.config.yaml_text import yaml_of
from apt_core.data.batches import Batch
from apt_core.evaluation.held_out import open_held_out
from apt_core.evaluation.intervals import Sums
from apt_core.evaluation.metrics import difference_figure, figure_of
from apt_core.evaluation.scoring import Scoring, find, items_of
from apt_core.evaluation.tasks.held_out import HeldOutTask
from apt_core.files import write_atomically
from apt_core.json_files import without_nan
from apt_core.log import get_logger
from apt_core.modeling.calling import forward_batch
from apt_core.runs import Session, open_run
from apt_core.runs import checkpoint as checkpoints
from apt_core.runs.checkpoint import Checkpoint, Snapshot, inventory
from apt_core.runs.checkpoint_parts import model_tensors
from apt_core.runs.finding import run_of
from apt_core.runs.folder import now, versions
from apt_core.runs.layout import CHECKPOINTS, TOKENIZER
from apt_core.runs.resume_check import saved_profile
from apt_core.runs.run_state import Switch
from apt_plugins.export.origin import manifest_of
from apt_plugins.export.staging import staged
from apt_plugins.quant.layers import Choice, Measured, pack, stored_weights, without_fake
from apt_plugins.quant.plugin import NAME
from apt_plugins.quant.record import RECORD, Perplexity, Record, kept_row_of, row_of
from apt_plugins.quant.rounding import Rounding
from apt_plugins.quant.settings import SECTION, settings_of
from apt_plugins.quant.transform import chosen

log = get_logger("apt.quant")

SCHEDULED = re.compile(rf"(enable|disable)_{NAME}_at_")
"""Keys of ``schedules`` that say when training with rounded weights begins."""

Advance = Callable[[str, float], None]
"""What is being done, and the share of it that is."""


@dataclass(frozen=True)
class Asked:
    """What is asked for: ``rounding`` of the weights of ``session``, which are its run's
    ``weights``, as a run in ``output``; perplexity on so many held-out ``documents``."""

    session: Session
    weights: str
    rounding: Rounding
    output: Path
    documents: int


def check_not_quantised(session: Session) -> None:
    """Raise ConfigError for a run whose weights are integers already."""
    if next(stored_weights(session.model), None) is not None:
        bits = settings_of(session.config).bits
        assert session.checkpoint is not None
        raise ConfigError(
            f"its weights are integers of {bits} bits already",
            "RUN",
            str(run_of(session.checkpoint)),
            "quantise the run that it was made of: its quantisation.json names that",
        )


@torch.no_grad()
def quantise(asked: Asked, advance: Advance) -> Record:
    """Write the run, and return what its ``quantisation.json`` says. The model of the session is
    changed.

    Raises ConfigError for a model without weights that can be rounded, AptError where the run
    cannot be written or does not compute what it should: nothing is left of it then.
    """
    session = asked.session
    check_not_quantised(session)
    without_fake(session.model)
    choice = chosen(session.model, asked.rounding)
    with staged(asked.output, force=False) as (folder, publish):
        before_bytes = _bytes(session.model)
        text = _HeldOutText(session, asked.documents)
        before = text.sums(lambda share: advance("perplexity before", share))
        measured = _packed(choice, advance)
        after = text.sums(lambda share: advance("perplexity after", share))
        record = Record(
            **_origin(asked),
            layers=[row_of(each) for each in measured],
            kept=[kept_row_of(each) for each in choice.kept],
            layer_bytes_before=sum(each.bytes_before for each in measured),
            layer_bytes_after=sum(each.bytes_after for each in measured),
            file_bytes_before=before_bytes,
            file_bytes_after=_bytes(session.model),
            perplexity=text.perplexity(before, after),
        )
        _write(asked, folder, record)
        _prove(session, folder)
        publish()
    return record


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model_tensors(model).values())


def _packed(choice: Choice, advance: Advance) -> list[Measured]:
    measured: list[Measured] = []
    number = sum(len(layer.roundings) for layer in choice.layers)

    def done(each: Measured) -> None:
        measured.append(each)
        advance("rounding", len(measured) / number)

    pack(choice.layers, done)
    return measured


def _origin(asked: Asked) -> dict[str, Any]:
    checkpoint = asked.session.checkpoint
    assert checkpoint is not None
    return {
        "run": str(run_of(checkpoint)),
        "checkpoint": checkpoint.name,
        "weights": asked.weights,
        "bits": asked.rounding.bits,
        "group": asked.rounding.group,
        "written": now(),
        "versions": versions(),
    }


class _HeldOutText:
    """Up to ``documents`` of the held-out documents of the run of ``session``."""

    def __init__(self, session: Session, documents: int) -> None:
        self._session, self._items = session, None
        if not documents:
            return
        scoring = Scoring(limit=documents)
        try:
            self._items = items_of("held_out", HeldOutTask(), scoring, open_held_out(session))
        except (AptError, OSError) as error:
            log.warning(
                "perplexity is not measured: the run's held-out text is not there: %s", error
            )
        self._scoring = scoring

    def sums(self, advance: Callable[[float], None]) -> Sums | None:
        """The losses and tokens of each document."""
        if self._items is None:
            return None
        found = find(self._session, self._items, self._scoring.asking(advance))
        assert found is not None  # nothing interrupts it
        return found.sums["perplexity"]

    def perplexity(self, before: Sums | None, after: Sums | None) -> Perplexity | None:
        if before is None or after is None or self._items is None:
            return None
        values = [figure_of("perplexity", sums).value for sums in (before, after)]
        if not np.isfinite(values).all():
            log.warning("perplexity is not finite: %s before, %s after", *values)
            return None
        difference = difference_figure("perplexity", before, after)
        return Perplexity(
            text=f"{len(self._items.chosen)} of {self._items.total} held-out documents",
            before=values[0],
            after=values[1],
            low=difference.low,
            high=difference.high,
        )


# The run ----------------------------------------------------------------------------------------


def _write(asked: Asked, folder: Path, record: Record) -> None:
    session = asked.session
    assert session.checkpoint is not None
    found = checkpoints.load(session.checkpoint, verify=False)
    profile = yaml_of(_profile(found, asked.rounding))
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model_tensors(session.model).items()
    }
    snapshot = Snapshot(
        step=found.state.step,
        tensors={"model": tensors, "optimizer": {}},
        plugins=found.plugins,
        state=_state(found, tensors),
        profile=profile,
        manifest={
            **{k: v for k, v in found.manifest.items() if k not in ("format", "step", "sha256")},
            "written": now(),
            "versions": versions(),
        },
    )
    (folder / CHECKPOINTS).mkdir()
    checkpoints.save(folder / CHECKPOINTS, snapshot)
    tokenizer = run_of(session.checkpoint) / TOKENIZER
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, folder / TOKENIZER)
    write_atomically(folder / "profile.yaml", profile)
    _write_json(folder / "manifest.json", _manifest(session, found, asked.output))
    _write_json(folder / RECORD, record.model_dump())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False)
    write_atomically(path, text + "\n")


def _profile(found: Checkpoint, rounding: Rounding) -> dict[str, Any]:
    """The checkpoint's profile with the plugin and its settings."""
    profile = saved_profile(found.profile)
    plugins = profile.get("plugins") or []
    if NAME not in [name for name, _ in plugin_items(plugins)]:
        plugins = [*plugins, NAME]
    schedules = profile.get("schedules")
    if isinstance(schedules, dict):
        kept = {key: value for key, value in schedules.items() if not SCHEDULED.match(str(key))}
        profile["schedules"] = kept
    quant: dict[str, Any] = {"bits": rounding.bits, "packed": True}
    if rounding.group:
        quant["group"] = rounding.group
    model = {**profile.get("model", {}), SECTION.rpartition(".")[2]: quant}
    return {**profile, "plugins": plugins, "model": model}


def _state(found: Checkpoint, tensors: Mapping[str, Tensor]) -> str:
    """The run's state with the change of the model as its last, whatever was rounded before."""
    state = found.state
    switch = Switch(
        plugin=NAME,
        epoch=state.epoch,
        step=state.step,
        loss_before=float("nan"),
        loss_after=float("nan"),
        quarantined=[n for n, r in state.plugin_records.items() if r.state == "quarantined"],
    )
    own = state.model_copy(
        update={
            "transforms": [*(each for each in state.transforms if each.plugin != NAME), switch],
            "optimizer_groups": [],
            "averages": [],
            "tensors": {
                "model": inventory({k: (v.shape, v.dtype) for k, v in tensors.items()}),
                "optimizer": {},
            },
        }
    )
    return json.dumps(own.to_json(), indent=1, ensure_ascii=False) + "\n"


def _manifest(session: Session, found: Checkpoint, output: Path) -> dict[str, Any]:
    """The manifest of the run, as far as it is that of the new one too."""
    manifest = manifest_of(session)
    for name in ("process", "failed_checkpoints", "error"):
        manifest.pop(name, None)
    return {
        **manifest,
        "status": "finished",
        "profile": session.config.name,
        "step": found.state.step,
        "versions": versions(),
        "parameters": sum(parameter.numel() for parameter in session.model.parameters()),
        "checkpoint_dir": str(output.absolute() / CHECKPOINTS),
        "ended": now(),
    }


def _prove(session: Session, folder: Path) -> None:
    """Open the run, and compare its logits with those of the model that was written. Raises
    AptError where they differ."""
    opened = open_run(folder, device=str(session.device))
    size = min(session.config.model.max_seq_len, 64)
    ids = (torch.arange(size, device=session.device) * 7919 % session.tokenizer.vocab_size)[None]
    batch = Batch(ids, ids, ids.numel())
    logits = []
    for each in (session, opened):
        with each.computing():
            logits.append(forward_batch(each.model, each.model, batch).logits)
    if not torch.equal(*logits):
        worst = (logits[0] - logits[1]).abs().max().item()
        raise AptError(
            f"the run that was written does not compute what it should: logits differ by {worst:g}"
        )
