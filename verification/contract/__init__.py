"""What must be equal in effect without inference: tokens, chats, stop set, metadata, file structure."""
