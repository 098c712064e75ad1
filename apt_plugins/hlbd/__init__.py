"""Scores of HLBD tasks: how often each level is turned into each other one as the samples say."""
