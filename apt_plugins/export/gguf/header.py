"""The keys of a GGUF that say what its model is."""

from __future__ import annotations

from collections.abc import Iterable

import gguf
from gguf import LlamaFileType

from apt_core.errors import Problem
from apt_core.providers.plain import PlainShape
from apt_core.providers.tokenizer import SpecialTokens
from apt_plugins.export.gguf.vocabulary import Vocabulary


def architecture(shape: PlainShape) -> str:
    """The architecture of llama.cpp that computes a model of ``shape``: ``llama``, with experts or
    without, has no QK-norm."""
    if not shape.qk_norm:
        return "llama"
    return "qwen3moe" if shape.num_experts else "qwen3"


def turns_neighbours(arch: str) -> bool:
    """Whether RoPE of the architecture turns neighbours rather than halves."""
    return arch == "llama"


def shape_problems(shape: PlainShape) -> Iterable[Problem]:
    """Why no architecture of llama.cpp computes a model of ``shape``."""
    if shape.num_experts and shape.experts_per_token > 1 and not shape.renormalised:
        yield Problem(
            "the weights of the chosen experts are not divided by their sum, and llama.cpp's "
            "experts divide them",
            "the experts",
        )
    if shape.num_experts and shape.experts_per_token == 1 and not shape.renormalised:
        yield Problem(
            "the chosen expert is weighted by its probability, and llama.cpp's by 1", "the experts"
        )
    scaling = shape.rope.scaling
    if scaling is None:
        return
    if scaling.type == "llama3" and shape.qk_norm:
        yield Problem(
            "RoPE is scaled as in Llama 3, which llama.cpp does not do in a model with QK-norm",
            "model.rope.scaling",
        )
    if scaling.type == "yarn" and (scaling.attention_factor is not None or not scaling.truncate):
        yield Problem(
            "llama.cpp's YaRN has the attention_factor that follows from the factor, and truncates",
            "model.rope.scaling",
        )


def write_shape(writer: gguf.GGUFWriter, shape: PlainShape) -> None:
    writer.add_context_length(shape.max_seq_len)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    if shape.num_experts:
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.experts_per_token)
        writer.add_expert_feed_forward_length(shape.d_ff)
    _write_rope(writer, shape)


def _write_rope(writer: gguf.GGUFWriter, shape: PlainShape) -> None:
    scaling = shape.rope.scaling
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope.theta)
    if scaling is None or scaling.type == "llama3":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len or shape.max_seq_len)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def write_file_type(writer: gguf.GGUFWriter, number_format: str) -> None:
    name = "ALL_F32" if number_format == "F32" else f"MOSTLY_{number_format}"
    writer.add_file_type(LlamaFileType[name])
    if number_format[0] == "Q":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def write_vocabulary(
    writer: gguf.GGUFWriter, vocabulary: Vocabulary, special: SpecialTokens, template: str | None
) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    # Without these keys llama.cpp takes the id 11 for both.
    eos = ending(special)
    assert eos is not None
    writer.add_eos_token_id(eos)
    writer.add_bos_token_id(eos if special.bos is None else special.bos)
    # There are keys for the end of a turn and of a message; llama.cpp ends texts at both.
    keys = (writer.add_eot_token_id, writer.add_eom_token_id)
    further = [token for token in (special.end, *special.ends) if token not in (None, eos)]
    for add, token in zip(keys, further, strict=False):
        add(token)
    if special.pad is not None:
        writer.add_pad_token_id(special.pad)
    writer.add_add_bos_token(special.bos is not None)
    writer.add_add_eos_token(False)
    if template is not None:
        writer.add_chat_template(template)


def ending(special: SpecialTokens) -> int | None:
    """The id after which llama.cpp stops, which it cannot do without."""
    return next((x for x in (special.eos, special.end, special.pad) if x is not None), None)
