"""Learned while decoding: the adaptive threshold, the costs of calls."""
