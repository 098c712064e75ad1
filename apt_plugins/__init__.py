"""The plugins shipped with APT, one folder each."""
