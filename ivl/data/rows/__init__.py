"""A row of any format into a conversation."""
