"""Logits of a file against the reference's logits over the same tokens."""
