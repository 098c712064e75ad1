"""A user's plugins on prompts and responses, beside the curriculum: a source, a head with a loss of
its own, and a frozen embedding."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

if TYPE_CHECKING:
    from tests.training.curriculum.conftest import Curriculum

MINE = '''
from apt_core import ProviderSpec, hookimpl
from apt_core.providers import DatasetProvider


class Mine(DatasetProvider):
    """Prompts with responses."""

    name = "mine"

    def documents(self):
        for n in range(60):
            yield {"prompt": f"{n}+{n % 7}=", "response": "ab" * (n * n % 4) + str(n + n % 7)}

    def fingerprint(self):
        return "60"


@hookimpl
def apt_register_providers():
    return [ProviderSpec("dataset", "mine", Mine)]
'''

HEAD = '''
import torch.nn.functional as F
from torch import nn

from apt_core import hookimpl
from apt_core.modeling import ModelTransform


class Head(nn.Linear):
    def init_parameter(self, name, tensor, generator, *, num_layers):
        nn.init.normal_(tensor, 0.0, 0.02, generator=generator)
        return True


@hookimpl
def apt_transform_model(model):
    model.learned_head = Head(model.d_model, 1)
    return ModelTransform(model)


@hookimpl
def apt_loss_terms(trainer, batch, output):
    """Which tokens are to be learned."""
    tokens = batch.token_mask()
    found = trainer.model.learned_head(output.hidden).squeeze(-1)[tokens]
    wanted = (batch.targets != -100)[tokens].float()
    return {"learned": 0.1 * F.binary_cross_entropy_with_logits(found, wanted)}
'''

FROZEN = """
from apt_core import hookimpl


class Plugin:
    @hookimpl
    def on_training_start(self, trainer):
        trainer.model.embedding.requires_grad_(False)
"""

SETTINGS: dict[str, Any] = {
    "data": {"loader": "mine", "max_length": 32, "val_fraction": 0.2, "packing": "pad"},
    "model.max_seq_len": 32,
    "model.vocab_size": 260,
    "training.batch_size": 2,
    "evaluation.metrics": ["reasoning_quality"],
    "evaluation.eval_freq": 0,
    "evaluation.sample_tokens": 0,
}


def test_plugins_of_twenty_lines_work_together_and_resume(
    curriculum: Curriculum, in_children, differences, killer
) -> None:
    plugins = []
    for name, text in {"mine": MINE, "head": HEAD, "frozen": FROZEN}.items():
        plugins.append(str(curriculum.folder / f"{name}.py"))
        Path(plugins[-1]).write_text(text, encoding="utf-8")
    curriculum.settings = SETTINGS
    whole = curriculum.train("whole", *plugins)
    first = load_file(curriculum.checkpoints("whole")[0] / "model.safetensors")
    changed = {name for name, weight in whole.weights.items() if name in first
               and not weight.equal(first[name])}  # fmt: skip
    assert "embedding.weight" in first.keys() - changed
    assert {"learned_head.weight", "blocks.0.ffn_norm.weight"} <= changed
    rows = [row for row in whole.metrics if "loss" in row]
    learned = [row["loss/head.learned"] for row in rows]
    assert len(learned) == rows[-1]["step"] and learned[-1] < learned[0]
    switches = [event["plugin"] for event in whole.manifest["switches"]]
    assert switches == ["head", "moe"]
    assert 0 <= whole.result.figures["val_reasoning_quality"] <= 1

    enabled = next(e["step"] for e in whole.manifest["timeline"] if e["plugin"] == "align")
    saving = {"training.save_every_steps": 1}
    kill = killer(enabled - 1, micro=1)
    part = partial(curriculum.train, "killed", *plugins, kill, changes=saving)
    assert in_children(part) == [-signal.SIGKILL]
    curriculum.train("killed", *plugins, resume=True)
    assert differences(curriculum.folder / "whole", curriculum.folder / "killed") == []
