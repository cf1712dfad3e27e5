"""Compares a file's logits with the reference's logits over the same tokens."""
