"""The exporter ``gguf``."""
