"""Traces -> threshold."""
