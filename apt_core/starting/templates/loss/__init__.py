"""A loss term that keeps predictions from being too sure."""
