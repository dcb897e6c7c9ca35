"""Files, processes, progress and hashes: what knows nothing of reinforcement learning."""
