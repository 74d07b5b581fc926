"""Readers of checkpoints, tokenizers and examples."""
