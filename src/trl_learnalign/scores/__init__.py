"""Scores by name, which rank prompts, and their maths."""
