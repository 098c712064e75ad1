"""Weights of 8 and 4 bits: ``apt-quantize``, and training that takes the rounding into account."""
