"""Measurements: traces, timing, costs, thresholds, quality, evaluations and benchmarks."""
