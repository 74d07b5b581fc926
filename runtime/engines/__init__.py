"""Engines, which run the graphs of a bundle."""
