"""Turns multi-head attention into TVA of a rank in mid-run."""
