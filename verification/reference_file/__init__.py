"""The reference as one small file, to verify a downloaded GGUF file without the original weights."""
