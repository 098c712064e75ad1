"""``exporter:hf``: a folder that transformers, and what reads such folders, load as Llama, Mistral,
Qwen3, Mixtral or Qwen3-MoE."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from apt_core import Problem
from apt_core.files import write_atomically
from apt_core.providers import (
    ExporterProvider,
    ExportJob,
    PlainBlock,
    PlainExperts,
    PlainModel,
    PlainRope,
    PlainShape,
    Proof,
    TokenizerProvider,
)
from apt_core.providers.base import read_settings
from apt_plugins.export.folders import rounded, write_tensors
from apt_plugins.export.hf_names import (
    ARCHITECTURES,
    ATTENTION,
    ATTENTION_NORM,
    EMBEDDING,
    FFN,
    FFN_NORM,
    FFN_PLACE,
    FINAL_NORM,
    HEAD,
    QK_NORM,
    of_block,
)
from apt_plugins.export.settings import EXTRAS, FolderSettings
from apt_plugins.export.tokenizers import ExpressedTokenizer, expressed

TOLERANCE = 1e-5

SCRIPT = Path(__file__).with_name("proofs") / "with_transformers.py"


def model_type(shape: PlainShape) -> str:
    """The type of model that a plain model of this shape is."""
    if shape.num_experts:
        return "qwen3_moe" if shape.qk_norm else "mixtral"
    if shape.qk_norm:
        return "qwen3"
    return "llama" if shape.window is None else "mistral"


class HFExporter(ExporterProvider):
    """``exporter:hf``; settings as :class:`FolderSettings`."""

    name = "hf"
    version = "1.1.0"
    holds = frozenset({"window"})

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.settings = read_settings(FolderSettings, config, "--option")

    def check(self, shape: PlainShape, tokenizer: TokenizerProvider) -> Iterator[Problem]:
        if model_type(shape) == "mixtral" and not shape.renormalised:
            yield Problem(
                "the weights of its experts are not renormalised, which Mixtral's are; Qwen3-MoE's "
                "need not be, and have QK-norm",
                "hf",
            )
        try:
            expressed(tokenizer)
        except ValueError as error:
            yield Problem(str(error), "data.tokenizer_name")

    def write(self, job: ExportJob) -> None:
        write_configuration(job, self.settings.dtype)
        write_tensors(job.folder, named_tensors(job), self.settings)

    def stored(self, model: PlainModel) -> PlainModel | None:
        return rounded(model, self.settings)

    def usage(self, folder: str) -> str:
        return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(ids[0]))
```"""

    @property
    def proof(self) -> Proof:
        requires = ("transformers>=5", "tokenizers>=0.21", "jinja2>=3.1")
        return Proof("transformers", SCRIPT, requires, TOLERANCE, extra=EXTRAS["hf"])


def write_configuration(job: ExportJob, dtype: str) -> None:
    """Write all of a Hugging Face folder but the weights, which are of type ``dtype``. Raises
    OSError."""
    job.advance("tokenizer")
    tokenizer, shape = expressed(job.tokenizer), job.model.shape
    tokenizer.write(job.folder, shape.max_seq_len, job.chat_template)
    for name, value in (
        ("config.json", config_of(shape, tokenizer, dtype)),
        ("generation_config.json", _token_ids(tokenizer)),
    ):
        write_atomically(job.folder / name, json.dumps(value, indent=2) + "\n")


def config_of(shape: PlainShape, tokenizer: ExpressedTokenizer, dtype: str) -> dict[str, Any]:
    """The content of ``config.json``."""
    kind = model_type(shape)
    rope = rope_parameters(shape.rope)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
        # What read the base before there were rope_parameters.
        "rope_theta": shape.rope.theta,
        "tie_word_embeddings": shape.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        **_token_ids(tokenizer),
    }
    if shape.rope.scaling is not None:
        config["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    if kind not in ("mistral", "mixtral"):
        config["attention_bias"] = False
    if kind == "llama":
        config["mlp_bias"] = False
    elif kind == "mixtral":
        config |= {
            "num_local_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
        }
    if kind in ("qwen3", "qwen3_moe"):
        slides = shape.window is not None
        config |= {"use_sliding_window": slides}
        if slides:
            layers = ["sliding_attention"] * shape.num_layers
            config |= {"max_window_layers": 0, "layer_types": layers}
    if kind != "llama":
        config["sliding_window"] = shape.window
    if kind == "qwen3_moe":
        config |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.d_ff,
            "norm_topk_prob": shape.renormalised,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def rope_parameters(rope: PlainRope) -> dict[str, Any]:
    """RoPE in the words of transformers."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    found: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    for name in scaling.OF_TYPE[scaling.type]:
        value = getattr(scaling, name)
        if value is not None:
            found[_ROPE_NAMES.get(name, name)] = value
    return {**found, "rope_theta": rope.theta}


_ROPE_NAMES = {"original_max_seq_len": "original_max_position_embeddings"}


def _token_ids(tokenizer: ExpressedTokenizer) -> dict[str, Any]:
    """The special ids of a configuration."""
    ends: Any = list(tokenizer.ends)
    return {
        "bos_token_id": tokenizer.ids.get("bos_token"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.ids.get("pad_token"),
    }


def named_tensors(job: ExportJob) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model by the names that they have in files of its type, a block at a
    time."""
    model = job.model
    job.advance("embedding")
    yield EMBEDDING, model.embedding
    for number, block in enumerate(model.blocks()):
        job.advance(f"block {number + 1} of {model.shape.num_layers}")
        for name, tensor in _of_block(block, model):
            yield of_block(number, name), tensor
    yield FINAL_NORM, model.final_norm.weight
    if model.head is not None:
        yield HEAD, model.head


def _of_block(block: PlainBlock, model: PlainModel) -> Iterator[tuple[str, Tensor]]:
    attention, ffn = block.attention, block.ffn
    yield ATTENTION_NORM, block.attention_norm.weight
    for part, name in ATTENTION.items():
        yield name, getattr(attention, part)
    for part, name in QK_NORM.items():
        norm = getattr(attention, part)
        if norm is not None:
            yield name, norm.weight
    yield FFN_NORM, block.ffn_norm.weight
    names, place = FFN, FFN_PLACE
    if isinstance(ffn, PlainExperts):
        if model_type(model.shape) == "mixtral":
            names, place = {"gate": "w1", "up": "w3", "down": "w2"}, "block_sparse_moe"
        yield f"{place}.gate", ffn.router.weight
        for expert in range(model.shape.num_experts):
            for part, name in names.items():
                yield f"{place}.experts.{expert}.{name}", getattr(ffn, part)[expert]
        return
    for part, name in names.items():
        yield f"{place}.{name}", getattr(ffn, part)
