"""Linear cross-entropy in chunks of tokens, so that logits are never held whole."""
