"""Properties that must be equal in effect, checked without inference: tokens, chats, stop set, metadata, structure."""
