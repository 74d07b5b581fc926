"""Text to token ids and back, and the choice of tokens from logits."""
