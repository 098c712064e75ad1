"""``router:topk_moe`` and the switch that turns dense feed-forwards into a mixture of experts."""
