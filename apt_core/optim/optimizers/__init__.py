"""The core's optimizers, one file each."""
