"""A selection: how it is made, what it holds, and what is said about it."""
