"""Compares every tensor of a file with the values that the reference gives for it."""
