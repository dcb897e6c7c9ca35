"""Tells whether an object or a function of the user's is the same as at another time."""
