"""Generating text."""

from apt_core.inference.engine import Delta, Engine, Ticket, generate
from apt_core.inference.sampling import candidates

__all__ = ["Delta", "Engine", "Ticket", "candidates", "generate"]
