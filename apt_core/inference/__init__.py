"""Generating text."""

from apt_core.inference.generator import generate

__all__ = ["generate"]
