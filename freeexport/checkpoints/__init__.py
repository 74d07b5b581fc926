"""Reading checkpoints, tokenizers and examples."""
