"""Writes the metrics of a run to a CSV file."""
