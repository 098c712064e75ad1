"""Scoring a model on held-out text."""

from apt_core.evaluation.quick_eval import evaluate

__all__ = ["evaluate"]
