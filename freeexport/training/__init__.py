"""Fine-tuning of checkpoints for an early exit."""
