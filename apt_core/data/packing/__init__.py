"""Packing: how the documents of a part fill windows of T positions."""
