"""What a training step is made of beside the loop itself."""
