"""What Ollama is told beside a GGUF."""

from __future__ import annotations

from apt_core.data.tokenizers.chat import CHAT_TEMPLATE
from apt_core.providers import TokenizerProvider
from apt_core.providers.documents import ROLES

GO_TEMPLATE = "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"
"""CHAT_TEMPLATE in the language of Ollama's templates."""


def modelfile(file: str, tokenizer: TokenizerProvider, max_seq_len: int) -> str:
    """The Modelfile of a GGUF beside it.

    Of the core's own chat template it has a translation, since Ollama reads no Jinja but by
    recognising templates that it knows.
    """
    special = tokenizer.special
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {max_seq_len}"]
    ends = (special.eos, special.end, *(special.roles.get(role) for role in ROLES))
    texts = [special.names.get(token) for token in ends if token is not None]
    # A tokenizer may name its tokens as it likes, also so that a line of its own begins.
    fine = [text for text in texts if text and text.isprintable() and '"' not in text]
    lines += [f'PARAMETER stop "{text}"' for text in dict.fromkeys(fine)]
    if tokenizer.chat_template == CHAT_TEMPLATE:
        lines.append(f'TEMPLATE """{GO_TEMPLATE}"""')
    return "\n".join(lines) + "\n"
