"""Data: sources of documents, tokenizers, token stores, packing, and the batches of a run."""
