"""The packages that ``apt-new plugin`` writes, one a kind, as modules that are checked with all
others: ``my_plugin`` stands for the name, ``apt_my_plugin`` for the package."""
