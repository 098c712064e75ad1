"""Generating text."""

from apt_core.inference.branches import Branch, Branches
from apt_core.inference.engine import Engine, generate
from apt_core.inference.rows import Delta, Ticket
from apt_core.inference.sampling import candidates

__all__ = ["Branch", "Branches", "Delta", "Engine", "Ticket", "candidates", "generate"]
