"""GGUF files: read, bounded and in place."""
