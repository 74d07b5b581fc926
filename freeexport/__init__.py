"""The pipeline around early-exit bundles: convert, verify, generate, and the command line."""

__version__ = "0.1.0"
