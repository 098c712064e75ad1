"""Scripts that run an export in the program that it is for. They are run by path in a process of
their own, where APT cannot be imported."""
