"""What can be found out about prompts, one module for each measure."""
