"""Runs in the local database of trackio."""
