"""``dataset:pydoc``: the language reference that comes with CPython."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator

from apt_core.data.sources.text_default import TextDataset
from apt_core.errors import ConfigError, Problem
from apt_core.providers.documents import Document


class PydocDataset(TextDataset):
    """The texts of ``pydoc_data.topics`` in order of topic, about 0.4 MB of English.

    A paragraph stands only where it first occurs: a fifth repeats. The text differs between Python
    versions: compare figures only where the fingerprint is the same. ``val_path`` may name files to
    evaluate on.
    """

    name = "pydoc"

    def documents(self) -> Iterator[Document]:
        """A document for each topic. Raises ConfigError where this Python was packaged without
        them."""
        seen: set[str] = set()
        for topic, text in sorted(_topics().items()):
            new = [each for each in dict.fromkeys(_paragraphs(text)) if each not in seen]
            seen.update(new)
            if new:
                yield Document(text="\n\n".join(new), where=f"pydoc_data.topics:{topic}")

    def fingerprint(self) -> str | None:
        """The hash of the topics, and of the files of ``val_path``."""
        facts = [self.get_name(), sorted(_topics().items()), self._contents("val_path")]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def describe(self) -> str:
        """Says which Python's topics these are."""
        text = f"pydoc_data.topics of Python {platform.python_version()}, de-duplicated"
        if self.section.val_path is not None:
            text += f"; validated on {self._described('val_path')}"
        return text


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(
            Problem(
                "the embedded text is not there: this Python has no pydoc_data.topics",
                key="data.source",
                hint="set data.train_path to a text file of your own",
            )
        ) from error
    return topics


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of ``text``, which blank lines separate, with their indentation."""
    blocks: list[str] = []
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            blocks.append("\n".join(lines))
            lines = []
    return blocks
