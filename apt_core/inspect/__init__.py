"""What the kernel knows, shown: listings, traces and generated references."""
