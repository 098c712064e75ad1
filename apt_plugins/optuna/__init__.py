"""``apt-tune``: searches the values of a profile's keys with Optuna. Trials are runs that
pause and go on."""
