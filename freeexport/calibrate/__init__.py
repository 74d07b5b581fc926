"""Calibration: traces of both predictions, and the threshold of an exit."""
