"""A plugin of somebody else: an attention that says what it is in plain form, and an exporter with
a runtime of its own, which needs numpy alone."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from apt_core import Problem, ProviderSpec, hookimpl
from apt_core.config import Section
from apt_core.modeling.layers import MHAProvider, MultiHeadAttention
from apt_core.providers import Beyond, ExporterProvider, PlainExperts, Proof


class Louder(MultiHeadAttention):
    """Multi-head attention times two; ``echo`` of the input is added, which no plain form has."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.echo = nn.Parameter(torch.full((1,), 0.5))

    def init_parameter(self, name, tensor, generator, *, num_layers):
        if name == "echo":
            tensor.fill_(0.5)
            return True
        return super().init_parameter(name, tensor, generator, num_layers=num_layers)

    def forward(self, x, **options):
        y = 2 * super().forward(x, **options)
        return y if self.echo is None else y + self.echo * x

    def plain(self):
        form = super().plain()
        return replace(form, out=2 * form.out)

    def beyond_plain(self):
        if self.echo is not None:
            yield Beyond("echo", "an echo of the input is added", self._drop)

    def _drop(self):
        self.echo = None


class LouderProvider(MHAProvider):
    name = "louder"

    def create_layer(self, d_model, num_heads, **options):
        return Louder(d_model, num_heads, qk_norm=self.settings.qk_norm, **options)


class Settings(Section):
    fault: Literal["none", "heads", "crash", "orphaned", "killed", "stopped", "full"] = "none"
    requires: str = "numpy>=1"


class NumpyExporter(ExporterProvider):
    """``exporter:numpy``: one file of arrays."""

    name = "numpy"

    def __init__(self, config=None):
        super().__init__(config)
        self.settings = config or Settings()

    def check(self, shape, tokenizer):
        if shape.num_experts:
            yield Problem("numpy has no experts", "numpy")
        if shape.rope.scaling is not None:
            yield Problem("numpy has one RoPE", "numpy")

    def write(self, job):
        shape, arrays = job.model.shape, {"embedding": job.model.embedding.numpy()}
        arrays["final_norm"] = job.model.final_norm.weight.numpy()
        arrays["head"] = (job.model.embedding if shape.tied else job.model.head).numpy()
        arrays["numbers"] = np.array(
            [
                shape.num_layers,
                shape.num_heads,
                shape.num_kv_heads,
                shape.rope.theta,
                shape.norm_eps,
            ]
        )
        for number, block in enumerate(job.model.blocks()):
            job.advance(f"block {number}")
            assert not isinstance(block.ffn, PlainExperts)
            forms = {"": block.attention, "n1": block.attention_norm, "n2": block.ffn_norm}
            for prefix, form in {**forms, "f": block.ffn}.items():
                for name in ("q", "k", "v", "out", "gate", "up", "down", "weight"):
                    if hasattr(form, name):
                        arrays[f"{number}.{prefix}{name}"] = getattr(form, name).numpy()
        if self.settings.fault == "heads":
            q = arrays["1.q"]
            arrays["1.q"] = np.concatenate([q[len(q) // 2 :], q[: len(q) // 2]])
        np.savez(job.folder / "model.npz", **arrays)
        if self.settings.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.settings.fault == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.settings.fault == "full":
            raise OSError(28, os.strerror(28))

    def usage(self, folder):
        return f"Open `{folder}/model.npz`."

    @property
    def proof(self):
        script = Path(__file__).with_name("own_runtime.py")
        settings = {"fault": self.settings.fault}
        return Proof("numpy", script, (self.settings.requires,), 1e-5, settings=settings)


@hookimpl
def apt_register_providers():
    return [
        ProviderSpec(kind="attention", name="louder", factory=LouderProvider, section="model.mha"),
        ProviderSpec(kind="exporter", name="numpy", factory=NumpyExporter, config=Settings),
        ProviderSpec("exporter", "elsewhere", NumpyExporter, requires=["nothing-writes-it"]),
        ProviderSpec("exporter", "bare", NumpyExporter),
    ]
