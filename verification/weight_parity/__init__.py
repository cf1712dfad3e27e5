"""Every tensor of a file against the values that the reference gives for it."""
