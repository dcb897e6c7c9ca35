"""Pages, cards and trackers: what is drawn and logged about a run."""
