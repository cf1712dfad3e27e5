"""Reads, checks and edits GGUF files."""
