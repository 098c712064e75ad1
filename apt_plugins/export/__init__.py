"""Takes models to other programs, each export with a certificate that it computes the same
there."""
