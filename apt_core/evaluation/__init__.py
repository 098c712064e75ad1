"""Scoring a model on held-out text."""
