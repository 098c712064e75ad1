"""The names of Llama-like models and of their tensors in files of Hugging Face: those that are
exported and imported."""

from __future__ import annotations

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""By the type of a model."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

ATTENTION_NORM, FFN_NORM = "input_layernorm", "post_attention_layernorm"
ATTENTION = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
}
QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
FFN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""By the names of the parts of a plain block; those of a feed-forward stand within its place."""

FFN_PLACE = "mlp"


def of_block(number: int, name: str) -> str:
    """The name of a tensor of a block."""
    return f"model.layers.{number}.{name}.weight"
