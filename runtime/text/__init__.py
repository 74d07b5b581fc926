"""Text <-> ids, logits -> id."""
