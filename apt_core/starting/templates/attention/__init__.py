"""Attention in which every head has a temperature of its own."""
