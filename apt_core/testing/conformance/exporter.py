"""What every exporter must do; that what it writes computes the same is for ``apt-export`` to
prove."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_core.data.tokenizers.byte import ByteTokenizer
from apt_core.errors import Problem
from apt_core.modeling.plain import plain_model, with_tensors
from apt_core.providers import ExporterProvider, ExportJob, PlainModel, Proof
from apt_core.requirements import unmet
from apt_core.testing.conformance.checks import Check, LeftOut
from apt_core.testing.tiny import tiny_session

FORMS: tuple[dict[str, Any], ...] = (
    {"model.tva.s": 0, "model.tie_embeddings": True},
    {
        "model.attention_name": "mha",
        "model.num_kv_heads": 1,
        "model.mha.head_dim": 6,
        "model.mha.qk_norm": True,
        "model.mha.qk_norm_eps": 1e-5,
        "model.norm.eps": 1e-5,
        "model.tie_embeddings": False,
    },
)
"""Settings of the models that are written."""


def exporter_checks(provider: Any) -> list[Check]:
    """The checks of an exporter."""
    return [
        Check("builds", lambda: _builds(provider)),
        Check("refusals", lambda: _refusals(provider)),
        Check("files", lambda: _files(provider)),
        Check("leaves the model alone", lambda: _leaves_the_model(provider)),
        Check("rounding", lambda: _rounding(provider)),
        Check("proof", lambda: _proof(provider)),
    ]


def _builds(provider: Any) -> None:
    assert isinstance(provider, ExporterProvider), f"{type(provider).__name__} is no exporter"


def _models() -> Iterator[PlainModel]:
    tokenizer = ByteTokenizer()
    for settings in FORMS:
        session = tiny_session(overrides=settings)
        yield plain_model(session.model.cpu(), tokenizer.vocab_size)


def _refusals(provider: Any) -> None:
    """What speaks against a model is said by problems, the same ones each time."""
    for model in _models():
        found = [list(provider.check(model.shape, ByteTokenizer())) for _ in range(2)]
        for problem in found[0]:
            assert isinstance(problem, Problem), f"check gives a {type(problem).__name__}"
        assert found[0] == found[1], "a second check of the same model gives other problems"


def _written(provider: Any) -> Iterator[tuple[PlainModel, Callable[[Path], None]]]:
    """The models that it does not refuse, and what writes them into a folder. Raises LeftOut where
    it refuses all."""
    refused: list[Problem] = []
    for model in _models():
        if problems := [*provider.check(model.shape, ByteTokenizer())]:
            refused += problems
            continue
        yield model, _writer(provider, model)
    if len(refused) >= len(FORMS):
        raise LeftOut(f"it refuses the models that are tried: {refused[0]}")


def _writer(provider: Any, model: PlainModel) -> Callable[[Path], None]:
    tokenizer = ByteTokenizer()

    def write(folder: Path) -> None:
        provider.write(ExportJob(folder, model, tokenizer, "naïve 名", tokenizer.chat_template))

    return write


def _files(provider: Any) -> None:
    """It writes files, into its folder alone."""
    for _, write in _written(provider):
        with tempfile.TemporaryDirectory(prefix="apt-check-") as temporary:
            place = Path(os.path.realpath(temporary))
            folder, elsewhere = place / "export", place / "elsewhere"
            folder.mkdir()
            elsewhere.mkdir()
            before = os.getcwd()
            os.chdir(elsewhere)
            try:
                write(folder)
                assert Path.cwd() == elsewhere, "it changes the working directory"
            finally:
                os.chdir(before)
            outside = {*place.rglob("*")} - {folder, elsewhere, *folder.rglob("*")}
            assert not outside, f"it writes {sorted(outside)[0].name} outside of its folder"
            made = [path for path in folder.rglob("*") if not path.is_dir()]
            assert made, "it writes nothing"
            for path in made:
                assert path.is_file() and not path.is_symlink(), f"{path.name} is no plain file"


def _leaves_the_model(provider: Any) -> None:
    """It changes no weight, which are those of the run."""
    for model, write in _written(provider):
        before = _tensors(model)
        with tempfile.TemporaryDirectory(prefix="apt-check-") as temporary:
            write(Path(temporary))
        same = all(map(torch.equal, before, _tensors(model)))
        assert same, "a weight of the model is another one after it was written"


def _rounding(provider: Any) -> None:
    """What it rounds the weights to is a model of the same shape, near the one it was given."""
    for model, _ in _written(provider):
        stored = provider.stored(model)
        if stored is None:
            continue
        assert isinstance(stored, PlainModel), f"stored gives a {type(stored).__name__}"
        assert stored.shape == model.shape, "stored changes the shape"
        for given, kept in zip(_tensors(model), _tensors(stored), strict=True):
            assert kept.shape == given.shape, "stored changes the shape of a tensor"
            assert kept.dtype == torch.float32, f"stored gives {kept.dtype}, not float32"
            away = float((kept - given).abs().max())
            assert away <= 0.5 * float(given.abs().max()), "stored gives other weights"


def _proof(provider: Any) -> None:
    """What runs the export is there, and says by how much it may differ."""
    proof = provider.proof
    if proof is None:
        raise LeftOut("nothing is known that runs what it writes: it needs --unproven")
    assert isinstance(proof, Proof), f"proof is a {type(proof).__name__}"
    assert proof.runtime, "the proof names no runtime"
    assert Path(proof.script).is_file(), f"{proof.script}, the script of the proof, is not there"
    assert 0 < proof.tolerance < math.inf, f"the tolerance is {proof.tolerance}"
    assert 0 < proof.share <= 1, f"the share of places is {proof.share}"
    json.dumps(dict(proof.settings))
    for reason in unmet(proof.requires):
        assert "is not a valid requirement" not in reason, reason


def _tensors(model: PlainModel) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor.clone())
        return tensor

    read = with_tensors(model, keep)
    for _ in read.blocks():
        pass
    return found
