"""What Ollama is told beside a GGUF."""

from __future__ import annotations

import json

from apt_core.data.tokenizers.chat import CHAT_TEMPLATE
from apt_core.inference.chat import DIALOGUE_TEMPLATE, PAIRS_TEMPLATE, TEXT_TEMPLATE
from apt_core.providers import SpecialTokens
from apt_core.providers.documents import ROLES
from apt_core.providers.tokenizer import BETWEEN
from apt_plugins.export.tokenizers import BEGINNINGS

GO_TEMPLATES = {
    CHAT_TEMPLATE: "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}"
    "<|assistant|>",
    DIALOGUE_TEMPLATE: '{{ range .Messages }}{{ if eq .Role "user" }}User: '
    '{{ else if eq .Role "assistant" }}Assistant: {{ end }}{{ .Content }}{{ "\\n" }}{{ end }}'
    "Assistant:",
    PAIRS_TEMPLATE: "{{ range $at, $_ := .Messages }}"
    '{{ if or (eq .Role "system") (eq (len (slice $.Messages $at)) 1) }}'
    f"{{{{ .Content }}}}{{{{ {json.dumps(BETWEEN)} }}}}{{{{ end }}}}{{{{ end }}}}",
    TEXT_TEMPLATE: "{{ range $at, $_ := .Messages }}"
    '{{ if and (gt $at 0) (ne .Role "assistant") }}{{ "\\n" }}{{ end }}{{ .Content }}{{ end }}',
}
"""By chat template, the same in the language of Ollama's templates. The one of plain text puts a
line break before a message even if the answer before it ends in one: the language cannot look at
the end of a text."""


def modelfile(
    file: str, special: SpecialTokens, chat_template: str | None, max_seq_len: int
) -> str:
    """The Modelfile of a GGUF beside it.

    Of our own chat templates it has a translation, since Ollama reads no Jinja but by recognising
    templates that it knows. Ollama puts what begins a text before it by itself.
    """
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {max_seq_len}"]
    ends = (special.eos, special.end, *(special.roles.get(role) for role in ROLES))
    texts = [special.names.get(token) for token in ends if token is not None]
    stops = [quoted(text) for text in dict.fromkeys(texts) if text]
    lines += [f"PARAMETER stop {stop}" for stop in stops if stop is not None]
    translated = GO_TEMPLATES.get((chat_template or "").removeprefix(BEGINNINGS[0]))
    if translated is not None:
        lines.append(f"TEMPLATE {quoted(translated)}")
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
