"""Voting: a majority of several draws decides a token that the model is uncertain of."""
