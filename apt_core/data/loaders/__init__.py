"""Sources of text, one file each."""

from apt_core.data.loaders.pydoc import PydocDataset
from apt_core.data.loaders.text_default import TextDataset

__all__ = ["PydocDataset", "TextDataset"]
