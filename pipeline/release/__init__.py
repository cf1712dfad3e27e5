"""Make the files for publication from the baked weights."""
