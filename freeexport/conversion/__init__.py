"""Checkpoint -> bundle, and proof that it is the same model."""
