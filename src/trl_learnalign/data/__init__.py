"""Rows, columns and prompts of a dataset."""
