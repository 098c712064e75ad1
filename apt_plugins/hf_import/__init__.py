"""``apt-import``: a folder of Hugging Face becomes a run."""
