"""Folders of text, and a model that repeats what it has read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from apt_core import GenerationRequest
from apt_core.inference import Engine
from apt_core.testing import TINY_PROFILE, tiny_session
from apt_core.types import ModelOutput

RETRIEVER = "apt_plugins.retriever.plugin"
FACTS = {
    "The harbour of Brel is called ": "Tamsin",
    "The river through Okmar is called ": "Sefu",
    "El faro más alto de Brel se llama ": "Íñigo",
}


class Repeats(nn.Module):
    """Goes on as the text did after its last eight bytes stood there before; else it ends."""

    def __init__(self, eos):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.eos = eos

    def forward(self, input_ids, **options):
        ids = input_ids[0].tolist()
        after = self.eos
        for at in range(len(ids) - 9, -1, -1):
            if ids[at : at + 8] == ids[-8:]:
                after = ids[at + 8]
                break
        logits = torch.full((1, len(ids), 257), -50.0)
        logits[0, -1, after] = 50.0
        return ModelOutput(logits, torch.zeros(1, len(ids), 1))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder with three facts among other text, and an empty cache."""
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "library"
    (folder / "deep").mkdir(parents=True)
    for number in range(12):
        lines = [
            f"Shelf {number} of row {n} holds {n * 7 + number} maps of islands.\n" for n in range(9)
        ]
        (folder / f"shelf{number}.txt").write_text("".join(lines), encoding="utf-8")
    facts = [f"{asked}{told}.\n" for asked, told in FACTS.items()]
    (folder / "deep" / "harbours.md").write_text("# Harbours\n\n" + facts[0], encoding="utf-8")
    rows = [{"text": "No river."}, {"text": facts[1].strip()}]
    (folder / "rivers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "faros.txt").write_text("Faros\n" * 3 + "\n" + facts[2], encoding="utf-8")
    return folder


@pytest.fixture
def asked(library):
    """``asked(prompt, *plugins, model=True, **settings)``: the result and the manager, by the model
    that repeats or a tiny one; without a retriever if there are no plugins."""

    def ask(prompt, *plugins, model=True, request=None, **settings):
        keys = {} if not plugins else {"retriever.folder": str(library), **settings}
        profile = {**TINY_PROFILE, "model": {**TINY_PROFILE["model"], "max_seq_len": 512}}
        session = tiny_session(*plugins, profile=profile, overrides=keys, strict=False)
        if model:
            session = replace(session, model=Repeats(session.tokenizer.special.eos))
        given = {"max_new_tokens": 12, "temperature": 0.0, "stop": (".",), **(request or {})}
        (result,) = Engine(session).run([GenerationRequest(prompt, **given)])
        return result, session.manager

    return ask
