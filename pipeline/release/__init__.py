"""From baked weights to the files that are published."""
