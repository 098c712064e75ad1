"""The plan of a run, made without training: its stages, memory, time and what would fit."""
