"""Generating text."""

from apt_core.inference.generator import candidates, generate

__all__ = ["candidates", "generate"]
