"""The tokenizers of the core."""
