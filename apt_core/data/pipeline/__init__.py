"""What is done to documents before they are kept as tokens: normalise, filter, de-duplicate,
split."""
