"""What trackers share: figures of rows, events as text, histograms, and what they keep of a run."""
