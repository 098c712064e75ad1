"""``dataset:pydoc``: CPython's own language reference, which every Python carries."""

from __future__ import annotations

import platform

from apt_core.data.preprocess import deduplicate_paragraphs, hold_out
from apt_core.errors import ConfigError, Problem
from apt_core.providers.dataset import DatasetProvider, TextData


class PydocDataset(DatasetProvider):
    """The text of ``pydoc_data.topics`` in order of topic, about 0.4 MB of English.

    Paragraphs are de-duplicated (a fifth repeats), then the last tenth is held out. The text
    differs between Python versions: compare figures only where ``sha256`` is the same. It has no
    settings.
    """

    name = "pydoc"

    def load(self) -> TextData:
        """Raises ConfigError where this Python was packaged without the text."""
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
        train, val = hold_out(text)
        data = TextData(train, val, "")
        return TextData(
            train,
            val,
            f"pydoc_data.topics of Python {platform.python_version()}, de-duplicated: "
            f"{len(train):,} characters to train on, {len(val):,} held out, "
            f"sha256 {data.sha256[:12]}",
        )
