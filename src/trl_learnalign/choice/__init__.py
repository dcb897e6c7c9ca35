"""The choice among ranked prompts: conditions, quotas, top or draw."""
