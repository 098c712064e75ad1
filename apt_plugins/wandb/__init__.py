"""Runs on Weights & Biases, online or offline."""
