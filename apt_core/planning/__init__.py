"""Plans a run without training: its stages, memory, time, and the settings that would fit."""
