"""Declares the core's providers as a plugin declares its own.

The core is not a plugin behind the guard: with no plugin at all, these make training, evaluation
and generation work.
"""

from __future__ import annotations

from dataclasses import replace

from apt_core.kinds import KINDS
from apt_core.types import CORE, ProviderSpec

_TOKENIZERS = "apt_core.data.tokenizers"
_TOKENIZER_SETTINGS = "apt_core.providers.tokenizer:TokenizerSettings"
_NORM_SETTINGS = "apt_core.providers.norm:NormSettings"
_CHAT = "data.tokenizer.chat_template"
_TRAINED = (
    _CHAT,
    "data.tokenizer.vocab_size",
    "data.tokenizer.sample_chars",
    "data.tokenizer.sample_chars_per_document",
)
_LAYERS = "apt_core.modeling.layers"
_SOURCES = "apt_core.data.sources"
_TASKS = "apt_core.evaluation.tasks"

_ADAM = ("training.betas", "training.eps")
_DECAY = ("training.warmup_steps", "training.min_lr_ratio")

_DECLARED = (
    ProviderSpec(
        kind="attention",
        name="tva_default",
        factory=f"{_LAYERS}.attention_tva:TVAProvider",
        summary="TVA: attention in a shared low-rank space, fused",
        config="apt_core.providers.attention:TVASettings",
        section="model.tva",
        reads=("model.num_kv_heads",),
    ),
    ProviderSpec(
        kind="attention",
        name="mha",
        factory=f"{_LAYERS}.attention_mha:MHAProvider",
        summary="multi-head attention; grouped or multi-query with num_kv_heads",
        config="apt_core.providers.attention:MHASettings",
        section="model.mha",
        reads=("model.num_kv_heads",),
    ),
    ProviderSpec(
        kind="ffn",
        name="default",
        factory=f"{_LAYERS}.ffn:SwiGLUProvider",
        summary="SwiGLU feed-forward",
    ),
    ProviderSpec(
        kind="ffn",
        name="vft",
        factory=f"{_LAYERS}.vft:VFTProvider",
        summary="VFT: SwiGLU in a low-rank space",
        config="apt_core.providers.ffn:VFTSettings",
        section="model.vft",
    ),
    ProviderSpec(
        kind="ffn",
        name="gelu",
        factory=f"{_LAYERS}.ffn:GELUProvider",
        summary="two products with GELU between",
    ),
    ProviderSpec(
        kind="ffn",
        name="relu2",
        factory=f"{_LAYERS}.ffn:SquaredReLUProvider",
        summary="two products with squared ReLU between",
    ),
    ProviderSpec(
        kind="norm",
        name="rmsnorm",
        factory=f"{_LAYERS}.norm:RMSNormProvider",
        summary="RMSNorm with a learned scale",
        config=_NORM_SETTINGS,
        section="model.norm",
    ),
    ProviderSpec(
        kind="norm",
        name="layernorm",
        factory=f"{_LAYERS}.norm:LayerNormProvider",
        summary="LayerNorm with a learned scale and shift",
        config=_NORM_SETTINGS,
        section="model.norm",
    ),
    ProviderSpec(
        kind="position",
        name="rope",
        factory=f"{_LAYERS}.rope:RoPEProvider",
        summary="rotary position embedding",
        config="apt_core.providers.position:RoPESettings",
        section="model.rope",
    ),
    ProviderSpec(
        kind="position",
        name="learned",
        factory=f"{_LAYERS}.learned:LearnedPositionProvider",
        summary="a learned vector a position, added to the token embeddings",
    ),
    ProviderSpec(
        kind="backbone",
        name="gpt",
        factory="apt_core.modeling.backbones.gpt:GPTProvider",
        summary="pre-norm decoder-only transformer",
    ),
    ProviderSpec(
        kind="tokenizer",
        name="byte",
        factory=f"{_TOKENIZERS}.byte:ByteTokenizer",
        summary="UTF-8 bytes, exactly 256 ids",
        config=_TOKENIZER_SETTINGS,
        section="data.tokenizer",
        reads=(_CHAT,),
    ),
    ProviderSpec(
        kind="tokenizer",
        name="char",
        factory=f"{_TOKENIZERS}.char:CharTokenizer",
        summary="an id a character of the run's text, bytes for others",
        config=_TOKENIZER_SETTINGS,
        section="data.tokenizer",
        reads=_TRAINED,
    ),
    ProviderSpec(
        kind="tokenizer",
        name="bpe",
        factory=f"{_TOKENIZERS}.bpe:BPETokenizer",
        summary="byte-pair encoding, learned from the run's text",
        config=_TOKENIZER_SETTINGS,
        section="data.tokenizer",
        reads=_TRAINED,
        requires=("tokenizers>=0.21",),
    ),
    ProviderSpec(
        kind="tokenizer",
        name="hf",
        factory=f"{_TOKENIZERS}.hf:HFTokenizer",
        summary="a tokenizer.json, or a folder of Hugging Face with its chat template",
        config=_TOKENIZER_SETTINGS,
        section="data.tokenizer",
        reads=("data.tokenizer.path", _CHAT),
        requires=("tokenizers>=0.21",),
    ),
    ProviderSpec(
        kind="dataset",
        name="text_default",
        factory=f"{_SOURCES}.text_default:TextDataset",
        section="data",
        summary="text files; by suffix JSON lines, CSV and parquet; .gz and .zst",
        files=("train_path", "val_path"),
    ),
    ProviderSpec(
        kind="dataset",
        name="jsonl",
        factory=f"{_SOURCES}.jsonl:JsonLines",
        section="data",
        summary="JSON lines with text, prompt and response, or messages",
        files=("train_path", "val_path"),
    ),
    ProviderSpec(
        kind="dataset",
        name="csv",
        factory=f"{_SOURCES}.csv:CsvTable",
        section="data",
        summary="comma- or tab-separated tables, a row a document",
        files=("train_path", "val_path"),
    ),
    ProviderSpec(
        kind="dataset",
        name="parquet",
        factory=f"{_SOURCES}.parquet:ParquetTable",
        section="data",
        summary="parquet tables, a row a document",
        files=("train_path", "val_path"),
    ),
    ProviderSpec(
        kind="dataset",
        name="pydoc",
        factory=f"{_SOURCES}.pydoc:PydocDataset",
        section="data",
        summary="CPython's language reference, in every Python",
        files=("val_path",),
    ),
    ProviderSpec(
        kind="dataset",
        name="python_source",
        factory=f"{_SOURCES}.python_source:PythonSource",
        section="data",
        summary="CPython's standard library: code, in every Python",
        files=("val_path",),
    ),
    ProviderSpec(
        kind="dataset",
        name="hlbd",
        factory=f"{_SOURCES}.hlbd:HLBDDataset",
        section="data",
        summary="hierarchical language bootstrapping data: words at eight levels; a set is shipped",
        files=("train_path", "val_path"),
    ),
    ProviderSpec(
        kind="optimizer",
        name="adamw",
        factory="apt_core.optim.optimizers.adamw:AdamWProvider",
        section="training",
        reads=_ADAM,
        summary="AdamW, fused where the device has it",
    ),
    ProviderSpec(
        kind="optimizer",
        name="muon",
        factory="apt_core.optim.optimizers.muon:MuonProvider",
        section="training",
        reads=(*_ADAM, "training.muon"),
        summary="Muon for hidden matrices, AdamW for the rest",
    ),
    ProviderSpec(
        kind="lr_schedule",
        name="cosine",
        factory="apt_core.optim.lr_schedules:CosineProvider",
        reads=_DECAY,
        summary="linear warm-up, then cosine decay",
    ),
    ProviderSpec(
        kind="lr_schedule",
        name="linear",
        factory="apt_core.optim.lr_schedules:LinearProvider",
        reads=_DECAY,
        summary="linear warm-up, then linear decay",
    ),
    ProviderSpec(
        kind="lr_schedule",
        name="wsd",
        factory="apt_core.optim.lr_schedules:WSDProvider",
        section="training",
        reads=(*_DECAY, "training.decay_ratio"),
        summary="linear warm-up, stable, then a decay at the end",
    ),
    ProviderSpec(
        kind="lr_schedule",
        name="constant",
        factory="apt_core.optim.lr_schedules:ConstantProvider",
        reads=("training.warmup_steps",),
        summary="linear warm-up, then constant",
    ),
    ProviderSpec(
        kind="task",
        name="held_out",
        factory=f"{_TASKS}.held_out:HeldOutTask",
        summary="bits per byte and perplexity of the run's held-out documents",
    ),
    ProviderSpec(
        kind="task",
        name="reasoning_quality",
        factory=f"{_TASKS}.held_out:ReasoningQuality",
        summary="final answers to the run's held-out prompts",
    ),
    ProviderSpec(
        kind="task",
        name="completion",
        factory=f"{_TASKS}.shipped:completion",
        summary="which of four words ends a sentence",
    ),
    ProviderSpec(
        kind="task",
        name="arithmetic",
        factory=f"{_TASKS}.shipped:Arithmetic",
        summary="sums, differences and products, made on the fly",
    ),
    ProviderSpec(
        kind="task",
        name="brackets",
        factory=f"{_TASKS}.shipped:Brackets",
        summary="rows of brackets that are to be closed, made on the fly",
    ),
    ProviderSpec(
        kind="task",
        name="json",
        factory=f"{_TASKS}.shipped:json_objects",
        summary="facts of a sentence as a JSON object",
    ),
)


def core_providers(version: str) -> list[ProviderSpec]:
    """The core's providers, stamped with the core's name and version."""
    return [
        replace(spec, plugin=CORE, version=version, default=spec.name == KINDS[spec.kind].default)
        for spec in _DECLARED
    ]
