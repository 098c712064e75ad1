"""Counts the evaluations at which the loss was better than before."""
