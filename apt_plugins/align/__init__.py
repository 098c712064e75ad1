"""``align:bistate_default``: loss terms that pull the model towards a stable state of itself."""
