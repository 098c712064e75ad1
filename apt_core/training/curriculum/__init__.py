"""Plugins that are enabled in mid-run, and the changes of the model that they make."""
