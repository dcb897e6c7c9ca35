"""What prompts are ranked by: the scores by name, and their maths."""
