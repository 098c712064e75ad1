"""``attention:linear_causal``: the gated delta rule, whose state has a constant size."""
