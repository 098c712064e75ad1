"""How far exports may be from the run's model, by the type of their weights."""

from __future__ import annotations

TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""Relative to the largest logit. Rounding weights changes the model, so that greedy texts part
where two tokens are nearly as likely as each other."""
