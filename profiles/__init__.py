"""The profiles that come with APT; ``--profile NAME`` finds them by name."""
