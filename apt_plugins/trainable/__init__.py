"""The trainable set by stages: which parameters are frozen, and from when on they learn."""
