"""Runs one training in several processes: launch, ranks, agreement and liveness."""
