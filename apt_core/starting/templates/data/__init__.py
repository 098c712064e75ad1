"""Texts from a CSV file."""
