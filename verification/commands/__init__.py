"""The commands: verify, lint, and the pytest plugin."""
