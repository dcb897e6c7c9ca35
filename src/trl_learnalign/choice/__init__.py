"""Which of the ranked prompts are taken: conditions, quotas, top or draw."""
