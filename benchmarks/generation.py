"""Generation on a CPU, against transformers' Llama and llama.cpp with the same weights.

TVA without QK-norm is exactly multi-head attention with narrow heads, so the models of each size
compute the same:
APT's engine, LlamaForCausalLM.generate with its default and its static cache, and llama.cpp,
greedily, in fp32. All sides continue the same prompt and must give the same tokens. One process
times them in turns.

The share of the memory's bandwidth is the time that torch takes to sum all weights that a token
needs, in one tensor, over that of the token, measured in turns: a median and quartiles of rounds. A
token needs one weight after the other: the share of that is of the time to sum them so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from _harness import Report, interleave, run
from _llama_cpp import LlamaCpp, write_gguf
from apt_core import GenerationRequest
from apt_core.data.tokenizers.base import CoreTokenizer
from apt_core.inference import Engine
from apt_core.modeling.row_decoding import LargePages
from apt_core.runs import Session
from apt_core.testing import tiny_session

VOCABULARY, CONTEXT, PROMPT = 4096, 1024, 32
BATCHES = (1, 16)
LONG_PROMPT = 256
"""Tokens of the prompt whose first token is waited for."""

PERIOD = 32
"""Tokens after which the text that look-up is tried on repeats itself."""

STEADY = 0.1
"""How far two reads of a round may differ for its bandwidth to count as one."""


@dataclass(frozen=True)
class Size:
    """A model: about ``name`` parameters as Llama counts them."""

    name: str
    d_model: int
    num_heads: int
    num_layers: int
    d_ff: int
    tokens: int
    threads: int | None
    rounds: int


SIZES = (
    Size("1M", 96, 6, 6, 256, tokens=96, threads=1, rounds=8),
    Size("14M", 320, 10, 12, 896, tokens=48, threads=None, rounds=5),
    Size("60M", 640, 10, 13, 2048, tokens=24, threads=None, rounds=3),
)
"""``threads`` None is all; a model of 1 M has too little work for two."""


class Characters(CoreTokenizer):
    """An id for each character, and no end of documents."""

    name = "characters"

    @property
    def vocab_size(self) -> int:
        return VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def session_of(size: Size, threads: int, **options: Any) -> Session:
    """``options`` are keys of ``model``."""
    shape = {
        "d_model": size.d_model,
        "num_heads": size.num_heads,
        "num_layers": size.num_layers,
        "d_ff": size.d_ff,
        "max_seq_len": CONTEXT,
        "vocab_size": VOCABULARY,
        "tva.qk_norm": False,
        **options,
    }
    overrides = {f"model.{key}": value for key, value in shape.items()}
    session = tiny_session(overrides={**overrides, "hardware.num_threads": threads})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in session.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.02)
    return replace(session, tokenizer=Characters())


@torch.no_grad()
def llama_of(size: Size, model: Any) -> LlamaForCausalLM:
    """Llama with the weights of ``model``, those of TVA fused."""
    first = model.blocks[0].attention
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        head_dim=first.width,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=model.final_norm.eps,
        rope_theta=first.rotary.theta,
        tie_word_embeddings=model.head is None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    llama = LlamaForCausalLM(config).eval()
    inner = llama.model
    pairs: list[tuple[nn.Module, Tensor]] = [
        (inner.embed_tokens, model.embedding.weight),
        (inner.norm, model.final_norm.weight),
    ]
    if model.head is not None:
        pairs.append((llama.lm_head, model.head.weight))
    for block, layer in zip(model.blocks, inner.layers, strict=True):
        qkv, out = block.attention.projections()
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = qkv.chunk(3)
        pairs += [
            (attention.q_proj, q),
            (attention.k_proj, k),
            (attention.v_proj, v),
            (attention.o_proj, out),
            (layer.input_layernorm, block.attention_norm.weight),
            (layer.post_attention_layernorm, block.ffn_norm.weight),
            (mlp.gate_proj, block.ffn.gate.weight),
            (mlp.up_proj, block.ffn.up.weight),
            (mlp.down_proj, block.ffn.down.weight),
        ]
    for module, weight in pairs:
        module.weight.copy_(weight)
    return llama


def prompts(batch: int, length: int) -> list[str]:
    """Texts of one length, which differ."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32, 127, (batch, length), generator=generator).tolist()
    return ["".join(map(chr, row)) for row in ids]


def ours(engine: Engine, texts: Sequence[str], tokens: int) -> Callable[[], list[list[int]]]:
    requests = [GenerationRequest(t, max_new_tokens=tokens, temperature=0.0) for t in texts]
    return lambda: [list(result.token_ids) for result in engine.run(requests)]


def theirs(
    llama: LlamaForCausalLM, texts: Sequence[str], tokens: int, threads: int, **options: Any
) -> Callable[[], list[list[int]]]:
    ids = torch.tensor([[ord(character) for character in text] for text in texts])

    @torch.no_grad()
    def generated() -> list[list[int]]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            **options,
        )
        torch.set_num_threads(before)
        rows: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return rows

    return generated


def weights_of(llama: LlamaForCausalLM) -> tuple[Tensor, Sequence[Tensor]]:
    """The matrices that a token reads, as one tensor, in pages as the engine has them, and one by
    one; the embedding only where it is the projection too."""
    tied = llama.config.tie_word_embeddings
    unread = None if tied else llama.model.embed_tokens.weight
    read = [each.detach() for each in llama.parameters() if each.ndim == 2 and each is not unread]
    whole = LargePages().copy(torch.cat([each.flatten() for each in read]))
    return whole, whole.split([each.numel() for each in read])


def reading(weights: Sequence[Tensor], tokens: int, threads: int) -> Callable[[], None]:
    """Sums each of ``weights`` as often as there are ``tokens``."""

    def read() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for _ in range(tokens):
            for weight in weights:
                weight.sum()
        torch.set_num_threads(before)

    return read


def by_llama_cpp(
    path: Path, texts: Sequence[str], tokens: int, threads: int
) -> Callable[[], list[list[int]]]:
    llama = LlamaCpp(path, threads=threads, rows=len(texts), context=CONTEXT)
    ids = [[ord(character) for character in text] for text in texts]
    return lambda: llama.generated(ids, tokens)


def measure_size(report: Report, size: Size, rounds: int, folder: Path) -> list[list[str | float]]:
    threads = size.threads or torch.get_num_threads()
    session = session_of(size, threads)
    llama = llama_of(size, session.model)
    path = folder / f"{size.name}.gguf"
    write_gguf(session.model, path)
    rows: list[list[str | float]] = []
    for batch in BATCHES:
        engine = Engine(session, max_batch=batch, lookup="never")
        texts, tokens = prompts(batch, PROMPT), size.tokens if batch == 1 else size.tokens // 2
        sides = {
            "apt": ours(engine, texts, tokens),
            "llama": theirs(llama, texts, tokens, threads),
            "llama_static": theirs(llama, texts, tokens, threads, cache_implementation="static"),
            "llama_cpp": by_llama_cpp(path, texts, tokens, threads),
        }
        if batch == 1:
            engine = Engine(session, max_batch=1, lookup="never", compiled=True)
            sides["apt_compiled"] = ours(engine, texts, tokens)
            agreement(sides["apt"](), sides["apt_compiled"]())
        equal = agreement(sides["apt"](), sides["llama"]())
        agreement(sides["apt"](), sides["llama_cpp"]())
        times = interleave(sides, baseline="apt", rounds=rounds, calls=1, warmup=1)
        for peer in ("llama", "llama_static", "llama_cpp"):
            report.ratio(f"{peer}_over_apt_{size.name}_batch{batch}", times, peer, over="apt")
        if batch == 1:
            report.noise(f"apt_over_apt_{size.name}", times)
            report.ratio(f"compiled_over_plain_{size.name}", times, "apt_compiled", over="apt")
            for peer in ("llama", "llama_cpp"):
                report.ratio(f"{peer}_over_compiled_{size.name}", times, peer, over="apt_compiled")
        speeds = [
            batch * tokens / times.median(side) * 1e9 if side in sides else "–"
            for side in ("apt", "apt_compiled", "llama", "llama_static", "llama_cpp")
        ]
        rows.append([f"{size.name}, batch {batch}", *speeds, f"{equal:.1%}"])
        if batch == 1:
            first_token(report, size, session, llama, threads, rounds)
            if size is SIZES[-1]:
                share_of_bandwidth(report, size, session, llama, threads, rounds)
                faster_ways(report, size, threads, rounds)
    return rows


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """The share of texts that are equal token for token. Raises ValueError where a text differs in
    its first tokens, which rounding does not explain."""
    for a, b in zip(one, other, strict=True):
        if a[:4] != b[:4]:
            raise ValueError(f"the models do not compute the same: {a[:8]}, {b[:8]}")
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def first_token(
    report: Report,
    size: Size,
    session: Session,
    llama: LlamaForCausalLM,
    threads: int,
    rounds: int,
) -> None:
    engine = Engine(session, max_batch=1)
    texts = prompts(64, LONG_PROMPT)  # of which nothing is known from an earlier round

    def first() -> object:
        return ours(engine, [texts.pop()], 1)()

    sides = {"apt": first, "llama": theirs(llama, texts[:1], 1, threads)}
    times = interleave(sides, baseline="apt", rounds=rounds, calls=1, warmup=1)
    report.ratio(f"first_token_llama_over_apt_{size.name}", times, "llama", over="apt")
    report.add(f"first_token_{size.name}_ms", round(times.median("apt") / 1e6, 2))


def share_of_bandwidth(
    report: Report, size: Size, session: Session, llama: LlamaForCausalLM, threads: int, rounds: int
) -> None:
    """Tokens after a prompt of one, plain and compiled. Each round has a share of its own, since
    the bandwidth of a shared machine may change from one second to the next; a round counts in
    which it has not."""
    whole, weights = weights_of(llama)
    text, tokens = prompts(1, 1), 3 * size.tokens
    plain, compiled = (
        ours(Engine(session, max_batch=1, lookup="never", compiled=each), text, tokens)
        for each in (False, True)
    )
    agreement(plain(), compiled())
    sides = {
        "plain": plain,
        "compiled": compiled,
        "read": reading([whole], tokens, threads),
        "read_in_turn": reading(weights, tokens, threads),
    }
    times = interleave(sides, baseline="read", rounds=8 * rounds, calls=1, warmup=1)
    read, again = times.samples["read"], times.again
    settled = [n for n in range(len(read)) if abs(read[n] / again[n] - 1) < STEADY]
    bandwidths = {n: whole.nbytes * tokens * 2 / (read[n] + again[n]) for n in settled}
    report.add("bandwidth_GB_per_s", round(median(bandwidths.values()), 2))
    report.add("rounds_of_one_bandwidth", len(settled) / len(read))
    shares = {
        f"{name}_{size.name}_{side}": {
            n: times.samples[of][n] / times.samples[side][n] for n in settled
        }
        for name, of in (("share_of_bandwidth", "read"), ("share_of_reads_in_turn", "read_in_turn"))
        for side in ("plain", "compiled")
    }
    for name, found in shares.items():
        low, middle, high = quantiles(found.values(), n=4)
        report.add(name, round(middle, 4), spread=(low, high))
    near = {n: 5 * round(bandwidths[n] / 5) for n in settled}
    report.table(
        f"Shares of a token of {size.name}, by the bandwidth of its round",
        ["GB/s", "rounds", *shares],
        [
            [about, len(rounds), *(median(found[n] for n in rounds) for found in shares.values())]
            for about in sorted({*near.values()})
            for rounds in ([n for n in settled if near[n] == about],)
        ],
    )


@torch.no_grad()
def repeating_session(size: Size, threads: int) -> Session:
    """A model whose text says the same PERIOD tokens again and again: what follows a token is
    decided by its embedding, to which the blocks add little."""
    session = session_of(size, threads, tie_embeddings=False)
    model = session.model
    ids = torch.arange(VOCABULARY)
    follower = ids // PERIOD * PERIOD + (ids + 1) % PERIOD
    model.head.weight[follower] = model.embedding.weight.clone()
    for block in model.blocks:
        for weight in (block.attention.out_weight, block.ffn.down.weight):
            weight.mul_(0.002)
    return session


def faster_ways(report: Report, size: Size, threads: int, rounds: int) -> None:
    """Look-up and int8 weights, on a text that repeats itself."""
    session = repeating_session(size, threads)
    text, tokens = prompts(1, PROMPT), 8 * size.tokens
    engines = {
        "plain": Engine(session, max_batch=1, lookup="never"),
        "lookup": Engine(session, max_batch=1),
        "int8": Engine(session, max_batch=1, int8=True),
    }
    sides = {name: ours(engine, text, tokens) for name, engine in engines.items()}
    if sides["plain"]() != sides["lookup"]():
        raise ValueError("look-up has changed the text")
    times = interleave(sides, baseline="plain", rounds=max(2, rounds // 3), calls=1, warmup=1)
    for name in ("lookup", "int8"):
        report.ratio(f"plain_over_{name}_{size.name}", times, "plain", over=name)
    payoff = engines["lookup"].lookup
    kept = payoff.kept_tokens / max(1, payoff.guessed_tokens)
    report.add(f"lookup_guesses_kept_{size.name}", round(kept, 3))


def cache_bytes(report: Report) -> None:
    for size in SIZES:
        tva, mha = (
            session_of_attention(size, name).registry.get("attention", name)
            for name in ("tva_default", "mha")
        )
        sizes = [
            provider.kv_cache_bytes(size.d_model, size.num_heads, 1, bytes_per_value=4)
            for provider in (tva, mha)
        ]
        report.add(f"kv_bytes_mha_over_tva_{size.name}", sizes[1] / sizes[0])
        report.add(f"kv_bytes_per_token_{size.name}", sizes[0] * size.num_layers)


def session_of_attention(size: Size, name: str) -> Session:
    return tiny_session(
        overrides={
            "model.d_model": size.d_model,
            "model.num_heads": size.num_heads,
            "model.attention_name": name,
        }
    )


def measure(report: Report, quick: bool) -> None:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    report.machine["threads"] = torch.get_num_threads()
    rows: list[list[str | float]] = []
    with TemporaryDirectory() as folder:
        for size in SIZES[:1] if quick else SIZES:
            rows += measure_size(report, size, 2 if quick else size.rounds, Path(folder))
    cache_bytes(report)
    report.table(
        "Tokens per second",
        [
            "model",
            "APT",
            "APT, compiled",
            "Llama",
            "Llama, static cache",
            "llama.cpp",
            "texts equal to Llama's",
        ],
        rows,
    )
    report.note(
        "What keeps a compiled token of 60 M from the memory's bandwidth: at 35 GB/s it takes "
        "8.1 ms, of which one long read of the weights takes 7.2, one matrix after the other "
        "7.7, and what is not compiled 0.2, since its code and data have left the CPU's caches;"
        " its share was 0.86 to 0.90 in several runs. At times the memory of this shared "
        "machine gives 65 GB/s, and changes within a run: the same three are then 5.4, 4.0 and "
        "4.9 ms. Tried without gain: torch.compile of the step, whose guards cost what the "
        "fusion saves; loops of the compiler over weights as they are, at 0.7 of the speed of "
        "those over blocks of rows; all blocks in one function without what is around them; "
        "intermediate results on the stack (0.99 of the time at 60 M, 0.94 at 1 M, and up to 8 "
        "seconds more of compiling); threads that wait for each other without spinning."
    )
    report.note(
        f"Greedy, fp32, a prompt of {PROMPT} tokens, {VOCABULARY:,} ids; the first token after "
        f"{LONG_PROMPT}. The model of 1 M is computed by one thread on both sides, which is faster "
        "for both. llama.cpp has the weights in F32, and its own defaults: 16 bits for keys and "
        "values, flash attention."
    )


if __name__ == "__main__":
    run(
        "How fast is generation on a CPU, against transformers' Llama and llama.cpp with the same "
        "weights?",
        measure,
        packages=["torch", "transformers", "gguf", "xllamacpp"],
    )
