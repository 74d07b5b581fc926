"""Engines: what runs a graph of a bundle."""
