"""Comparison of decoding methods: settings, records, scores, tables and pages."""
