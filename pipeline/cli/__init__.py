"""The `so8t` command line."""
