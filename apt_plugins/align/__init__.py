"""``align:bistate_default``: the model in training is pulled towards a stable state of itself."""
