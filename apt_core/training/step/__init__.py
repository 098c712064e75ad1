"""The parts of a training step that the loop calls."""
