"""Tasks: one file for each kind of items, and the tasks that come with APT."""
