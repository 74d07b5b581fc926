"""Measuring: traces, timing, costs, thresholds, quality; evaluations and benchmarks with their tables and plots."""
