"""``report.html``: what happened in a run, on one page that needs no network."""
