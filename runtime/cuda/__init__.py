"""The same on a CUDA stream."""
