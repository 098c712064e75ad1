"""``dataset:hf_datasets``: documents out of Hugging Face datasets."""
