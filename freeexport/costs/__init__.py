"""Costs of decoding, measured or from bytes, and verdicts on exits."""
