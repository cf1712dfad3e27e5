"""Reads the Hugging Face checkpoint that a file was made from."""
