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
    stops = [quoted(text) for text in dict.fromkeys(texts) if text]
    lines += [f"PARAMETER stop {stop}" for stop in stops if stop is not None]
    if tokenizer.chat_template == CHAT_TEMPLATE:
        lines.append(f"TEMPLATE {quoted(GO_TEMPLATE)}")
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str | None:
    """``text`` as a value of a Modelfile. None where Ollama would read another one: it leaves out
    what is not printable, and a line within quotes may end them. (A tokenizer may name its tokens
    as it likes, also so that a command of its own would begin.)

    Its reader ends a value with the line, and takes off the quotes, single or triple, at both ends
    of it; nothing is escaped. Text that has quotes of its own stands between triple ones.
    """
    if not text.isprintable():
        return None
    mark = '"""' if '"' in text else '"'
    return f"{mark}{text}{mark}"
