"""Makes the run of a folder of Hugging Face."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.errors import ConfigError, Problem
from apt_core.kernel import Kernel
from apt_core.runs.folder import now, versions
from apt_plugins.hf_import.asked import Asked, Imported
from apt_plugins.hf_import.filling import fill, named_as_ours
from apt_plugins.hf_import.healing import convert, heal, moments_of
from apt_plugins.hf_import.hf_config import CONFIG, HFModel, read_model
from apt_plugins.hf_import.hf_weights import HFWeights
from apt_plugins.hf_import.making import made_run
from apt_plugins.hf_import.placing import record_import, require_free, settle, staged
from apt_plugins.hf_import.profile import asked_context, kernel_of

Told = Callable[[str], None]


def import_folder(asked: Asked, told: Told) -> Imported:
    """Make the run. ``told`` is called with what happens.

    Raises ConfigError with everything that stands against it, and what training raises; no run is
    left behind then, except where healing fails: that run is whole, at an earlier step.
    """
    require_free(asked.output)
    model, weights, tokenizer, kernel = _read(asked)
    notes = [*model.notes, *weights.notes]
    for note in notes:
        told(f"note: {note}")
    source = {
        "source": str(asked.folder),
        "architecture": model.architecture,
        "imported": now(),
        "versions": versions(),
        "files": weights.sha256(),
        "notes": notes,
    }
    imported = Imported(asked.output, model.architecture, notes)
    with staged(asked.output, tokenizer) as run:
        told(f"reading {model.architecture} in {asked.folder}")
        made = made_run(kernel, run, lambda built: fill(built, named_as_ours(model, weights)))
        imported.parameters, imported.loss = made.parameters, made.loss
        if asked.rank is not None:
            moments = moments_of(kernel, made.trainer)
            del made, kernel  # two models at once would need the memory of both
            shutil.rmtree(run)
            told(f"attention becomes TVA of rank {asked.rank}")
            convert(asked, model, weights, moments, run, imported)
        settle(run, asked.output, source | imported.figures())
    if asked.heal_steps:
        told(f"training {asked.heal_steps} steps")
        try:
            heal(asked, model, imported)
        finally:
            record_import(asked.output, source | imported.figures())
    return imported


def _read(asked: Asked) -> tuple[HFModel, HFWeights, HFTokenizer, Kernel]:
    """The model, its tensors, its tokenizer and the run's profile. Raises ConfigError with all
    problems."""
    if not asked.folder.is_dir():
        what = "is a file" if asked.folder.exists() else "does not exist"
        raise ConfigError(f"{what}: give the folder of a model", "DIR", str(asked.folder))
    problems: list[Problem] = []
    tokenizer, model, weights, kernel = None, None, None, None
    try:
        tokenizer = _tokenizer(asked)
    except ConfigError as error:
        problems += error.problems
    try:
        model = read_model(asked.folder, asked_context(asked))
        problems += _of_rank(asked, model)
        weights = HFWeights(asked.folder, model)
    except ConfigError as error:
        problems += error.problems
    if model is not None:
        try:
            kernel = kernel_of(asked, model)
        except ConfigError as error:
            problems += error.problems
    if model is not None and tokenizer is not None:
        ids, rows = tokenizer.vocab_size, model.keys["vocab_size"]
        if ids > rows:
            message = f"is {rows:,}, and the tokenizer has {ids:,} ids"
            hint = "--tokenizer PATH names another tokenizer"
            where = str(asked.folder / CONFIG)
            problems.append(Problem(message, "vocab_size", where, hint))
    if problems or model is None or weights is None or tokenizer is None or kernel is None:
        raise ConfigError(problems)
    return model, weights, tokenizer, kernel


def _tokenizer(asked: Asked) -> HFTokenizer:
    """The tokenizer of the folder, or that which was named. Raises ConfigError for one that is not
    there or cannot be read."""
    place, key = asked.tokenizer or asked.folder, "--tokenizer" if asked.tokenizer else "DIR"
    file = place / "tokenizer.json" if place.is_dir() else place
    if not file.is_file():
        hint = "--tokenizer PATH names a tokenizer.json, or a folder with one"
        message = f"there is no {file.name} in it" if place.is_dir() else "there is no such file"
        raise ConfigError(message, key, str(place), hint)
    tokenizer = HFTokenizer({"path": str(place)})
    try:
        _ = tokenizer.vocab_size, tokenizer.special, tokenizer.chat_template
    except ConfigError as error:
        found = [replace(each, key=key, where=str(file)) for each in error.problems]
        raise ConfigError(found) from error
    except ValueError as error:
        raise ConfigError(f"the tokenizer cannot be read: {error}", key, str(file)) from error
    return tokenizer


def _of_rank(asked: Asked, model: HFModel) -> Iterator[Problem]:
    if asked.rank is None:
        return
    d_model, heads = model.keys["d_model"], model.keys["num_heads"]
    most = min(model.head_dim, d_model // heads)
    if d_model % heads:
        message = f"TVA's heads divide the width, and {heads} do not divide {d_model}"
        yield Problem(message, "--to-tva")
    elif asked.rank % 2 or not 2 <= asked.rank <= most:
        hint = f"choose an even rank from 2 to {most}"
        yield Problem(f"{asked.rank} is no rank of these heads", "--to-tva", "", hint)
