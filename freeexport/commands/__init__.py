"""Verbs of the command line: click options and printing.

No other package imports logic from here.
"""
