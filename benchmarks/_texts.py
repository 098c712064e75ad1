"""The text that benchmarks train on, which comes with every Python."""

from __future__ import annotations

from apt_core.data.pipeline.split import hold_out
from apt_core.providers import Document
from apt_core.registry import Registry


def pydoc_texts() -> tuple[str, str]:
    """The language reference of this Python: what to train on, and its last tenth."""
    source = Registry().get("dataset", "pydoc")
    texts = [Document.of(document).text or "" for document in source.documents()]
    return hold_out("\n\n".join(texts))
