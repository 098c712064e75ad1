"""The folder of a run, and all that is read from it and written to it."""
