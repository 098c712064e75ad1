"""``report.html``: a run's curves, timeline and samples on one page that needs no network."""
