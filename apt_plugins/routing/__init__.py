"""Routing of a mixture of experts during a run: temperature, exploration, capacity, and load
balancing without a loss."""
