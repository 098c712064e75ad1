"""Retrieval: passages of a folder of text for prompts, and its next tokens for predictions."""
