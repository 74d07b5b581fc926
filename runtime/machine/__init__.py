"""Cores, memory, device names and the cache directory of this machine."""
