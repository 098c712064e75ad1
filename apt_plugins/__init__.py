"""The plugins that are shipped with APT, one folder each."""
