"""A reference as one small file, so that a downloaded GGUF file can be verified without the original weights."""
