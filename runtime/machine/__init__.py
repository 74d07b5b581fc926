"""Cores, memory, device names, cache directory."""
