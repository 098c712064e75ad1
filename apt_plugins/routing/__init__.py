"""How a mixture of experts chooses its experts as the run goes: temperature, exploration,
capacity, and balance without a loss."""
