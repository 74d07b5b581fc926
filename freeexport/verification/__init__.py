"""Verification of bundles against their checkpoints."""
