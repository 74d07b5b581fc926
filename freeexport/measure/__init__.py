"""CALM, for comparison."""
