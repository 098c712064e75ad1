"""Grows a trained model: wider, deeper, with more ids."""
