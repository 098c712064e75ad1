"""Sources: providers of kind `dataset`, which yield documents."""
