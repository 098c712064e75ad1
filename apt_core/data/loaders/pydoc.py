"""``dataset:pydoc``: the language reference that comes with CPython."""

from __future__ import annotations

import platform
from pathlib import Path

from apt_core.code_source import short_path
from apt_core.data.loaders.text_default import read_text
from apt_core.data.preprocess import deduplicate_paragraphs, hold_out
from apt_core.errors import ConfigError, Problem
from apt_core.providers.dataset import DatasetProvider, TextData


class PydocDataset(DatasetProvider):
    """The text of ``pydoc_data.topics`` in order of topic, about 0.4 MB of English.

    Paragraphs are de-duplicated (a fifth repeats), then the last tenth is held out, unless
    ``val_path`` names a file to evaluate on. The text differs between Python versions: compare
    figures only where ``sha256`` is the same.
    """

    name = "pydoc"

    def load(self) -> TextData:
        """Raises ConfigError where this Python was packaged without the text, and for a
        ``val_path`` that cannot be read."""
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
        text = deduplicate_paragraphs("\n\n".join(topics[name] for name in sorted(topics)))
        val_path = self.setting("val_path", None)
        if val_path is None:
            train, val = hold_out(text)
            note = f"{len(val):,} held out"
        else:
            problems: list[Problem] = []
            train, val = text, read_text(Path(val_path), "data.val_path", problems)
            note = f"{len(val):,} from {short_path(val_path)}"
            if problems:
                raise ConfigError(problems)
        data = TextData(train, val, "")
        return TextData(
            train,
            val,
            f"pydoc_data.topics of Python {platform.python_version()}, de-duplicated: "
            f"{len(train):,} characters to train on, {note}, "
            f"sha256 {data.sha256[:12]}",
        )
