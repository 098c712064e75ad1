"""A feed-forward of two products with a squashed square between them."""
