"""Chat templates: how a conversation becomes text, and which of it is to be learned."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apt_core.errors import ConfigError
from apt_core.files import read_file
from apt_core.providers.documents import LEARNED_ROLE, Message

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""What the core's own tokenizers make of a conversation, for those who read it as a template."""

MAX_TEMPLATE = 1 << 20
"""The most bytes of a template."""

TEMPLATE_FILE = "chat_template.jinja"
"""In the folder of a tokenizer: its template."""

Piece = tuple[str, bool]
"""A text, and whether it is to be learned."""

# Noncharacters of Unicode, which no text interchanges, mark what a template says is generated.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_KEY = "data.tokenizer.chat_template"


class ChatTemplate:
    """A Jinja template in the form of Hugging Face: it is given ``messages``,
    ``add_generation_prompt`` and the texts of special tokens, ``tokens`` (``bos_token``, …).

    It runs in a sandbox, within bounds of work and memory. Raises ConfigError where it cannot be
    parsed or Jinja is missing.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._tokens = dict(tokens or {})
        self._marks = _GENERATION.search(source) is not None
        self._compiled = _compiled(source)

    @classmethod
    def read(cls, path: str, tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """The template in a file. Raises ConfigError for one that cannot be read."""
        try:
            return cls(read_file(path, MAX_TEMPLATE).decode("utf-8"), tokens)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", key=_KEY, where=path) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"is not UTF-8: {error}", key=_KEY, where=path) from error

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The text of a conversation. To be learned is what the template puts into ``generation``
        blocks, else the turns of the assistant: what the template adds to the beginning of such a
        turn.

        Raises ValueError where the template refuses the conversation, or renders a turn in another
        way once others follow and has no generation block.
        """
        text = self._rendered(messages)
        if self._marks:
            return _marked(text)
        pieces, at = [], 0
        for index, message in enumerate(messages):
            if message.role != LEARNED_ROLE:
                continue
            begin = self._rendered(messages[:index], generate=True)
            last = index + 1 == len(messages)
            end = text if last else self._rendered(messages[: index + 1])
            if not (text.startswith(begin) and text.startswith(end) and at <= len(begin)):
                raise ValueError(
                    "the chat template renders a turn in another way once others follow, so that "
                    "it cannot be told which text is the assistant's; put it into "
                    "{% generation %} … {% endgeneration %} there"
                )
            pieces += [(text[at : len(begin)], False), (text[len(begin) : len(end)], True)]
            at = len(end)
        return [piece for piece in [*pieces, (text[at:], False)] if piece[0]]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the assistant is to speak. Raises ValueError where the template
        refuses the conversation."""
        return self._rendered(messages, generate=True).replace(_BEGIN, "").replace(_END, "")

    def _rendered(self, messages: Sequence[Message], generate: bool = False) -> str:
        for message in messages:
            if _BEGIN in message.content or _END in message.content:
                raise ValueError("has U+FDD0 or U+FDD1, which are no characters")
        turns = [{"role": each.role, "content": each.content} for each in messages]
        try:
            return self._compiled(
                {
                    "messages": turns,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": generate,
                    **self._tokens,
                }
            )
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"the chat template refuses it: {reason}") from error


class Escaped:
    """Keeps the names of special tokens apart from the same text in a conversation.

    >>> apart = Escaped(["<|end|>"])
    >>> apart.split(apart.escape("a<|end|>") + "<|end|>")
    ['a<|end|>', '<|end|>', '']
    """

    def __init__(self, names: Sequence[str]) -> None:
        longest_first = sorted(names, key=len, reverse=True)
        self._names = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def escape(self, text: str) -> str:
        """``text`` without any of the names."""
        return self._names.sub(lambda name: f"{name[0][0]}\ufdd2{name[0][1:]}", text)

    def split(self, text: str) -> list[str]:
        """Texts and names, by turns; a name is at each odd index."""
        return [part.replace("\ufdd2", "") for part in self._names.split(text)]


def _marked(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    for index, part in enumerate(re.split(f"{_BEGIN}(.*?){_END}", text, flags=re.DOTALL)):
        pieces.append((part, index % 2 == 1))
    return [piece for piece in pieces if piece[0]]


def _compiled(source: str) -> Callable[[Mapping[str, Any]], str]:
    """What renders a template."""
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError(
            "chat templates need jinja2", key=_KEY, hint='pip install "apt-kernel[data]"'
        ) from error
    from apt_core.data.tokenizers.sandbox import BoundedEnvironment

    environment = BoundedEnvironment((_BEGIN, _END))
    try:
        template = environment.from_string(source)
    except RecursionError:
        raise ConfigError("the chat template is nested too deep", key=_KEY) from None
    except (jinja2.TemplateError, SyntaxError) as error:  # of Jinja's parser, then of Python's
        raise ConfigError(f"the chat template cannot be read: {error}", key=_KEY) from error
    return functools.partial(environment.rendered, template)
