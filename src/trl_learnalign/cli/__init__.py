"""The command `trl-learnalign`."""
