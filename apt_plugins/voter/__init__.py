"""Voting: where the model is uncertain of the next token, several draws of it decide."""
