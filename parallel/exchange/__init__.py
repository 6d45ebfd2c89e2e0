"""Ways to bring every rank the state before its tokens."""
