"""What ``apt-new`` makes: a profile for a budget, the package of a plugin."""
