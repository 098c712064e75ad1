"""Whole models."""

from apt_core.modeling.backbones.gpt import GPT, Block, GPTProvider

__all__ = ["GPT", "Block", "GPTProvider"]
