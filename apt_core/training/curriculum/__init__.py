"""Enables plugins in mid-run and applies the changes that they make to the model."""
