"""Models of every form that an export can have, and their certificates: many in one process of the
runtime, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core.data.tokenizers.bpe import BPETokenizer
from apt_core.data.tokenizers.char import CharTokenizer
from apt_core.data.tokenizers.hf import HFTokenizer
from apt_core.modeling.carry import materialize
from apt_core.modeling.plain import plain_model
from apt_core.providers import ExporterProvider, ExportJob, PlainModel, TokenizerProvider
from apt_core.runs import Session
from apt_core.testing import tiny_session
from apt_core.testing.tiny import TEXT
from apt_plugins.export.comparing import Comparison, compare
from apt_plugins.export.own_answers import OwnAnswers, RoundedAnswers
from apt_plugins.export.questions import NEW_TOKENS, NUM_PROMPTS, questions_for
from apt_plugins.export.runtimes import answered
from apt_plugins.moe.settings import MoeSettings
from apt_plugins.moe.upcycle import upcycled

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass(frozen=True)
class Model:
    """The settings of a model beside those of the tiny profile, the ``moe`` that it switches to,
    its tokenizer."""

    settings: Mapping[str, Any]
    moe: Mapping[str, Any] | None = None
    tokenizer: str = "byte"


MHA, TVA = {"model.attention_name": "mha"}, "model.tva"
MODELS = {
    "tva": Model({f"{TVA}.s": 0, "model.max_seq_len": 260}),
    "mha of width 6, untied, linear RoPE": Model(
        {
            **MHA,
            "model.tie_embeddings": False,
            "model.mha.head_dim": 6,
            "model.norm.eps": 1e-5,
            "model.rope.scaling": {"type": "linear", "factor": 3.0},
        },
    ),
    "gqa, llama3 RoPE, bpe": Model(
        {
            **MHA,
            "model.num_heads": 4,
            "model.num_kv_heads": 2,
            "model.rope.theta": 500.0,
            "model.rope.scaling": {"type": "llama3", "factor": 4.0, "original_max_seq_len": 16},
        },
        tokenizer="bpe",
    ),
    "tva rank 6, gqa, QK-norm, vft": Model(
        {
            f"{TVA}.rank": 6,
            f"{TVA}.s": 0,
            f"{TVA}.qk_norm": True,
            "model.num_kv_heads": 1,
            "model.ffn_name": "vft",
            "model.tie_embeddings": True,
        },
    ),
    "tva factored, embedding norm, hf": Model(
        {f"{TVA}.s": 0, f"{TVA}.factored": True, "model.embedding_norm": True}, tokenizer="hf"
    ),
    "experts, yarn": Model(
        {
            f"{TVA}.s": 0,
            "model.rope.scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16},
        },
        {"experts": 3, "top_k": 2},
        tokenizer="char",
    ),
    "experts, QK-norm, untied": Model(
        {**MHA, "model.mha.qk_norm": True, "model.tie_embeddings": False},
        {"experts": 4, "top_k": 1},
    ),
}

FLEX = {"model.attention_name": "flex", "model.num_heads": 4, "model.num_kv_heads": 2}
WINDOWED = {
    "in a window": Model({**FLEX, "model.flex.window": 7}),
    "in a window, QK-norm": Model(
        {**FLEX, "model.flex.window": 12, "model.flex.qk_norm": True, "model.norm.eps": 1e-8}
    ),
}
"""Of these, not every exporter has a form."""


def stirred(session: Session, scale: float = 0.1) -> Session:
    """The session with noise in its weights, so that every part of them tells."""
    with torch.no_grad():
        for index, parameter in enumerate(session.model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(scale * noise)
        session.model.final_norm.weight.mul_(0.15)  # logits of order 1
    return session


def tokenizer_of(kind: str, folder: Path) -> TokenizerProvider:
    """A tokenizer that was trained on a small text."""
    if kind == "char":
        char = CharTokenizer({"vocab_size": 280})
        char.train([TEXT, "é中ö文😀"])
        return char
    bpe = BPETokenizer({"vocab_size": 290})
    bpe.train([TEXT])
    if kind == "bpe":
        return bpe
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *alphabet]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return HFTokenizer({"path": str(folder)})


def session_of(model: Model, folder: Path) -> Session:
    """A session with stirred weights."""
    size = {} if model.tokenizer == "byte" else {"model.vocab_size": 330}
    fixed = {"model.num_layers": 2, "model.max_seq_len": 40, "hardware.num_threads": 1}
    settings = {**fixed, **size, **model.settings}
    session = tiny_session("moe", overrides=settings)
    if model.moe is not None:
        with torch.device("meta"):
            from apt_core.modeling import ModelBuilder

            structure = ModelBuilder(session.config, session.registry).build_model()
            transform = upcycled(
                structure, session.config, MoeSettings(**model.moe), session.registry
            )
        made = materialize(transform, session.model, seed=1, num_layers=2)
        session = replace(session, model=made.eval())
    if model.tokenizer != "byte":
        tokenizer = tokenizer_of(model.tokenizer, folder / "tokenizer")
        session = replace(session, tokenizer=tokenizer)
    return stirred(session)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """A session of each of MODELS and WINDOWED; nobody changes them."""
    return {
        name: session_of(model, tmp_path_factory.mktemp("model"))
        for name, model in {**MODELS, **WINDOWED}.items()
    }


def job_of(folder: Path, plain: PlainModel, tokenizer: TokenizerProvider) -> ExportJob:
    """A job whose conversations are those of the tokenizer."""
    return ExportJob(folder, plain, tokenizer, "tiny", tokenizer.chat_template)


class KeptAnswers(OwnAnswers):
    """Generates once what every exporter is compared with."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._kept: dict[Any, list[tuple[int, ...]]] = {}

    def greedy(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[tuple[int, ...]]:
        asked = tuple(map(tuple, prompts)), tuple(counts)
        if asked not in self._kept:
            self._kept[asked] = super().greedy(prompts, counts)
        return self._kept[asked]


Certify = Callable[..., dict[str, Comparison]]


@pytest.fixture(scope="session")
def certify(models: dict[str, Session], tmp_path_factory: pytest.TempPathFactory) -> Certify:
    """``certify(exporter, names, spoil=None, num_prompts=20)``: the comparisons of exports of these
    models, which ``spoil(folder)`` may have changed."""
    own = {name: KeptAnswers(session) for name, session in models.items()}
    return partial(certified, models, tmp_path_factory, own=own)


def certified(
    models: Mapping[str, Session],
    factory: pytest.TempPathFactory,
    exporter: ExporterProvider,
    names: Sequence[str] | None = None,
    spoil: Callable[[Path], None] | None = None,
    num_prompts: int = NUM_PROMPTS,
    own: Mapping[str, OwnAnswers] | None = None,
) -> dict[str, Comparison]:
    proof = exporter.proof
    assert proof is not None
    chosen = names
    if chosen is None:
        held = "window" in exporter.holds
        chosen = [name for name in models if held or name not in WINDOWED]
    targets, owns = [], []
    for name in chosen:
        session = models[name]
        plain = plain_model(session.model, session.tokenizer.vocab_size, exporter.holds)
        assert not [*exporter.check(plain.shape, session.tokenizer)]
        folder = factory.mktemp("export")
        exporter.write(job_of(folder, plain, session.tokenizer))
        if spoil is not None:
            spoil(folder)
        # One has all 200 tokens; they take most of the time.
        new_tokens = NEW_TOKENS if plain.shape.max_seq_len > NEW_TOKENS else 20
        questions = questions_for(
            plain.shape, session.tokenizer, num_prompts=num_prompts, new_tokens=new_tokens
        )
        targets.append((folder, questions))
        stored = exporter.stored(plain)
        kept = OwnAnswers(session) if own is None else own[name]
        owns.append(kept if stored is None else RoundedAnswers(session, stored))
    with answered(proof, targets) as answers:
        return {
            name: compare(mine, foreign, questions, proof.tolerance, share=proof.share)
            for name, mine, (_, questions), foreign in zip(
                chosen, owns, targets, answers, strict=True
            )
        }
