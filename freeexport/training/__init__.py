"""Fine-tuning for an exit."""
