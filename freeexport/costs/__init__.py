"""Costs of decoding, and verdicts on exits."""
